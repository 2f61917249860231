"""A network whose every pass can be seen from outside, slowed down, or made deadly: for tests that kill workers."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.conftest import network


class Watched(nn.Module):
    """The network of conftest; in a process that works for another it leaves its number in a folder.

    Args:
        folder: Where.
        seconds: Each pass takes at least.
        deadly: Whether a pass ends such a process.
    """

    def __init__(self, folder: Path, *, seconds: float = 0.0, deadly: bool = False) -> None:
        super().__init__()
        self.inner = network()
        self.folder, self.seconds, self.deadly = str(folder), seconds, deadly

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        if "RAY_JOB_ID" in os.environ and len(images) > 2:  # more than a classifier is tried with
            (Path(self.folder) / str(os.getpid())).touch()
            if self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
        return logits + torch.zeros(())


def processes(folder: Path) -> set[int]:
    """That have left their numbers."""
    return {int(path.name) for path in folder.iterdir()}
