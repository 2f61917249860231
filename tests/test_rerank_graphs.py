"""A step does its work once a call: warmed up, recorded, replayed, or as it is where it cannot be recorded."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SHAPE
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.rerank.backbone import FixedChunk, Precision, TorchBackbone, specialised
from tmm_engine.rerank.cuda_graphs import WARM_UP, RecordedStep, graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Counting:
    """A step that adds to a tensor in place, and the ways in which it was called, in order."""

    def __init__(self, device: str = "cpu") -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.calls: list[str] = []

    def step(self) -> None:
        self.total += 1
        self.calls.append("step")

    def warm_up(self) -> None:
        self.total += 1
        self.calls.append("warm up")

    def record(self):
        self.calls.append("record")
        return self.replay

    def replay(self) -> None:
        self.total += 1
        self.calls.append("replay")


def test_on_a_cpu_it_is_the_step_itself():
    counting = Counting()
    step = counting.step
    assert graphed(step, torch.device("cpu")) is step
    assert counting.calls == []


@given(calls=st.integers(0, 12))
def test_every_call_does_the_work_once_and_the_recording_none(calls):
    counting = Counting()
    step = RecordedStep(counting.step, warm_up=counting.warm_up, record=counting.record)
    for _ in range(calls):
        step()
    assert int(counting.total) == calls
    replays = max(0, calls - WARM_UP)
    expected = ["warm up"] * min(calls, WARM_UP) + ["record"] * bool(replays) + ["replay"] * replays
    assert counting.calls == expected


def test_what_cannot_be_recorded_runs_as_it_is_with_one_warning():
    counting = Counting()

    def record():
        counting.calls.append("record")
        raise RuntimeError("operation not permitted when stream is capturing\nand a page of advice")

    step = RecordedStep(counting.step, warm_up=counting.warm_up, record=record)
    for _ in range(WARM_UP):
        step()
    with pytest.warns(RuntimeWarning, match=r"got: operation not permitted when stream is capturing\. It runs") as seen:
        step()
    assert len(seen) == 1
    assert "advice" not in str(seen[0].message)
    step()
    step()
    assert counting.calls == ["warm up"] * WARM_UP + ["record"] + ["step"] * 3
    assert int(counting.total) == WARM_UP + 3


def test_an_error_without_a_message_is_named_by_its_kind():
    def record():
        raise RuntimeError

    step = RecordedStep(lambda: None, warm_up=lambda: None, record=record)
    for _ in range(WARM_UP):
        step()
    with pytest.warns(RuntimeWarning, match=r"got: RuntimeError\. It runs"):
        step()


def test_a_mistake_in_the_step_is_not_hidden():
    def record():
        raise KeyError("a mistake")

    step = RecordedStep(lambda: None, warm_up=lambda: None, record=record)
    for _ in range(WARM_UP):
        step()
    with pytest.raises(KeyError, match="a mistake"):
        step()


# ---- the pass over full chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_a_fixed_chunk_is_the_network_whatever_the_length_and_gives_tensors_of_its_own(classifier, dtype):
    network = specialised(classifier).backbone.get_submodule("network").to(dtype)
    fixed = FixedChunk(network, torch.zeros((4, *SHAPE), dtype=dtype), classifier.feature_dim)
    generator = torch.Generator().manual_seed(0)
    for length in (4, 3, 5, 1, 4):
        pixels = torch.rand((length, *SHAPE), generator=generator).to(dtype)
        before = pixels.clone()
        found = fixed(pixels)
        assert torch.equal(found, network(pixels))
        assert torch.equal(pixels, before)
        kept = found.clone()
        fixed(torch.rand((length, *SHAPE), generator=generator).to(dtype))
        assert torch.equal(found, kept), "the next chunk must not overwrite the features of this one"


# ---- on a GPU


@needs_gpu
def test_a_gpu_replays_without_python():
    counting = Counting("cuda")
    step = graphed(counting.step, counting.total.device)
    for calls in range(1, 11):
        step()
        assert int(counting.total) == calls  # in the order of the caller's stream
    assert counting.calls == ["step"] * (WARM_UP + 1)


@needs_gpu
def test_a_gpu_goes_on_after_a_step_that_reads_on_the_host():
    counting = Counting("cuda")

    def step() -> None:
        if int(counting.total) >= 0:
            counting.step()

    careful = graphed(step, counting.total.device)
    with pytest.warns(RuntimeWarning, match="a CUDA graph can hold"):
        for _ in range(WARM_UP + 1):
            careful()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        careful()
    assert int(counting.total) == WARM_UP + 2
    another = Counting("cuda")  # a recording that failed does not stand in the way of the next
    recorded = graphed(another.step, another.total.device)
    for _ in range(WARM_UP + 2):
        recorded()
    assert (int(another.total), len(another.calls)) == (WARM_UP + 2, WARM_UP + 1)


@needs_gpu
@pytest.mark.parametrize("precision", Precision)
def test_a_gpu_replays_full_chunks(precision):
    classifier = Classifier.from_architecture("resnet18", image_shape=(3, 32, 32), seed=0, num_classes=7).to("cuda")
    backbone, chunk = TorchBackbone(specialised(classifier), precision), forward_batch_size((3, 32, 32))
    generator = torch.Generator().manual_seed(0)
    for length in [chunk] * (WARM_UP + 3) + [chunk - 1, chunk]:
        images = torch.randint(0, 256, (length, 3, 32, 32), generator=generator, dtype=torch.uint8).cuda()
        trigger = torch.randn((3, 32, 32), generator=generator).cuda()
        blend = {"image_weight": 0.3, "trigger_weight": 0.7, "clamp": True}
        found = backbone(images, trigger, **blend)
        halves = torch.cat([backbone(half, trigger, **blend) for half in images.split(chunk // 2)])  # not replayed
        assert float((found - halves).norm() / halves.norm()) < (0.03 if precision is Precision.BF16 else 0.005)
