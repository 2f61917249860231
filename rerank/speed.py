"""Which backbone is fastest on this machine: a short, fair measurement."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from tmm_engine.index.errors import InputError
from tmm_engine.rerank.backbone import Backbone

PASS_SECONDS = 0.15  # of a timed pass through all backbones, at least; keeps a comparison within about 2 s
REPEATS = 3


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """What `faster_backend` measured.

    Attributes:
        images: How many images each timed pass took.
        images_per_second: Median of `REPEATS` passes, by name.
    """

    images: int
    images_per_second: dict[str, float]

    @property
    def fastest(self) -> str:
        """The name of the fastest; the first of equals."""
        return max(self.images_per_second, key=self.images_per_second.__getitem__)


def faster_backend(
    backbones: Mapping[str, Backbone], images: UInt8[Tensor, "n c h w"], trigger: Float[Tensor, "c h w"]
) -> SpeedComparison:
    """Which backbone is fastest on this machine, in about 2 s at most (slow backbones: five passes over one image).

    Batches grow until a pass through all backbones takes `PASS_SECONDS` or all images are used; then each is timed
    `REPEATS` times, in turns, so that what else the machine does meets all of them.

    Args:
        backbones: By a name of the caller's; results are taken to the CPU.
        images: As stored, where the backbones take them from; best one chunk of the search.
        trigger: On the same device, in the backbones' dtype.

    Raises:
        InputError: no backbone or no image.
    """
    if not backbones or not len(images):
        raise InputError(f"expected backbones and images to compare, got {len(backbones)} and {len(images)}")

    def timed_pass(n: int) -> dict[str, float]:
        seconds = {}
        for name, backbone in backbones.items():
            start = time.perf_counter()
            backbone(images[:n], trigger, image_weight=0.5, trigger_weight=0.5, clamp=True).cpu()  # .cpu() waits
            seconds[name] = time.perf_counter() - start
        return seconds

    n = 1
    while True:
        timed_pass(n)  # the first pass at a new size sets up kernels and memory
        if sum(timed_pass(n).values()) >= PASS_SECONDS or n == len(images):
            break
        n = min(2 * n, len(images))
    passes = [timed_pass(n) for _ in range(REPEATS)]
    return SpeedComparison(n, {name: n / statistics.median(each[name] for each in passes) for name in backbones})
