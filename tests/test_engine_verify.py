"""`verify` finds what is wrong and says what repairs it; `repair` does, and leaves images alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import opened, tiny_arrays
from tests.conftest import classifier_of, network
from tests.test_engine_cli import run
from tmm_engine import Engine
from tmm_engine.index import ArraySource, IndexStateError
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, delete_exemplars
from tmm_engine.index.store.manifest import CACHE, EXEMPLARS, MANIFEST, MODEL, VERSIONS, Manifest, data_files, digest_of
from tmm_engine.index.types import ImageShape
from tmm_engine.rerank import GlobalRecipe
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE, global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.verify import REPAIR, repair_index, verify_index

CLASSIFIER = classifier_of(network())
N = 40
FEATURES = (FEATURE, GLOBAL_FEATURE, STRETCHED_FEATURE)
IMAGES, LABELS = tiny_arrays(1, N)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions, a global trigger, a FAISS cache."""
    path = tmp_path_factory.mktemp("verify") / "idx"
    source = ArraySource(IMAGES[:30], LABELS[:30], ids=[f"id {n}" for n in range(30)], metadata={"n": list(range(30))})
    recipe = GlobalRecipe().with_settings(["trigger.steps=5"])
    columns = global_columns(make_global_trigger(source, CLASSIFIER, recipe), CLASSIFIER)
    write_index(source, path, CLASSIFIER, columns=columns, neighbours="HNSW8")
    more = ArraySource(IMAGES[30:], LABELS[30:], ids=[f"id {n}" for n in range(30, N)])
    add_exemplars(path, more, CLASSIFIER)
    delete_exemplars(path, ids=["id 4"])
    with Engine.open(path, model=network(), device="cpu") as engine:
        engine.search(IMAGES[0], mode="l2")
    assert list((path / CACHE).glob("*.faiss"))
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "idx"))


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 8
    path.write_bytes(raw)


def position_of(path: Path, values: np.ndarray) -> int:
    """Where an array's bytes are in a file."""
    found = path.read_bytes().find(np.ascontiguousarray(values).tobytes())
    assert found >= 0
    return found


def data_file(index: Path, values: np.ndarray) -> Path:
    files = (index / EXEMPLARS / "data").iterdir()
    return next(path for path in files if np.ascontiguousarray(values).tobytes() in path.read_bytes())


def test_a_sound_index_has_no_findings(index):
    before = {name: digest_of(index / name) for name in data_files(index)}
    done = verify_index(index, model=network())
    assert (done.findings, done.notes, done.sound) == ([], [], True)
    assert (done.exemplars, done.recomputed) == (N - 1, N - 1)
    assert done.files == len(before)
    assert repair_index(index, model=network()) == []
    assert {name: digest_of(index / name) for name in data_files(index)} == before


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_every_damaged_file_is_found(index, how):
    for path in sorted(path for path in index.rglob("*") if path.is_file()):
        raw, name = path.read_bytes(), path.relative_to(index).as_posix()
        if name.startswith(CACHE) and path.suffix == ".json":
            continue  # it says what the cache is of; searches then ignore the cache
        if how == "flipped":
            flip(path, len(raw) // 2)
        elif how == "cut":
            path.write_bytes(raw[:-1])
        else:
            path.unlink()
        if name == MANIFEST and how == "missing":
            done = None
            with pytest.raises(IndexStateError):
                verify_index(index, model=network())
        elif not (name.startswith((VERSIONS, CACHE)) and how == "missing"):
            done = verify_index(index, model=network())
            assert done.findings, name
            needed = name == MANIFEST or name in Manifest.read(index).files
            assert done.sound == (not needed), name
            assert path.name.removesuffix(".json") in str(done.findings), name
        path.write_bytes(raw)
    assert verify_index(index, model=network()).findings == []


@pytest.mark.parametrize("column", FEATURES)
def test_a_feature_that_was_damaged_is_computed_again(index, column):
    store = opened(index)[1]
    row, rows = np.array([7]), np.arange(N - 1)
    images, features = store.images(rows), {each: store.features(rows, column=each) for each in FEATURES}
    damaged = store.features(row, column=column)
    flip(data_file(index, damaged), position_of(data_file(index, damaged), damaged) + 6)
    assert (store.features(row, column=column) != damaged).any()
    done = verify_index(index, model=network())
    assert [finding.remedy for finding in done.findings] == [REPAIR]
    assert any("features of 39 exemplars" in line for line in repair_index(index, model=network()))
    assert verify_index(index, model=network()).sound
    manifest, store = opened(index)
    assert manifest.version == 4
    np.testing.assert_array_equal(store.images(rows), images)
    for each in FEATURES:
        np.testing.assert_allclose(store.features(rows, column=each), features[each], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("column", [GLOBAL_FEATURE, STRETCHED_FEATURE])
def test_a_column_that_is_not_of_its_images_is_found_though_every_digest_fits(tmp_path, column, monkeypatch):
    source = ArraySource(IMAGES[:20], LABELS[:20])
    trigger = make_global_trigger(source, CLASSIFIER, GlobalRecipe().with_settings(["trigger.steps=5"]))
    columns = global_columns(trigger, CLASSIFIER)
    wrong = next(each for each in columns if each.name == column)
    right = wrong.compute
    monkeypatch.setattr(wrong, "compute", lambda images: right(images) + np.float32(0.5))
    write_index(source, tmp_path / "idx", CLASSIFIER, columns=columns)
    done = verify_index(tmp_path / "idx", model=network())
    assert len(done.findings) == 20
    assert all(f"the column '{column}'" in finding.what for finding in done.findings)
    repair_index(tmp_path / "idx", model=network())
    assert verify_index(tmp_path / "idx", model=network()).findings == []


def test_a_damaged_image_is_named_and_never_covered_up(index):
    image = IMAGES[11]
    path = data_file(index, image)
    flip(path, position_of(path, image) + 3)
    damaged = path.read_bytes()
    assert not verify_index(index, model=network()).sound
    with pytest.raises(IndexStateError, match="'id 11'"):
        repair_index(index, model=network())
    assert path.read_bytes() == damaged
    assert Manifest.read(index).version == 3
    delete_exemplars(index, ids=["id 11"])
    repair_index(index, model=network())
    assert verify_index(index, model=network()).sound
    assert len(opened(index)[1]) == N - 2


def test_features_of_another_model_are_found_though_every_digest_fits(tmp_path, monkeypatch):
    source = ArraySource(IMAGES[:20], LABELS[:20])
    with monkeypatch.context() as patch:
        patch.setattr(
            "tmm_engine.index.columns.embed", lambda images, classifier: np.ones((len(images), 12), np.float32)
        )
        write_index(source, tmp_path / "idx", CLASSIFIER)
    done = verify_index(tmp_path / "idx", model=network())
    assert not done.sound
    assert "is not what its image gives" in done.findings[0].what
    repair_index(tmp_path / "idx", model=network())
    assert verify_index(tmp_path / "idx", model=network()).findings == []


class Twice(ArraySource):
    """Ids that repeat: a source of somebody else's may."""

    def read(self, shape: ImageShape) -> Any:
        for record in super().read(shape):
            yield ImageRecord(record.id[:-1], record.image, record.label, record.metadata)


def test_ids_that_are_there_twice_are_found(tmp_path, monkeypatch):
    """As in an index of another program, for `build_index` refuses them."""
    with monkeypatch.context() as patched:
        patched.setattr("tmm_engine.index.store.embedding._check_new", lambda record, seen: None)
        write_index(Twice(IMAGES[:4], LABELS[:4], ids=["aa", "ab", "ba", "ca"]), tmp_path / "idx", CLASSIFIER)
    [finding] = verify_index(tmp_path / "idx", model=network()).findings
    assert "1 ids are there more than once" in finding.what


def test_caches_and_leftovers_are_harmless_and_repaired(index):
    [cache] = (index / CACHE).glob("*.faiss")
    flip(cache, 100)
    left = index / EXEMPLARS / "data" / "left.lance"
    left.write_bytes(b"half")
    (index / ".writing-x").write_bytes(b"half")
    (index / VERSIONS / "1.json").write_text("{")
    done = verify_index(index, model=network())
    assert done.sound
    assert len(done.findings) == 2  # while a version is unknown, nobody knows what it needs
    said = "\n".join(repair_index(index, model=network()))
    assert "forgot version 1" in said
    assert f"removed {left}" in said
    assert f"removed {cache}" in said
    assert verify_index(index, model=network()).findings == []
    assert not left.exists()


def test_what_cannot_be_rebuilt_is_an_error(index):
    flip(index / MODEL, 5000)
    with pytest.raises(IndexStateError, match=r"restore it from a copy.*Nothing was changed"):
        repair_index(index, model=network())
    flip(index / MANIFEST, 300)
    with pytest.raises(IndexStateError, match=r"index\.json"):
        repair_index(index, model=network())


def test_without_the_users_code_features_are_not_looked_at_and_it_says_so(index):
    done = verify_index(index)
    assert done.sound
    assert (done.recomputed, len(done.notes)) == (0, 1)
    assert "pass it as model" in done.notes[0]


def test_commands(index, monkeypatch, tmp_path):
    (tmp_path / "my_net_for_verify.py").write_text("from tests.conftest import network\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = ("--model", "my_net_for_verify:network")
    for options, computed in (((), 0), (model, N - 1), ((*model, "--sample", 5), 5)):
        sound = run("verify", index, *options)
        assert (sound.exit_code, "is sound" in sound.stdout) == (0, True)
        assert f"{computed} computed again" in sound.stdout
    damaged = opened(index)[1].features(np.array([7]))
    flip(data_file(index, damaged), position_of(data_file(index, damaged), damaged) + 6)
    found = run("verify", index, *model, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout.splitlines()[0])["harmless"] is False
    assert "is damaged, see above" in found.stderr
    repaired = run("repair", index, *model)
    assert repaired.exit_code == 0, repaired.stderr
    assert run("verify", index, *model).exit_code == 0
    assert run("verify", tmp_path).exit_code == 1
    assert "is not an index" in run("repair", tmp_path).stderr
