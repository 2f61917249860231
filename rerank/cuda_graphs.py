"""CUDA graphs: work that is the same every time is recorded once, then replayed by a single launch.

On small images a GPU may be done with a kernel before the host has launched the next; a graph needs one launch for all.
See "CUDA Graphs" in PyTorch's notes on CUDA semantics.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch

WARM_UP = 3  # calls before the recording, as many as PyTorch's own: libraries load and choose their kernels in them

Step = Callable[[], object]  # what it returns is of no use


def graphed(step: Step, device: torch.device) -> Step:
    """The step itself on a CPU; on a GPU the same work, replayed from a CUDA graph after a few ordinary calls.

    Every call does the step's work exactly once, in the order of the caller's stream.

    Args:
        step: Reads and writes tensors that stay where they are, of shapes that stay the same, and never waits for a
            value on the host. What it does in Python happens in the ordinary calls and in the recording alone.
        device: Where those tensors are.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)  # warm-up and recording share one that is not the default: nothing else runs there
    return RecordedStep(step, warm_up=partial(_run_on, side, step), record=partial(_record_on, side, step))


class RecordedStep:
    """A step that is warmed up in its first calls, recorded in the next, and replayed from then on.

    A step that cannot be recorded is called as it is, with one warning.

    Args:
        step: The work.
        warm_up: Does it once, in a way that prepares the recording.
        record: Records it without doing it, and returns what does it; raises a RuntimeError where that is impossible.
    """

    def __init__(self, step: Step, *, warm_up: Step, record: Callable[[], Step]) -> None:
        self._step, self._warm_up, self._record = step, warm_up, record
        self._warm_ups_left = WARM_UP
        self._replay: Step | None = None

    def __call__(self) -> None:
        """Do the work once."""
        if self._warm_ups_left:
            self._warm_ups_left -= 1
            self._warm_up()
            return
        if self._replay is None:
            self._replay = self._recorded()
        self._replay()

    def _recorded(self) -> Step:
        try:
            return self._record()
        except RuntimeError as error:  # so are all of CUDA's in PyTorch
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"expected work that a CUDA graph can hold, got: {reason}. It runs without one: slower, with the same "
                "results. A network that reads values on the host in its forward pass is the usual cause",
                RuntimeWarning,
                stacklevel=2,
            )
            return self._step


def _run_on(side: torch.cuda.Stream, step: Step) -> None:
    """The step on another stream, after what the current one was given and before what it will be given."""
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()
    current.wait_stream(side)


def _record_on(side: torch.cuda.Stream, step: Step) -> Step:
    """What launches the step's kernels again; they do not run now."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    return graph.replay
