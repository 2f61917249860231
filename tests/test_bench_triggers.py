"""Kept global triggers: the same answers with and without, nothing optimised twice, nothing mixed up."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.builders import tiny_arrays, tiny_classifier
from tmm_engine.bench.methods import Method
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.triggers import FOLDER, folder_beside, global_trigger, optimisation
from tmm_engine.index.errors import InputError
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.settings import GlobalRecipe, preset

QUICK = GlobalRecipe.of(preset("fast")).with_settings(["trigger.steps=3"])
METHODS = [Method.parse(f"fast,trigger_steps=3{more}") for more in ("", ",fusion=0", ",blend=added", ",seed=1")]


def make_suite(*, seed: int = 1, triggers: Path | None = None) -> Suite:
    images, labels = tiny_arrays(seed)
    return Suite.load(ArraySource(images, labels, name="tiny"), tiny_classifier(), exemplars=30, triggers=triggers)


def optimised() -> tuple[Progress, Callable[[], bool]]:
    """A progress, and whether it was told of an optimisation since it was last asked."""
    told: list[str] = []

    def asked() -> bool:
        found = "optimising the global trigger" in told
        told.clear()
        return found

    return lambda what, *_: told.append(what), asked


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return make_suite().store


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_answers_are_the_same_bytes_with_and_without(tmp_path: Path):
    query = (tiny_arrays(2)[0][0] / np.float32(255)).astype(np.float32)
    progress, asked = optimised()
    answers = []
    for triggers, expected in ((None, True), (tmp_path / FOLDER, True), (tmp_path / FOLDER, False)):
        retrievers = make_suite(triggers=triggers).retrievers(METHODS, progress=progress)
        assert asked() == expected
        answers.append([retriever.scores(query).tobytes() for retriever in retrievers])
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) == len(METHODS)
    assert len(files(tmp_path / FOLDER)) == 2  # of two seeds: neither blend nor fusion matters


@pytest.mark.parametrize("change", ["trigger_steps=4", "trigger_lr=0.1", "trigger_tolerance=0.5", "seed=3"])
def test_other_settings_have_a_trigger_of_their_own(store: MemoryStore, tmp_path: Path, change: str):
    progress, asked = optimised()
    global_trigger(store, tiny_classifier(), QUICK, folder=tmp_path, progress=progress)
    other = QUICK.with_settings([change])
    assert optimisation(other) != optimisation(QUICK)
    assert asked()
    global_trigger(store, tiny_classifier(), other, folder=tmp_path, progress=progress)
    assert asked()
    assert len(files(tmp_path)) == 2


def test_other_exemplars_and_classifiers_have_triggers_of_their_own(store: MemoryStore, tmp_path: Path):
    others = make_suite(seed=3).store
    found = [
        global_trigger(of, classifier, QUICK, folder=tmp_path).trigger
        for of, classifier in ((store, tiny_classifier()), (others, tiny_classifier()), (store, tiny_classifier(1)))
    ]
    assert len(files(tmp_path)) == 3
    for own, other in itertools.combinations(found, 2):
        assert not torch.equal(own, other)


@pytest.mark.parametrize("damage", [b"", b"no tensors", None], ids=["empty", "other", "cut off"])
def test_a_damaged_file_is_replaced(store: MemoryStore, tmp_path: Path, damage: bytes | None):
    progress, asked = optimised()
    found = global_trigger(store, tiny_classifier(), QUICK, folder=tmp_path)
    [path], before = tmp_path.iterdir(), files(tmp_path)
    path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    again = global_trigger(store, tiny_classifier(), QUICK, folder=tmp_path, progress=progress)
    assert asked()
    assert torch.equal(again.trigger, found.trigger)
    assert files(tmp_path) == before
    assert torch.equal(GlobalTrigger.load(path).trigger, found.trigger)


def test_without_a_folder_nothing_is_kept(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    global_trigger(store, tiny_classifier(), QUICK)
    make_suite().retrievers([Method.parse("l2"), Method.parse("paper")])
    assert files(tmp_path) == {}


def test_an_interrupted_write_leaves_nothing(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def torn(_: GlobalTrigger, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(GlobalTrigger, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            global_trigger(store, tiny_classifier(), QUICK, folder=tmp_path)
    assert files(tmp_path) == {}


def test_a_folder_that_cannot_be_written_is_named(store: MemoryStore, tmp_path: Path):
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(InputError, match=rf"cannot write .*{FOLDER}/.*choose another folder"):
        global_trigger(store, tiny_classifier(), QUICK, folder=tmp_path / FOLDER)


def test_the_folder_lies_beside_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert folder_beside(Path("r.jsonl")) == folder_beside(tmp_path / "r.jsonl") == tmp_path / FOLDER


def test_what_tells_triggers_apart_is_all_that_the_optimisation_looks_at(store: MemoryStore):
    """Blend, clamping, stretching and intensity leave τ as it is: a kept one serves them all."""
    plain = global_trigger(store, tiny_classifier(), QUICK).trigger
    for change in ("blend=added", "clamp=false", "stretch=false", "intensity=0.4"):
        other = QUICK.with_settings([change])
        assert torch.equal(global_trigger(store, tiny_classifier(), other).trigger, plain)
