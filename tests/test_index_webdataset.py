"""Tar shards of WebDataset as sources."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders import tiny_arrays
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageSource, UnreadableImage
from tmm_engine.index.sources.webdataset import WebDatasetSource

IMAGES = tiny_arrays(0, 6)[0]
SHAPE = (3, 8, 8)


def png(row: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(IMAGES[row].transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(row: int, label: str) -> dict[str, bytes]:
    about = {"page": row, "place": f"é{row}", "boxes": [[0, 1]]}
    files = {"png": png(row), "cls": label.encode(), "json": json.dumps(about).encode()}
    return {f"{row:04d}.{extension}": content for extension, content in files.items()}


@pytest.fixture
def shards(tmp_path):
    write_tar(tmp_path / "pets" / "train-0000.tar", sample(0, "dog") | sample(1, "cat") | sample(2, "dog"))
    write_tar(tmp_path / "pets" / "train-0001.tar", sample(3, "eel"))
    write_tar(tmp_path / "pets" / "valid-0000.tar", sample(4, "dog"))
    return tmp_path / "pets"


def test_shards_of_a_split_are_one_sequence(shards):
    source = open_source(shards, split="train")
    assert isinstance(source, WebDatasetSource)
    assert isinstance(source, ImageSource)
    assert (source.name, source.class_names, len(source)) == ("pets (train)", ("cat", "dog", "eel"), 4)
    assert source.metadata_types == {"page": int, "place": str}
    assert source.remarks == ("fields left out: boxes",)
    assert source.natural_shape() == SHAPE
    records = list(source.read(SHAPE))
    assert [record.id for record in records] == [*(f"train-0000/{row:04d}" for row in range(3)), "train-0001/0003"]
    assert [record.label for record in records] == [1, 0, 1, 2]
    assert records[3].metadata == {"page": 3, "place": "é3"}
    np.testing.assert_array_equal([record.image for record in records], IMAGES[:4])
    first = open_source(shards, split="train", limit=2)
    assert ([record.id[-1] for record in first.read(SHAPE)], len(first.class_names)) == (["0", "1"], 3)
    with pytest.raises(InputError, match="one of the splits train, valid, got none"):
        open_source(shards)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_labels_as_integers_in_one_file(tmp_path, name):
    source = open_source(
        write_tar(tmp_path / name, {f"./{k}": v for k, v in (sample(0, "7") | sample(1, "0")).items()})
    )
    assert (source.class_names, [record.label for record in source.read(SHAPE)]) == (None, [7, 0])
    assert [record.id for record in source.read(SHAPE)] == ["a/0000", "a/0001"]


def test_labels_in_json_and_none(tmp_path):
    files = {"0.jpg": png(0), "0.json": b'{"kind": "b", "n": 1}', "1.jpg": png(1), "1.json": b'{"kind": "a", "n": 2}'}
    path = write_tar(tmp_path / "a.tar", files)
    source = open_source(path)
    assert not source.labelled
    assert "no labels" in source.remarks[0]
    source = open_source(path, label_column="kind")
    assert (source.class_names, [record.label for record in source.read(SHAPE)]) == (("a", "b"), [1, 0])
    with pytest.raises(InputError, match="a field 'x' in the samples, got kind, n"):
        open_source(path, label_column="x")


def test_suffixes_in_capitals(tmp_path):
    source = open_source(write_tar(tmp_path / "a.tar", {"0.PNG": png(0), "0.CLS": b"cat", "0.JSON": b'{"page": 3}'}))
    [record] = source.read(SHAPE)
    assert (source.class_names, record.label, record.metadata) == (("cat",), 0, {"page": 3})


def test_one_of_several_images_is_chosen(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.left.png": png(0), "0.right.png": png(1), "0.cls": b"0"})
    with pytest.raises(InputError, match=r"one image in a sample, got left\.png, right\.png in 0"):
        open_source(path)
    [record] = open_source(path, image_column="right.png").read(SHAPE)
    np.testing.assert_array_equal(record.image, IMAGES[1])


def test_damage_is_named_and_the_rest_goes_on(shards):
    content = (shards / "train-0000.tar").read_bytes()
    (shards / "train-0000.tar").write_bytes(content[:700])
    source = open_source(shards, split="train")
    broken, record = source.read(SHAPE)
    assert isinstance(broken, UnreadableImage)
    assert (broken.id, broken.is_shard, record.id, len(source)) == ("train-0000.tar", True, "train-0001/0003", 2)
    (shards / "junk.tar").write_bytes(b"junk" * 200)
    with pytest.raises(InputError, match="a readable tar file"):
        open_source(shards / "junk.tar")
    with pytest.raises(InputError, match="found none"):
        open_source(write_tar(shards / "text.tar", {"0.txt": b"x"}))


def test_a_tar_file_beside_images_is_left_out(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(0))
    write_tar(tmp_path / "cat" / "backup.tar", sample(0, "x"))
    source = open_source(tmp_path)
    assert (source.class_names, source.remarks) == (("cat", "dog"), ("left out: 1 .tar",))
