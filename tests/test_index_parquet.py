import json
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.images import decode_image
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.parquet import ParquetSource
from tmm_engine.index.sources.records import ImageSource, is_reserved

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets in ../shared/data")


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 5, 6), dtype=np.uint8)


def png(seed: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels(seed).transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, columns: dict, *, features: dict | None = None, images: list | None = None) -> Path:
    n = len(next(iter(columns.values())))
    if images is None:
        images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(n)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


CLASSES = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "pets"
    write_parquet(folder / "train-00000-of-00002.parquet", {"label": [0, 1, 0], "n": [1, None, 3]}, features=CLASSES)
    write_parquet(folder / "train-00001-of-00002.parquet", {"label": [1], "n": [4]}, features=CLASSES)
    write_parquet(folder / "test-00000-of-00001.parquet", {"label": [1], "n": [5]}, features=CLASSES)
    return folder


def test_shards_of_a_split_are_one_sequence(shards):
    source = open_source(shards, split="train")
    assert isinstance(source, ParquetSource)
    assert isinstance(source, ImageSource)
    assert (source.name, source.class_names, source.labelled, len(source)) == ("pets (train)", ("cat", "dog"), True, 4)
    assert source.metadata_types == {"path": str, "n": int}
    records = list(source.read(source.natural_shape()))
    assert [r.id for r in records] == [f"train/{row:08d}" for row in range(4)]
    assert [r.label for r in records] == [0, 1, 0, 1]
    assert [r.metadata["n"] for r in records] == [1, None, 3, 4]
    assert [r.metadata["path"] for r in records] == ["0.png", "1.png", "2.png", "0.png"]
    for record, seed in zip(records, (0, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(record.image, pixels(seed))


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 99])
def test_a_limit_takes_the_first_rows(shards, limit):
    source = open_source(shards, split="train", limit=limit)
    ids = [r.id for r in source.read((3, 5, 6))]
    assert ids == [f"train/{row:08d}" for row in range(4)][:limit]
    assert len(source) == len(ids)


def test_splits_are_chosen_by_name(shards):
    with pytest.raises(InputError, match="expected one of the splits test, train, got none"):
        open_source(shards)
    with pytest.raises(InputError, match=r"did you mean 'train'"):
        open_source(shards, split="trian")
    assert [r.id for r in open_source(shards, split="test").read((3, 5, 6))] == ["test/00000000"]
    file = shards / "test-00000-of-00001.parquet"
    assert [r.id for r in open_source(file).read((3, 5, 6))] == ["test-00000-of-00001/00000000"]
    assert [r.id for r in open_source(file, split="test").read((3, 5, 6))] == ["test/00000000"]
    with pytest.raises(InputError, match="splits test, got 'train'"):
        open_source(file, split="train")


def test_columns_of_scalars_become_metadata_under_free_names(tmp_path):
    columns = {
        "id": [7, 8],
        "path": ["x", "y"],
        "source_id": [0.5, None],
        "flag": [True, None],
        "text": pa.array(["a", "b"]).dictionary_encode(),
        "vector": [[1, 2], [3]],
        "when": pa.array([0, 1], pa.timestamp("s")),
        "price": pa.array([Decimal("12.50"), None], pa.decimal128(4, 2)),
    }
    source = open_source(write_parquet(tmp_path / "a.parquet", columns))
    types = {"path": str, "source_id": int, "source_path": str, "source_source_id": float, "flag": bool, "text": str}
    types |= {"when": str, "price": float}
    assert source.remarks == (
        "images are the column 'image'; no column is taken for labels; another can be chosen (`label_column=…`): id, "
        "path, source_id, flag, text",
        "columns kept as text: when (timestamp[ms])",
        "columns kept as numbers: price (decimal128(4, 2))",
        "columns left out: vector (list<element: int64>)",
    )
    assert source.metadata_types == types
    assert not any(map(is_reserved, source.metadata_types))
    first, second = source.read((3, 5, 6))
    values = {"source_id": 7, "source_path": "x", "source_source_id": 0.5, "flag": True, "text": "a", "path": "0.png"}
    values |= {"when": "1970-01-01 00:00:00.000", "price": 12.5}
    assert first.metadata == values
    assert second.metadata["flag"] is None
    assert (first.label, source.labelled, source.class_names) == (None, False, None)


def test_another_class_label_column_is_found(tmp_path):
    features = {"digit": {"_type": "ClassLabel", "names": ["zero", "one"]}, "x": ["odd"]}
    source = open_source(write_parquet(tmp_path / "a.parquet", {"digit": [1, 0], "x": [1, 2]}, features=features))
    assert source.class_names == ("zero", "one")
    assert [(r.label, r.metadata["x"]) for r in source.read((3, 5, 6))] == [(1, 1), (0, 2)]


def test_null_images_are_unreadable_not_fatal(tmp_path):
    images = [None, {"bytes": None, "path": "far/away.png"}, {"bytes": b"junk", "path": None}]
    images.append({"bytes": png(3), "path": "3.png"})
    source = open_source(write_parquet(tmp_path / "a.parquet", {"n": [0, 1, 2, 3]}, images=images))
    assert source.natural_shape() == (3, 5, 6)
    *unreadable, readable = source.read((3, 5, 6))
    assert [u.id for u in unreadable] == ["a/00000000", "a/00000001", "a/00000002"]
    assert ["null" in u.reason for u in unreadable] == [True, True, False]
    np.testing.assert_array_equal(readable.image, pixels(3))


@pytest.mark.parametrize(("labels", "got"), [([0, -1], "-1"), ([0, 2], "2")])
def test_wrong_labels_are_found_before_any_image_is_read(tmp_path, labels, got):
    path = write_parquet(tmp_path / "a.parquet", {"label": labels}, features=CLASSES)
    with pytest.raises(InputError, match=rf"expected labels in 0\.\.1, got {got} in row 1 "):
        open_source(path)
    assert len(open_source(path, limit=1)) == 1


def test_unusable_parquet_says_why(tmp_path, shards):
    junk = tmp_path / "junk.parquet"
    junk.write_bytes(b"PAR1 this is not Parquet PAR1")
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"x": [1]}), plain)
    lists = write_parquet(tmp_path / "lists.parquet", {"x": [[1]]})
    empty = write_parquet(tmp_path / "empty.parquet", {"label": pa.array([], pa.int64())})
    write_parquet(shards / "train-00002-of-00003.parquet", {"label": [0]})
    cases = [
        (junk, None, "readable Parquet"),
        (plain, None, "expected one column struct"),
        (lists, None, "expected integers or names in the label column 'x'"),
        (empty, None, "at least one row"),
        (shards, "train", "same columns"),
        (tmp_path / "missing.parquet", None, "found none"),
    ]
    for path, split, message in cases:
        with pytest.raises(InputError, match=message):
            open_source(path, split=split, label_column="x" if path == lists else None)


@pytest.mark.parametrize(
    ("files", "split", "prefix"),
    [
        (
            ["train-00000-of-00002-b42a775f407cee45.parquet", "train-00001-of-00002-8b1d1f2a3c4d5e6f.parquet"],
            None,
            "train",
        ),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "train", "train"),
        (["0000.parquet", "0001.parquet"], None, "repo"),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "train", "train"),
        (["fine/train-00000-of-00001.parquet", "coarse/train-00000-of-00001.parquet"], "fine/train", "fine/train"),
        (["train/part-00000-7e2f.snappy.parquet", "valid/part-00000-1a2b.snappy.parquet"], "train", "train"),
        (["train.parquet", "test.parquet"], "train", "train"),
    ],
)
def test_layouts_of_shards(tmp_path, files, split, prefix):
    for number, name in enumerate(files):
        write_parquet(tmp_path / "repo" / name, {"label": [number]})
    source = open_source(tmp_path / "repo", split=split)
    ids = [f"{prefix}/{row:08d}" for row in range(len(files) if split is None else 1)]
    assert [record.id for record in source.read((3, 5, 6))] == ids
    if split is not None:
        with pytest.raises(InputError, match=r"one of the splits .*got none"):
            open_source(tmp_path / "repo")


def test_images_in_any_column_as_struct_or_bytes(tmp_path):
    rows = [{"bytes": png(0), "path": None}]
    for name, images in (("struct", rows), ("bare", [png(0)])):
        pq.write_table(pa.table({"pixels": images, "label": ["cat"]}), tmp_path / f"{name}.parquet")
        source = open_source(tmp_path / f"{name}.parquet")
        assert "images are the column 'pixels'" in source.remarks[0]
        [record] = source.read((3, 5, 6))
        np.testing.assert_array_equal(record.image, pixels(0))
    pq.write_table(pa.table({"front": [png(0)], "back": [png(1)]}), tmp_path / "two.parquet")
    with pytest.raises(InputError, match=r"several, front \(binary\), back \(binary\); say which .`image_column=…`"):
        open_source(tmp_path / "two.parquet")
    [record] = open_source(tmp_path / "two.parquet", image_column="back").read((3, 5, 6))
    np.testing.assert_array_equal(record.image, pixels(1))
    with pytest.raises(InputError, match="did you mean 'back'"):
        open_source(tmp_path / "two.parquet", image_column="bac")


def test_labels_of_every_kind(tmp_path):
    def labels(values, **options):
        source = open_source(write_parquet(tmp_path / "a.parquet", {"label": values}), **options)
        return source.class_names, [record.label for record in source.read((3, 5, 6))]

    assert labels(["dog", "cat", "dog"]) == (("cat", "dog"), [1, 0, 1])
    assert labels(["dog", "cat", "dog"], limit=1) == (("cat", "dog"), [1])
    assert labels(pa.array(["b", "a"]).dictionary_encode()) == (("a", "b"), [1, 0])
    assert labels([2.0, 0.0]) == (None, [2, 0])
    assert labels([True, False]) == (("False", "True"), [1, 0])
    assert labels([-1, -1]) == (None, [None, None])
    assert labels(pa.array([None, None], pa.string())) == (None, [None, None])
    assert labels(["a", None, "b", ""]) == (("a", "b"), [0, None, 1, None])
    assert labels([1, None, 0]) == (None, [1, None, 0])
    assert labels(["", ""]) == (None, [None, None])
    with pytest.raises(InputError, match="whole numbers or names"):
        labels([0.5, 1.0])


def test_columns_that_could_be_labels_are_listed_and_one_can_be_chosen(tmp_path):
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    columns = {"fine_label": [0, 1], "coarse_label": [1, 1]}
    path = write_parquet(tmp_path / "a.parquet", columns, features=dict.fromkeys(columns, names))
    with pytest.raises(InputError, match=r"several columns, fine_label \(int64\), coarse_label \(int64\)"):
        open_source(path)
    source = open_source(path, label_column="coarse_label")
    assert ([record.label for record in source.read((3, 5, 6))], source.metadata_types["fine_label"]) == ([1, 1], int)
    source = open_source(write_parquet(tmp_path / "b.parquet", {"labels": [0, 1]}))
    assert source.labelled
    assert "labels the column 'labels'" in source.remarks[0]
    (tmp_path / "c.png").write_bytes(png(0))
    with pytest.raises(InputError, match="only of a table"):
        open_source(tmp_path / "c.png", label_column="x")


def test_an_unreadable_shard_is_named_and_the_rest_goes_on(shards):
    (shards / "train-00000-of-00002.parquet").write_bytes(b"PAR1 no more")
    source = open_source(shards, split="train")
    assert len(source) == 2
    unreadable, record = source.read((3, 5, 6))
    assert (unreadable.id, record.id, record.label) == (
        "train-00000-of-00002.parquet",
        "train-00001-of-00002/00000000",
        1,
    )
    assert "expected readable Parquet" in unreadable.reason


def test_damage_inside_a_file_is_an_input_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(20))})
    content = bytearray(path.read_bytes())
    content[4:80] = b"\xff" * 76
    path.write_bytes(content)
    with pytest.raises(InputError, match="expected readable Parquet"):
        list(open_source(path).read((3, 5, 6)))


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "rows", "classes"),
    [
        ("cifar10", "train", 50_000, 10),
        ("cifar10", "test", 3_000, 10),
        ("gtsrb", "train", 19_605, 43),
        ("svhn", "test", 1_083, 10),
    ],
)
def test_the_real_parquet_sets_open_and_stream(name, split, rows, classes):
    full = open_source(DATA / name, split=split)
    assert (len(full), len(full.class_names), full.name) == (rows, classes, f"{name} ({split})")
    source = open_source(DATA / name, split=split, limit=600)
    assert source.natural_shape() == (3, 32, 32)
    records = list(source.read((3, 32, 32)))
    assert [r.id for r in records] == [f"{split}/{row:08d}" for row in range(600)]
    table = pq.read_table(sorted((DATA / name).glob(f"{split}-*"))[0]).slice(0, 600)
    assert [r.label for r in records] == table["label"].to_pylist()
    assert [r.metadata["path"] for r in records] == [row["path"] for row in table["image"].to_pylist()]
    np.testing.assert_array_equal(records[-1].image, decode_image(table["image"][-1].as_py()["bytes"]))
