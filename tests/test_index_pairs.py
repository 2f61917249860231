"""Rows in Python as sources: torch data sets, lists of pairs, Hugging Face's data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from tests.builders import tiny_classifier
from tests.conftest import network
from tmm_engine import Engine, build_index
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.opening import as_source, open_source
from tmm_engine.index.sources.pairs import PairSource
from tmm_engine.index.sources.records import ImageSource, UnreadableImage

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
SHAPE = (3, 8, 8)


class Pets(Dataset):
    """PIL images with labels; the row 4 is broken."""

    classes = ("cat", "dog", "eel")

    def __init__(self, labels=(0, 1, 2, 0, 1, 2)):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        if row == 4:
            raise OSError("no such file")
        return Image.fromarray(IMAGES[row].transpose(1, 2, 0)), self.labels[row]


class Stream(IterableDataset):
    def __iter__(self):
        yield IMAGES[0], 0


def test_a_torch_data_set_of_pil_images():
    source = open_source(Pets())
    assert isinstance(source, PairSource)
    assert isinstance(source, ImageSource)
    assert (source.name, len(source), source.class_names, source.labelled) == ("Pets", 6, Pets.classes, True)
    assert source.natural_shape() == SHAPE
    records = list(source.read(SHAPE))
    assert [record.id for record in records] == [f"{row:08d}" for row in range(6)]
    broken = records.pop(4)
    assert isinstance(broken, UnreadableImage)
    assert "no such file" in broken.reason
    np.testing.assert_array_equal([record.image for record in records], IMAGES[[0, 1, 2, 3, 5]])
    assert [record.label for record in records] == [0, 1, 2, 0, 2]
    part = open_source(Subset(Pets(), [5, 0]), limit=1)
    assert (part.class_names, [record.label for record in part.read(SHAPE)]) == (Pets.classes, [2])


@pytest.mark.parametrize("images", [IMAGES, torch.from_numpy(IMAGES), torch.from_numpy(IMAGES) / 255])
def test_pairs_of_tensors_and_arrays(images):
    for label in (int, np.int64, torch.tensor):
        pairs = [(image, label(row % 2)) for row, image in enumerate(images)]
        source = as_source(pairs)
        assert [(record.label, source.class_names) for record in source.read(SHAPE)] == [(0, None), (1, None)] * 3
        np.testing.assert_array_equal([record.image for record in source.read(SHAPE)], IMAGES)
    alone = as_source(list(images))
    assert (alone.labelled, [record.label for record in alone.read(SHAPE)]) == (False, [None] * 6)
    np.testing.assert_array_equal([record.image for record in as_source(images).read(SHAPE)], IMAGES)


def test_labels_that_are_names_are_sorted_and_said():
    source = open_source([(image, name) for image, name in zip(IMAGES, "cabcab", strict=True)], limit=2)
    assert (source.class_names, [record.label for record in source.read(SHAPE)]) == (("a", "c"), [1, 0])
    assert source.remarks == ("list: labels are names: all rows were looked at for 2 classes",)
    tensors = TensorDataset(torch.from_numpy(IMAGES), torch.arange(6))
    assert [record.label for record in open_source(tensors).read(SHAPE)] == list(range(6))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "at least one row"),
        ([{"image": 1}], {}, "expected rows .image, label., or images, got dict with image"),
        ([(1, 2, 3)], {}, "got 3 values"),
        ({"a": 1}, {}, "a mapping; pass a list of pairs"),
        (Stream(), {}, "Stream"),
        ([(IMAGES[0], 0)], {"split": "train"}, "split"),
        ([(IMAGES[0], 0)], {"root": "x"}, "root"),
        (Pets(), {"label_column": "y"}, "label_column"),
    ],
)
def test_rows_that_cannot_be_used_say_why(rows, options, message):
    with pytest.raises(InputError, match=message):
        open_source(rows, **options)


@pytest.mark.parametrize("none", [None, ""])
@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([None, "cat", "dog"], ("cat", "dog"), [None, 0, 1]),
        (["dog", None, "cat"], ("cat", "dog"), [1, None, 0]),
        ([None, 3, None], None, [None, 3, None]),
        ([0, 1, None], None, [0, 1, None]),
    ],
)
def test_a_row_without_a_label_has_none_wherever_it_stands(labels, names, expected, none):
    source = open_source([(IMAGES[0], none if label is None else label) for label in labels])
    assert (source.labelled, source.class_names) == (True, names)
    assert [record.label for record in source.read(SHAPE)] == expected


@pytest.mark.parametrize("labels", [[0, "cat"], ["cat", 0], [0, 0.5], [0, np.zeros(2)]])
def test_labels_of_two_kinds_or_of_none_are_errors_not_images(labels):
    with pytest.raises(InputError, match=r"row 1 .*integer or a name|all integers or all names"):
        list(open_source([(IMAGES[0], label) for label in labels]).read(SHAPE))


class Counted(Pets):
    """Counts the rows that are asked for; the first is broken."""

    asked = 0

    def __getitem__(self, row):
        self.asked += 1
        if row == 0:
            raise OSError("gone")
        return IMAGES[row], self.labels[row]


def test_broken_rows_are_unreadable_images_whatever_labels_are_and_no_more_rows_are_asked_for_than_the_limit():
    for labels, expected in (("dcecde", ("c", "e")), ((0, 1, 2, 0, 1, 2), (1, 2))):
        rows = Counted(labels)
        source = open_source(rows, limit=3)
        assert rows.asked <= 5
        broken, *others = source.read(SHAPE)
        assert isinstance(broken, UnreadableImage)
        assert "row 0 of Counted cannot be read: gone" in broken.reason
        names = source.class_names if isinstance(labels, str) else range(3)
        assert tuple(names[row.label] for row in others) == expected
    named = open_source(Counted(("dog", "dog", "eel")))
    assert (named.class_names, [row.label for row in list(named.read(SHAPE))[1:]]) == (Pets.classes, [1, 2])


def test_a_data_set_of_hugging_face_in_python():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.fromarray(image.transpose(1, 2, 0)) for image in IMAGES], "label": [0, 1] * 3}
    whole = datasets.Dataset.from_dict(rows, features=features, split="train")
    source = open_source(whole.select([5, 0]))
    assert (source.class_names, source.metadata_types) == (("a", "b"), {"path": str})
    assert [(record.id, record.label) for record in source.read(SHAPE)] == [
        ("train/00000000", 1),
        ("train/00000001", 0),
    ]
    np.testing.assert_array_equal([record.image for record in source.read(SHAPE)], IMAGES[[5, 0]])
    both = datasets.DatasetDict({"train": whole, "test": whole.select([1])})
    assert len(open_source(both, split="test")) == 1
    with pytest.raises(InputError, match="one of the splits train, test, got none"):
        open_source(both)


def test_an_index_is_built_of_rows_and_gets_more(tmp_path):
    pairs = [(image, row % 4) for row, image in enumerate(IMAGES)]
    report = build_index(pairs, tmp_path / "idx", tiny_classifier(), views=0)
    assert (report.exemplars, report.remarks) == (6, ())
    with Engine.open(tmp_path / "idx", model=network(), device="cpu") as engine:
        assert engine.add([(IMAGES[0], 3)], id_prefix="more/").added == 1


class _Named(TensorDataset):
    """Rows with names for their classes, said in one of several ways."""

    def __init__(self, **said: object) -> None:
        super().__init__(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
        vars(self).update(said)


@pytest.mark.parametrize(
    "said",
    [{"classes": {"dog": 0, "cat": 1}}, {"classes": {0: "dog", 1: "cat"}}, {"class_to_idx": {"dog": 0, "cat": 1}}],
)
def test_names_of_classes_are_found_however_they_are_said(said):
    assert PairSource(_Named(**said)).class_names == ("dog", "cat")
    both = ConcatDataset([_Named(**said), Subset(_Named(classes=["dog", "cat"]), [1])])
    source = PairSource(both)
    assert (source.class_names, len(source)) == (("dog", "cat"), 3)
    with pytest.raises(InputError, match=r"same classes in the same order, got .*'cat', 'dog'.*pairs \(image, name\)"):
        PairSource(ConcatDataset([_Named(**said), _Named(classes=["cat", "dog"])]))
    assert PairSource(_Named(class_to_idx={"dog": 3, "cat": 5})).class_names is None


class _Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 4, 4), 0


class _LongStream(_Stream):
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("stream", [_Stream(), _LongStream(), (row for row in _Stream())])
def test_a_stream_is_called_one_with_what_to_do(stream):
    with pytest.raises(InputError, match=r"a stream.*make a list of it: `list\(stream\)`"):
        open_source(stream)
    assert len(open_source(list(stream))) == 1


def test_a_stream_of_hugging_face_and_a_transform():
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    whole = datasets.Dataset.from_dict(rows, features=features)
    stream = whole.to_iterable_dataset()
    advice = r"datasets\.Dataset\.from_list\(list\(stream\), features=stream\.features\)"
    for each in (stream, datasets.IterableDatasetDict({"train": stream})):
        with pytest.raises(InputError, match=advice):
            open_source(each)
    collected = open_source(datasets.Dataset.from_list(list(stream), features=stream.features))
    assert [record.label for record in collected.read((3, 4, 4))] == [0, 1]
    assert collected.class_names == ("cat", "dog")
    changed = open_source(whole.with_transform(lambda batch: batch))
    assert "transform of the data set (with_transform, set_transform) is ignored" in changed.remarks[0]
    assert collected.remarks == ()
