import gzip
import hashlib
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, SVHN

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.datasets import TorchvisionSource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.images import decode_image
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource, UnreadableImage
from tmm_engine.index.sources.shapes import common_shape

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets in ../shared/data")
RNG = np.random.default_rng(0)


def image(seed: int, *, size: tuple[int, int] = (6, 5)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def saved(path: Path, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed, **options).save(path)
    return path


def pixels(seed: int) -> np.ndarray:
    return decode_image(image(seed))


# --- folders ---


@pytest.fixture
def class_folders(tmp_path):
    folder = tmp_path / "animals"
    for name, seed in {
        "dog/b.png": 3,
        "cat/2.PNG": 1,
        "cat/10.png": 0,
        "cat/deep/a.bmp": 2,
        ".hidden/x.png": 9,
    }.items():
        saved(folder / name, seed)
    (folder / "dog" / "notes.txt").write_text("not an image")
    saved(folder / "dog" / ".thumbnail.png")
    (folder / "notes.md").touch()
    return folder


def test_class_folders_are_read_in_order_with_labels_and_paths(class_folders):
    source = open_source(str(class_folders))
    assert isinstance(source, FolderSource)
    assert isinstance(source, ImageSource)
    assert (source.class_names, source.labelled, len(source)) == (("cat", "dog"), True, 4)
    assert source.metadata_types == {"path": str}
    assert source.natural_shape() == (3, 5, 6)
    records = list(source.read((3, 5, 6)))
    assert [(r.id, r.label) for r in records] == [
        ("cat/10.png", 0),
        ("cat/2.PNG", 0),
        ("cat/deep/a.bmp", 0),
        ("dog/b.png", 1),
    ]
    for seed, record in enumerate(records):
        np.testing.assert_array_equal(record.image, pixels(seed))
        assert record.metadata == {"path": str(class_folders / record.id)}
    assert [r.id for r in open_source(class_folders, limit=2).read((3, 5, 6))] == ["cat/10.png", "cat/2.PNG"]


def test_flat_folders_and_single_files_have_no_labels(tmp_path):
    for name in ("b.png", "a.png", "c.jpg"):
        saved(tmp_path / name)
    (tmp_path / "empty").mkdir()
    flat, single = open_source(tmp_path), open_source(tmp_path / "b.png")
    assert [r.id for r in flat.read((3, 4, 4))] == ["a.png", "b.png", "c.jpg"]
    assert [r.id for r in single.read((3, 4, 4))] == ["b.png"]
    for source in (flat, single):
        assert (source.class_names, source.labelled) == (None, False)
        assert all(r.label is None and r.image.shape == (3, 4, 4) for r in source.read((3, 4, 4)))


def test_an_unreadable_file_keeps_its_place(class_folders):
    path = class_folders / "cat" / "2.PNG"
    path.write_bytes(path.read_bytes()[:60])
    first, second, third, _ = open_source(class_folders).read((3, 5, 6))
    assert isinstance(second, UnreadableImage)
    assert second.id == "cat/2.PNG"
    assert str(path) in second.reason
    assert isinstance(first, ImageRecord)
    assert isinstance(third, ImageRecord)


def test_the_natural_shape_is_of_the_first_readable_image_and_capped(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match="at least one readable image"):
        open_source(tmp_path).natural_shape()
    saved(tmp_path / "b.png", size=(224, 10))
    assert open_source(tmp_path).natural_shape() == (3, 10, 224)
    saved(tmp_path / "a.png", size=(225, 10))
    assert open_source(tmp_path).natural_shape() == (3, 224, 224)


def test_unusable_folders_say_why(tmp_path, class_folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").touch()
    saved(tmp_path / "mixed" / "top.png")
    saved(tmp_path / "mixed" / "cat" / "a.png")
    saved(tmp_path / "splits" / "train" / "cat" / "a.png")
    saved(tmp_path / "splits" / "test" / "cat" / "a.png")
    cases = {
        "empty": "found none",
        "note.txt": "found none",
        "mixed": "got both",
        "splits": "open one of them",
        "missing": "expected a path or a data set",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / name)


def test_what_is_left_out_is_counted_and_said(class_folders):
    assert open_source(class_folders).remarks == ("left out: 2 hidden, 1 .md, 1 .txt",)
    saved(class_folders / "__MACOSX" / "cat" / "._10.png")
    (class_folders / "horse").mkdir()
    (class_folders / "dog" / "c.HEIC").write_bytes(b"ftypheic")
    (class_folders / "dog" / "link.png").symlink_to("nowhere.png")
    (class_folders / "dog" / "round").symlink_to(class_folders)
    source = open_source(class_folders)
    assert (source.class_names, len(source)) == (("cat", "dog", "horse"), 6)
    assert source.remarks == (
        "formats that are not read: 1 .heic; convert these images to PNG or JPEG",
        "folders without images that can be read: horse (each is a class all the same)",
        "left out: 2 hidden, 1 folder __MACOSX, 1 .md, 1 .txt, 1 circular link",
    )
    unreadable = [r.id for r in source.read((3, 5, 6)) if isinstance(r, UnreadableImage)]
    assert unreadable == ["dog/c.HEIC", "dog/link.png"]


def test_a_flat_folder_with_unread_pictures_and_empty_folders(tmp_path):
    saved(tmp_path / "a.jfif")
    (tmp_path / "b.avif").touch()
    (tmp_path / "empty").mkdir()
    source = open_source(tmp_path)
    assert (source.class_names, len(source)) == (None, 2)
    assert [remark.partition(":")[0] for remark in source.remarks] == [
        "formats that are not read",
        "folders without images that can be read",
    ]
    (tmp_path / "a.jfif").unlink()
    with pytest.raises(InputError, match=r"found none but 1 \.avif"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "valid"), ("train", "valid")),
        (("Training", "dev", "eval"), ("Training", "dev", "eval")),
        (("test_set", "training_set"), ("test_set", "training_set")),
        (("annotations", "train2017", "val2017"), ("train2017", "val2017")),
        (("test",), ("test",)),
        (("bus", "car", "train"), ()),
        (("evaluator", "trainer"), ()),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, names, splits):
    for seed, name in enumerate(names):
        saved(tmp_path / name / "cat" / "a.png", seed)
    if not splits:
        assert open_source(tmp_path).class_names == names
        with pytest.raises(InputError, match="no splits"):
            open_source(tmp_path, split=names[0])
        return
    with pytest.raises(InputError, match=f"open one of them .{', '.join(splits)}"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="did you mean"):
        open_source(tmp_path, split=splits[-1] + "x")
    source = open_source(tmp_path, split=splits[-1])
    assert (source.class_names, source.name) == (("cat",), str(tmp_path / splits[-1]))
    [record] = source.read((3, 5, 6))
    assert record.id == "cat/a.png"
    np.testing.assert_array_equal(record.image, pixels(names.index(splits[-1])))


def test_a_folder_that_cannot_be_listed_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="a folder that can be listed"):
        FolderSource(tmp_path / "missing")


@pytest.mark.parametrize("where", ["cat", "train/cat", "."])
def test_archives_and_tables_beside_images_do_not_take_their_place(tmp_path, where):
    saved(tmp_path / where / "1.png")
    saved(tmp_path / where / "2.png")
    with tarfile.open(tmp_path / "backup.tar", "w") as tar:
        tar.add(tmp_path / where / "1.png", "old/1.png")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "notes.parquet")
    source = open_source(tmp_path, split="train" if where.startswith("train") else None)
    assert (type(source), len(source)) == (FolderSource, 2)
    assert any("1 .tar" in remark and "1 .parquet" in remark for remark in source.remarks)


def test_metadata_in_parquet(tmp_path):
    saved(tmp_path / "cat" / "1.png")
    pq.write_table(pa.table({"file_name": ["cat/1.png"], "page": [7]}), tmp_path / "metadata.parquet")
    source = open_source(tmp_path)
    assert source.class_names == ("cat",)
    assert [record.metadata["page"] for record in source.read((3, 6, 5))] == [7]
    assert source.remarks == ()
    (tmp_path / "metadata.csv").write_text("file_name,page\ncat/1.png,7\n")
    with pytest.raises(InputError, match=r"one table of metadata, got metadata\.csv and metadata\.parquet; keep one"):
        open_source(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="expected readable Parquet"):
        open_source(tmp_path)


def test_one_folder_around_the_class_folders_is_no_class(tmp_path):
    for name in ("photos/cat/1.png", "photos/dog/1.png", "__MACOSX/._x.png"):
        saved(tmp_path / name)
    with pytest.raises(InputError, match=rf"only folders \(cat, dog\); open {tmp_path / 'photos'}, or"):
        open_source(tmp_path)
    assert open_source(tmp_path / "photos").class_names == ("cat", "dog")
    saved(tmp_path / "photos" / "own.png")
    assert open_source(tmp_path).class_names == ("photos",)


def test_what_lies_beside_a_split_is_said(tmp_path):
    for name in ("train/cat/1.png", "test/cat/1.png", "bus/1.png", "cover.png"):
        saved(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,page\ntrain/cat/1.png,3\n")
    remark = "only the folder of the split 'train' is read; left out beside it: bus, 1 image, 1 .csv"
    assert open_source(tmp_path, split="train").remarks == (remark,)


def test_one_odd_image_does_not_decide_for_all(tmp_path):
    saved(tmp_path / "a.png", size=(1, 1))
    for name in ("b.png", "c.png"):
        saved(tmp_path / name, size=(6, 5))
    source = open_source(tmp_path)
    assert source.natural_shape() == (3, 5, 6)
    [remark] = source.remarks
    assert "the first 3 images are 1×1 to 5×6 (height × width); the commonest is taken: 5×6, coloured" in remark
    same = open_source(saved(tmp_path / "same" / "d.png"))
    assert (same.natural_shape(), same.remarks) == ((3, 5, 6), ())


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(1, 8, 8), (3, 8, 8), (3, 8, 8)], (3, 8, 8)),
        ([(3, 8, 8), (3, 9, 9)], (3, 8, 8)),
        ([(3, 480, 640), (3, 640, 480), (3, 10, 10)], (3, 224, 224)),
        ([(3, 10, 40), (3, 20, 30), (3, 30, 20), (3, 40, 10), (3, 41, 9)], (3, 30, 20)),
    ],
)
def test_the_commonest_shape_is_taken_else_the_median(shapes, expected):
    assert common_shape(shapes) == expected


def test_what_is_assumed_of_images_is_said_once(tmp_path):
    for i in range(70):
        Image.fromarray(np.full((4, 4), 4095 if i > 2 else 65535, np.uint16)).save(tmp_path / f"{i:02d}.png")
    source = open_source(tmp_path)
    for _ in range(2):
        assert all((record.image == 255).all() for record in source.read((1, 4, 4)))
    [remark] = source.remarks
    assert remark.startswith("images such as 03.png were read as 12 bits")


def test_order_survives_many_files_and_threads(tmp_path):
    for i in range(150):
        saved(tmp_path / f"{i:03d}.png", i)
    records = list(open_source(tmp_path).read((3, 5, 6)))
    assert [r.id for r in records] == [f"{i:03d}.png" for i in range(150)]
    assert all((r.image == pixels(i)).all() for i, r in enumerate(records))
    iterator = open_source(tmp_path).read((3, 5, 6))
    assert next(iterator).id == "000.png"
    iterator.close()


# --- torchvision's data sets ---


@needs_data
def test_mnist_comes_as_it_is_or_resized(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (DATA / "mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    test = open_source("MNIST", root=tmp_path, split="test", limit=1500)
    assert isinstance(test, TorchvisionSource)
    assert isinstance(test, ImageSource)
    assert (test.name, len(test), test.natural_shape()) == ("mnist (test)", 1500, (1, 28, 28))
    assert test.class_names[7] == "7 - seven"
    stored = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    records = list(test.read((1, 28, 28)))
    np.testing.assert_array_equal(np.stack([r.image for r in records]), stored[:1500])
    assert [r.label for r in records] == labels[:1500].tolist()
    assert records[-1].id == "test/00001499"
    resized = next(iter(open_source("mnist", root=tmp_path, split="test", limit=1).read((3, 32, 32))))
    np.testing.assert_array_equal(resized.image, decode_image(Image.fromarray(stored[0, 0]), shape=(3, 32, 32)))
    assert len(open_source("mnist", root=tmp_path)) == 60_000


def test_cifar10_is_read_from_its_original_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    names = ["plane", "car"]
    files = {"data_batch_1": {"data": data, "labels": [0, 1, 1, 0]}, "batches.meta": {"label_names": names}}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    digests = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in files}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": digests["batches.meta"]})
    source = open_source("CIFAR-10", root=tmp_path)
    assert (source.name, source.class_names) == ("cifar10 (train)", ("plane", "car"))
    records = list(source.read((3, 32, 32)))
    np.testing.assert_array_equal(np.stack([r.image for r in records]), data.reshape(4, 3, 32, 32))
    assert [(r.id, r.label) for r in records][:2] == [("train/00000000", 0), ("train/00000001", 1)]


def test_svhn_is_read_from_its_original_file(tmp_path, monkeypatch):
    path = tmp_path / "train_32x32.mat"
    stored = RNG.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(path, {"X": stored, "y": np.array([[1], [10], [3], [9], [2]], np.uint8)})
    train = [SVHN.split_list["train"][0], path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setitem(SVHN.split_list, "train", train)
    source = open_source("svhn", root=tmp_path, limit=4)
    assert source.class_names == tuple("0123456789")
    records = list(source.read((3, 32, 32)))
    assert [r.label for r in records] == [1, 0, 3, 9]
    np.testing.assert_array_equal(records[3].image, stored[..., 3].transpose(2, 0, 1))
    grey = [r.image.shape for r in source.read((1, 16, 16))]
    assert grey == [(1, 16, 16)] * 4


def test_gtsrb_is_read_from_its_files(tmp_path):
    training = tmp_path / "gtsrb" / "GTSRB" / "Training"
    for seed, name in enumerate(("00000/00000_00000.ppm", "00001/00000_00000.ppm", "00001/00000_00001.ppm")):
        saved(training / name, seed)
    source = open_source("GTSRB", root=tmp_path)
    assert (len(source), len(source.class_names), source.metadata_types) == (3, 43, {"path": str})
    assert source.natural_shape() == (3, 5, 6)
    records = list(source.read((3, 5, 6)))
    assert [(r.id, r.label) for r in records] == [("train/00000000", 0), ("train/00000001", 1), ("train/00000002", 1)]
    assert records[0].metadata == {"path": str(training / "00000/00000_00000.ppm")}
    np.testing.assert_array_equal(records[2].image, pixels(2))


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "gtsrb"])
def test_a_failed_download_says_what_is_expected_where(tmp_path, monkeypatch, name):
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # nothing listens there
        monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(InputError, match=f"{name}: expected {tmp_path}.*or a connection"):
        open_source(name, root=tmp_path)


# --- arrays ---


@given(n=st.integers(1, 9), channels=st.sampled_from([1, 3]), side=st.integers(4, 6))
def test_arrays_of_every_layout_and_type_agree(n, channels, side):
    images = np.random.default_rng(n).integers(0, 256, (n, channels, side, side + 1), dtype=np.uint8)
    forms = [
        images,
        images.transpose(0, 2, 3, 1),
        images / 255,
        (images / 255).astype(np.float32),
        torch.from_numpy(images),
    ]
    forms += [images[:, 0]] if channels == 1 else []
    for form in forms:
        source = ArraySource(form, list(range(n)))
        assert source.natural_shape() == images.shape[1:]
        records = list(source.read(images.shape[1:]))
        assert len(records) == len(source) == n
        np.testing.assert_array_equal(np.stack([r.image for r in records]), images)
        assert [(r.id, r.label) for r in records] == [(f"{i:08d}", i) for i in range(n)]


def test_arrays_longer_than_a_batch_keep_their_order_and_are_not_shared():
    images = RNG.integers(0, 256, (2500, 1, 2, 2), dtype=np.uint8)
    before = images.copy()
    labels = RNG.integers(0, 10, 2500)
    for row, record in enumerate(ArraySource(images, labels).read((1, 2, 2))):
        np.testing.assert_array_equal(record.image, before[row])
        assert record.label == labels[row]
        record.image[:] = 0
    np.testing.assert_array_equal(images, before)


def test_arrays_carry_ids_names_and_metadata():
    metadata = {
        "site": ["a", None],
        "score": np.array([0.5, 1.5]),
        "n": [1, 2],
        "ok": [True, False],
        "label": ["x", "y"],
    }
    source = ArraySource(
        np.zeros((2, 4, 4), np.uint8),
        [1, 0],
        ids=["q", "p"],
        class_names=["cat", "dog"],
        metadata=metadata,
        name="mine",
    )
    assert isinstance(source, ImageSource)
    assert (source.name, source.class_names, source.labelled) == ("mine", ("cat", "dog"), True)
    assert source.metadata_types == {"site": str, "score": float, "n": int, "ok": bool, "source_label": str}
    first, second = source.read((1, 4, 4))
    assert first.metadata == {"site": "a", "score": 0.5, "n": 1, "ok": True, "source_label": "x"}
    assert (second.id, second.label, second.metadata["site"]) == ("p", 0, None)


def test_labels_may_be_names():
    images = np.zeros((3, 2, 2), np.uint8)
    for labels in (["b", "a", "b"], np.array(["b", "a", "b"])):
        source = ArraySource(images, labels)
        assert (source.class_names, [r.label for r in source.read((1, 2, 2))]) == (("a", "b"), [1, 0, 1])
    given = ArraySource(images, ["b", "a", "b"], class_names=["x", "b", "a"])
    assert (given.class_names, [r.label for r in given.read((1, 2, 2))]) == (("x", "b", "a"), [1, 2, 1])


def test_wrong_arrays_say_why():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    cases = [
        ((np.zeros((0, 3, 4, 4), np.uint8),), {}, "at least one image"),
        ((np.zeros((2, 5), np.uint8),), {}, "expected an array"),
        ((np.zeros((2, 3, 4, 4), np.int64),), {}, "uint8 or floating point"),
        ((np.full((2, 3, 4, 4), 1.5),), {}, r"in \[0, 1\]"),
        ((images, [1]), {}, "expected 2 labels"),
        ((images, [1, -1]), {}, "labels of 0 or more"),
        ((images, [0, 2]), {"class_names": ["a", "b"]}, "labels of 0 to 1"),
        ((images, np.array([0.0, 1.0])), {}, "row of integers"),
        ((images, ["a", "x"]), {"class_names": ["a", "b"]}, "one of the class names, got 'x'"),
        ((images,), {"ids": ["a"]}, "expected 2 ids"),
        ((images,), {"ids": ["a", "a"]}, "expected 2 different ids"),
        ((images,), {"metadata": {"n": [1]}}, "expected 2 values of 'n'"),
        ((images,), {"metadata": {"n": [1, "x"]}}, "of one type"),
        ((images,), {"metadata": {"n": [[1], [2]]}}, "strings, integers"),
    ]
    for positional, options, message in cases:
        with pytest.raises(InputError, match=message):
            ArraySource(*positional, **options)
    with pytest.raises(InputError, match="resize"):
        ArraySource(images).read((3, 8, 8))


# --- open_source ---


def test_unknown_names_and_unused_options_are_refused(tmp_path):
    saved(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"mnist, cifar10, svhn, gtsrb\), got cifar11 \(did you mean 'cifar10'\?\)"):
        open_source("cifar11")
    with pytest.raises(InputError, match="split"):
        open_source(tmp_path, split="train")
    with pytest.raises(InputError, match="root"):
        open_source(tmp_path, root=tmp_path)
    with pytest.raises(InputError, match="limit"):
        open_source(tmp_path, limit=0)
    with pytest.raises(InputError, match="train or test"):
        open_source("mnist", split="extra", root=tmp_path)
