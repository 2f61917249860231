"""Checkpoints: what is read, what is refused, and that nothing in a file ever runs."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tmm_engine.index.errors import ModelError
from tmm_engine.index.models.checkpoints import apply_state_dict, load_state_dict, read_metadata


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_both_formats_are_read_whatever_the_file_is_called(tmp_path, suffix):
    expected = small_model().state_dict()
    path = tmp_path / f"model{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(expected, path)
    assert_same(load_state_dict(path), expected)
    other_name = path.rename(tmp_path / "model.bin")
    assert_same(load_state_dict(other_name), expected)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_nested_checkpoints(tmp_path, key):
    expected = small_model().state_dict()
    torch.save({key: expected, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    assert_same(load_state_dict(tmp_path / "c.pt"), expected)
    torch.save({"model": {key: expected}, "epoch": 3}, tmp_path / "c.pt")
    assert_same(load_state_dict(tmp_path / "c.pt"), expected)


@given(prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3))
@settings(max_examples=10)
def test_wrapper_prefixes_are_removed(tmp_path_factory, prefixes):
    expected = small_model().state_dict()
    path = tmp_path_factory.mktemp("prefixes") / "c.safetensors"
    safetensors.torch.save_file({"".join(prefixes) + name: tensor for name, tensor in expected.items()}, path)
    assert_same(load_state_dict(path), expected)


def test_a_data_parallel_checkpoint(tmp_path):
    model = small_model()
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "c.pt")
    assert_same(load_state_dict(tmp_path / "c.pt"), model.state_dict())


def test_a_prefix_of_only_some_names_is_the_models_own(tmp_path):
    state = {"module.weight": torch.ones(2), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "c.pt")
    assert_same(load_state_dict(tmp_path / "c.pt"), state)


def test_a_model_whose_only_child_is_called_module(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = small_model()

    source, target = Wrapper(), Wrapper()
    torch.save(source.state_dict(), tmp_path / "c.pt")
    apply_state_dict(target, load_state_dict(tmp_path / "c.pt"))
    assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_becomes_float32_and_integers_stay(tmp_path, dtype):
    torch.save({"w": torch.tensor([1.5, -2.0], dtype=dtype), "n": torch.tensor(7)}, tmp_path / "c.pt")
    state = load_state_dict(tmp_path / "c.pt")
    assert state["w"].dtype == torch.float32
    assert state["w"].tolist() == [1.5, -2.0]
    assert state["n"].dtype == torch.int64


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickled_objects_are_refused_and_do_not_run(tmp_path, name, nested, plain_pickle):
    ran = tmp_path / "it-ran"
    content = {"state_dict": small_model().state_dict(), "extra": Canary(ran)} if nested else Canary(ran)
    path = tmp_path / name
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=r"pickled|safetensors"):
        load_state_dict(path)
    assert not ran.exists()
    torch.save(Canary(ran), tmp_path / "canary.pt")
    torch.load(tmp_path / "canary.pt", weights_only=False)
    assert ran.exists(), "the canary itself must work"


def test_a_pickled_module_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save(small_model(), tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"safetensors\.torch\.save_file"):
        load_state_dict(tmp_path / "c.pt")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model": {"model": {"model": {"model": {}}}}}])
def test_a_file_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError, match="dict of tensors"):
        load_state_dict(tmp_path / "c.pt")


@pytest.mark.parametrize("reader", [load_state_dict, read_metadata])
def test_missing_files_and_folders(tmp_path, reader):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(ModelError, match="check the path"):
            reader(path)


@given(cut=st.floats(0, 0.999), name=st.sampled_from(["c.safetensors", "c.pt"]))
@settings(max_examples=20)
def test_truncated_files(tmp_path_factory, cut, name):
    path = tmp_path_factory.mktemp("cut") / name
    state = {"w": torch.arange(100.0)}
    (safetensors.torch.save_file if name == "c.safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(ModelError, match=r"c\.(safetensors|pt)"):
        load_state_dict(path)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},  # more than the file holds
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},  # shape and size disagree
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
@pytest.mark.parametrize("reader", [load_state_dict, read_metadata])
def test_headers_that_lie(tmp_path, header, reader):
    text = json.dumps(header).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="complete safetensors file"):
        reader(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + text)
    with pytest.raises(ModelError, match="complete safetensors file"):
        reader(path)


def test_nan_and_infinity_are_named(tmp_path):
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")]), "huge": torch.tensor([float("inf")])}
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ModelError, match="NaN or infinity in bad, huge") as refusal:
        load_state_dict(tmp_path / "c.pt")
    assert "good" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are:UserWarning")  # what older versions of torch say
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(1 << 40), torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)],
    ids=["expanded", "sparse", "complex"],
)
def test_tensors_that_are_not_plain_arrays(tmp_path, tensor):
    torch.save({"w": tensor}, tmp_path / "c.pt")
    with pytest.raises(ModelError, match=r"dense.*: w"):
        load_state_dict(tmp_path / "c.pt")


def test_apply_lists_all_that_does_not_fit_and_changes_nothing():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["0.bias"]
    state["3.weight"] = torch.zeros(5, 16)
    state |= {f"extra{number:02}": torch.zeros(1) for number in range(14)}
    with pytest.raises(ModelError) as refusal:
        apply_state_dict(model, state)
    message = str(refusal.value)
    assert "missing: 0.bias;" in message
    assert "3.weight (expected (3, 16), got (5, 16))" in message
    assert "extra09 and 4 more" in message
    assert "extra10" not in message
    assert_same(model.state_dict(), before)


def test_apply_copies_and_tolerates_missing_batch_counters():
    source, target = small_model(), small_model()
    state = {name: tensor for name, tensor in source.state_dict().items() if "num_batches_tracked" not in name}
    apply_state_dict(target, state)
    for name, tensor in state.items():
        assert torch.equal(target.state_dict()[name], tensor)
        assert target.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_metadata(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "c.safetensors", metadata={"arch": "resnet18"})
    assert read_metadata(tmp_path / "c.safetensors") == {"arch": "resnet18"}
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "d.safetensors")
    assert read_metadata(tmp_path / "d.safetensors") == {}
    torch.save({"w": torch.ones(1)}, tmp_path / "c.pt")
    assert read_metadata(tmp_path / "c.pt") == {}
