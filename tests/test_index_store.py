"""The store in memory and the one on disk, held to the same promises; then what only the one on disk does."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.labels import Vocabulary
from tmm_engine.index.sources.records import is_reserved
from tmm_engine.index.store import lance_store
from tmm_engine.index.store.exemplars import ExemplarStore
from tmm_engine.index.store.lance_store import LanceStore, LanceWriter, exemplar_schema, fixed_size_column
from tmm_engine.index.store.memory import MemoryStore

KINDS = ("memory", "lance")
VALUES = {
    str: st.text(max_size=8),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}
COLUMNS = st.sampled_from(["global_feature", "stretched_feature", "another_feature", "x_feature"])


@dataclass
class Exemplars:
    """What goes into a store."""

    images: np.ndarray
    features: dict[str, np.ndarray]  # by column
    labels: np.ndarray
    predicted: np.ndarray
    ids: list[str]
    types: dict[str, type]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dims(self) -> dict[str, int]:
        return {name: features.shape[1] for name, features in self.features.items()}

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return [{name: values[row] for name, values in self.columns.items()} for row in range(len(self))]


def some(
    n: int = 10, *, shape=(3, 2, 4), dims=MappingProxyType({"feature": 5}), seed: int = 0, types=None, columns=None
) -> Exemplars:
    rng = np.random.default_rng(seed)
    return Exemplars(
        images=rng.integers(0, 256, (n, *shape), dtype=np.uint8),
        features={
            name: (rng.normal(size=(n, d)) * 10.0 ** rng.integers(-30, 30, (n, d))).astype(np.float32)
            for name, d in dims.items()
        },
        labels=rng.integers(0, 1000, n),
        predicted=rng.random(n) < 0.5,
        ids=[f"exemplar {number}" for number in rng.permutation(n)],
        types=types or {},
        columns=columns or {},
    )


@st.composite
def exemplars(draw: st.DrawFn) -> Exemplars:
    n = draw(st.integers(1, 30))
    # Lance refuses dots, backticks, NUL and its own `_row…` in the names of columns.
    names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=".`\0"), min_size=1, max_size=6)
    free = names.filter(lambda name: not is_reserved(name))
    types = draw(st.dictionaries(free, st.sampled_from([str, int, float, bool]), max_size=4))
    columns = {name: draw(st.lists(st.none() | VALUES[kind], min_size=n, max_size=n)) for name, kind in types.items()}
    result = some(
        n,
        shape=(draw(st.sampled_from([1, 3])), draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        dims={"feature": draw(st.integers(1, 9))} | draw(st.dictionaries(COLUMNS, st.integers(1, 9), max_size=3)),
        seed=draw(st.integers(0, 2**32 - 1)),
        types=types,
        columns=columns,
    )
    result.ids = draw(st.lists(st.text(max_size=5), min_size=n, max_size=n, unique=True))
    return result


def written(path: Path, content: Exemplars, *, batch: int = 4) -> LanceWriter:
    """A writer that was given the exemplars in batches, before its commit."""
    schema = exemplar_schema(content.images.shape[1:], content.dims, content.types)
    writer = LanceWriter(path, schema, Vocabulary(tuple(map(str, range(1000)))))
    for rows in (slice(start, start + batch) for start in range(0, len(content), batch)):
        given = {
            "id": content.ids[rows],
            "label": content.labels[rows],
            "label_is_predicted": content.predicted[rows],
            "predicted": content.labels[rows],
            "image": fixed_size_column(content.images[rows]),
        } | {name: fixed_size_column(features[rows]) for name, features in content.features.items()}
        writer.write(given | {name: values[rows] for name, values in content.columns.items()})
    return writer


def write(path: Path, content: Exemplars, *, batch: int = 4) -> int:
    """Store the exemplars in batches; returns the version."""
    return written(path, content, batch=batch).commit()


def read(path: Path, content: Exemplars, version: int) -> LanceStore:
    return LanceStore(path, image_shape=content.images.shape[1:], columns=content.dims, version=version)


@contextmanager
def stored(kind: str, content: Exemplars, *, batch: int = 4) -> Iterator[ExemplarStore]:
    """The exemplars in a store; on disk in many small fragments."""
    if kind == "memory":
        yield MemoryStore(
            content.images,
            content.features,
            content.labels,
            ids=content.ids,
            label_is_predicted=content.predicted,
            metadata=content.metadata if content.columns else None,
        )
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance_store, "FRAGMENT_BYTES", 256)
        path = Path(folder) / "exemplars.lance"
        yield read(path, content, write(path, content, batch=batch))


# ---- both stores


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(content=exemplars(), data=st.data())
def test_what_goes_in_comes_out(kind, content, data):
    n = len(content)
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)), dtype=np.int64)
    size = data.draw(st.integers(1, n + 2))
    with stored(kind, content, batch=data.draw(st.integers(1, n))) as store:
        assert len(store) == n
        assert (store.image_shape, store.feature_dim) == (content.images.shape[1:], content.dims["feature"])
        assert store.feature_columns == content.dims
        assert store.ids.tolist() == content.ids
        np.testing.assert_array_equal(store.labels, content.labels)
        np.testing.assert_array_equal(store.label_is_predicted, content.predicted)
        np.testing.assert_array_equal(store.images(rows), content.images[rows])
        assert store.metadata(rows) == [content.metadata[row] for row in rows]
        np.testing.assert_array_equal(store.features(rows), content.features["feature"][rows])
        scanned = [(store.scan_images(size), content.images), (store.scan_features(size), content.features["feature"])]
        for name, features in content.features.items():
            scanned.append((store.scan_features(size, column=name), features))
            np.testing.assert_array_equal(store.features(rows, column=name), features[rows])
        for scan, column in scanned:
            batches = list(scan)
            assert all(1 <= len(batch) <= size for batch in batches)
            np.testing.assert_array_equal(np.concatenate(batches), column, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scan_equals_taking_all_rows(kind):
    with stored(kind, some(50)) as store:
        rows = np.arange(50)
        np.testing.assert_array_equal(np.concatenate(list(store.scan_images(7))), store.images(rows), strict=True)
        np.testing.assert_array_equal(np.concatenate(list(store.scan_features(7))), store.features(rows), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_taking_no_rows_gives_empty_arrays(kind):
    with stored(kind, some(types={"m": int}, columns={"m": list(range(10))})) as store:
        none = np.array([], dtype=np.int64)
        assert store.images(none).shape == (0, 3, 2, 4)
        assert store.features(none).shape == (0, 5)
        assert store.metadata(none) == []


@pytest.mark.parametrize("kind", KINDS)
def test_taking_a_row_that_is_not_there_fails(kind):
    with stored(kind, some()) as store, pytest.raises((IndexError, IndexStateError)):
        store.images(np.array([0, 10]))


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_handed_out_is_the_callers_own(kind):
    with stored(kind, some(types={"m": str}, columns={"m": ["x"] * 10})) as store:
        row = np.array([3])
        store.metadata(row)[0]["m"] = "changed"
        assert store.metadata(row) == [{"m": "x"}]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_metadata_stays_nan_and_is_not_null(kind):
    with stored(kind, some(2, types={"m": float}, columns={"m": [float("nan"), None]})) as store:
        nan, null = store.metadata(np.arange(2))
        assert nan["m"] != nan["m"]
        assert null["m"] is None


# ---- in memory


@pytest.mark.parametrize("name", ["ids", "metadata"])
def test_memory_columns_of_another_length_are_refused(name):
    content = some()
    columns: dict[str, Any] = {"ids": content.ids, "metadata": content.metadata}
    columns[name] = columns[name][:9]
    with pytest.raises(InputError, match=f"expected 10 {name}, one per image, got 9"):
        MemoryStore(content.images, content.features, content.labels, **columns)


def test_memory_ids_must_be_unique():
    content = some(2)
    with pytest.raises(InputError, match="unique"):
        MemoryStore(content.images, content.features, content.labels, ids=["same", "same"])


def test_memory_needs_the_plain_feature():
    content = some(2, dims={"another_feature": 3})
    with pytest.raises(InputError, match="expected a column 'feature' among the features, got another_feature"):
        MemoryStore(content.images, content.features, content.labels, ids=content.ids)


# ---- on disk


def test_small_fragments_are_written_as_they_fill(tmp_path, monkeypatch):
    content = some(100)
    row_bytes = 3 * 2 * 4 + 4 * 5
    monkeypatch.setattr(lance_store, "FRAGMENT_BYTES", 10 * row_bytes)
    store = read(tmp_path / "x", content, write(tmp_path / "x", content, batch=5))
    assert len(list((tmp_path / "x" / "data").iterdir())) == 10
    rows = np.random.default_rng(1).integers(0, 100, 300)
    np.testing.assert_array_equal(store.images(rows), content.images[rows])


def test_nothing_can_be_read_before_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(lance_store, "FRAGMENT_BYTES", 256)
    content = some()
    writer = written(tmp_path / "x", content)
    writer.finish()
    assert list((tmp_path / "x" / "data").iterdir()), "all is on disk"
    with pytest.raises(IndexStateError, match="cannot be read"):
        read(tmp_path / "x", content, 1)
    assert read(tmp_path / "x", content, writer.commit()).ids.tolist() == content.ids


def test_a_reader_keeps_its_version(tmp_path):
    old, new = some(seed=1), some(20, seed=2)
    first = write(tmp_path / "x", old)
    reader = read(tmp_path / "x", old, first)
    second = write(tmp_path / "x", new)
    assert second != first
    for store, content in (
        (reader, old),
        (read(tmp_path / "x", old, first), old),
        (read(tmp_path / "x", new, second), new),
    ):
        assert store.ids.tolist() == content.ids
        np.testing.assert_array_equal(np.concatenate(list(store.scan_images(100))), content.images)


@pytest.mark.parametrize("version", [0, 2, 2**40, 2**80, -1])
def test_a_version_that_is_not_there(tmp_path, version):
    content = some()
    write(tmp_path / "x", content)
    with pytest.raises(IndexStateError, match="build the index again"):
        read(tmp_path / "x", content, version)


@pytest.mark.parametrize(
    ("shape", "d"), [((3, 2, 5), 5), ((3, 2, 4), 6), ((1, 24, 2**31), 5), ((10**20, 10**20, 1), 5), ((3, 2, 4), 10**20)]
)
def test_exemplars_of_another_shape_are_refused(tmp_path, shape, d):
    version = write(tmp_path / "x", some())
    with pytest.raises(IndexStateError, match="build the index again"):
        LanceStore(tmp_path / "x", image_shape=shape, columns={"feature": d}, version=version)


def test_a_column_of_features_that_is_not_there(tmp_path):
    version = write(tmp_path / "x", some())
    with pytest.raises(IndexStateError, match="build the index again"):
        read(tmp_path / "x", some(dims={"feature": 5, "another_feature": 5}), version)


@pytest.mark.parametrize("part", ["data", "_versions"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_data_set_is_refused(tmp_path, part, damage):
    content = some()
    version = write(tmp_path / "x", content)
    file = next(path for path in (tmp_path / "x" / part).iterdir() if path.suffix in (".lance", ".manifest"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else -20])
    with pytest.raises(IndexStateError, match="build the index again"):
        read(tmp_path / "x", content, version)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(IndexStateError, match="cannot be read"):
        read(tmp_path / "x", some(), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "value"), [(int, 2**63), (int, "three"), (str, 3), (str, "\udcff"), (bool, "yes"), (float, "1.5")]
)
def test_a_value_that_its_column_cannot_hold_names_the_column(tmp_path, kind, value):
    with pytest.raises(InputError, match=r"expected .* in column 'note'"):
        write(tmp_path / "x", some(1, types={"note": kind}, columns={"note": [value]}))


@pytest.mark.parametrize("name", ["with space", "a#b?c", "100%20", "a:b", "é日本", "s3:", "a*[b]", "-x"])
def test_folders_of_any_name(tmp_path, name):
    content = some()
    path = tmp_path / name / "exemplars.lance"
    path.parent.mkdir()
    version = write(path, content)
    shutil.move(path.parent, tmp_path / f"{name} moved")
    store = read(tmp_path / f"{name} moved" / "exemplars.lance", content, version)
    np.testing.assert_array_equal(store.images(np.arange(10)), content.images)
