"""Builds: what is in the index, what is refused, what failing builds leave behind."""

import io
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.builders import (
    COUNT,
    beside,
    opened,
    reference_features,
    seed_of,
    snapshot,
    tiny_arrays,
    tiny_build,
    tiny_classifier,
)
from tests.conftest import CLASSES, SHAPE, network
from tmm_engine.index import batches
from tmm_engine.index.columns import FeatureColumn, embed
from tmm_engine.index.errors import ImageError, IndexStateError, InputError, ModelError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource, UnreadableImage
from tmm_engine.index.store import lance_store
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.embedding import MAX_REPORTED, predict
from tmm_engine.index.store.manifest import MANIFEST, MODEL, digest_files
from tmm_engine.index.types import ImageShape

NAMES = ("apple", "bear", "cat", "dog")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches and several fragments in every build."""
    monkeypatch.setattr(batches, "MAX_IMAGES", 16)
    monkeypatch.setattr(lance_store, "FRAGMENT_BYTES", 4096)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "idx"


class Unread(ArraySource):
    """A source that a build must not even begin to read."""

    def read(self, shape: ImageShape) -> Iterator[ImageRecord]:
        raise AssertionError("read before all was checked")


class GivenRecords:
    """A source that yields the records it was given."""

    def __init__(self, records: list[ImageRecord | UnreadableImage], *, labelled: bool = True, **types: type) -> None:
        self.name, self.class_names, self.labelled, self.metadata_types = "given", None, labelled, types
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def natural_shape(self) -> ImageShape:
        return SHAPE

    def read(self, shape: ImageShape) -> Iterator[ImageRecord | UnreadableImage]:
        yield from self._records


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def photos(folder: Path, *, flat: bool = False) -> Path:
    """COUNT images as PNG, in four class folders or in one."""
    for number, (image, label) in enumerate(zip(*tiny_arrays(0), strict=True)):
        path = folder / f"{number:03d}.png" if flat else folder / NAMES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder


def parquet(path: Path, *, labelled: bool = True) -> Path:
    """The same images in Hugging Face's layout, with a column of metadata."""
    images, labels = tiny_arrays(0)
    column = [{"bytes": png(image), "path": f"{number}.png"} for number, image in enumerate(images)]
    table = pa.table({"image": column, "weight": [number / 2 for number in range(COUNT)]})
    if labelled:
        features = {"label": {"_type": "ClassLabel", "names": NAMES}}
        table = table.append_column("label", pa.array(labels))
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=20)
    return path


def sources(folder: Path) -> dict[str, ImageSource]:
    """The images of seed 0 from every kind of source."""
    images, labels = tiny_arrays(0)
    return {
        "class folders": open_source(photos(folder / "classes")),
        "flat folder": open_source(photos(folder / "flat", flat=True)),
        "parquet": open_source(parquet(folder / "data.parquet")),
        "parquet without labels": open_source(parquet(folder / "bare.parquet", labelled=False)),
        "arrays": ArraySource(images, labels, class_names=NAMES, metadata={"n": list(range(COUNT))}),
        "arrays without labels": ArraySource(images),
    }


# ---- what is in the index


@pytest.mark.parametrize(
    "kind", ["class folders", "flat folder", "parquet", "parquet without labels", "arrays", "arrays without labels"]
)
@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_the_index_holds_what_the_source_holds(tmp_path, target, monkeypatch, kind, batch):
    monkeypatch.setattr(batches, "MAX_IMAGES", batch)
    source = sources(tmp_path)[kind]
    classifier = tiny_classifier()
    report = write_index(source, target, classifier)
    records = list(source.read(SHAPE))
    images = np.stack([record.image for record in records])
    assert (report.exemplars, report.skipped_count, report.skipped) == (COUNT, 0, [])
    manifest, store = opened(target)
    rows = np.arange(COUNT)
    assert store.ids.tolist() == [record.id for record in records]
    np.testing.assert_array_equal(store.images(rows), images)
    assert store.metadata(rows) == [record.metadata for record in records]
    features = reference_features(classifier, images)
    np.testing.assert_allclose(store.features(rows), features, rtol=1e-4, atol=1e-5)
    given = [record.label for record in records] if source.labelled else None
    predicted = classifier.logits(torch.from_numpy(features)).argmax(1).tolist()
    assert store.labels.tolist() == (given or predicted)
    assert store.label_is_predicted.tolist() == [not source.labelled] * COUNT
    assert report.labels_predicted == manifest.labels_predicted == (not source.labelled)
    assert manifest.class_names == (NAMES if source.labelled else ("0", "1", "2", "3"))
    assert (manifest.source, manifest.exemplars, manifest.skipped) == (source.name, COUNT, 0)
    assert (manifest.image_shape, manifest.feature_dim, manifest.neighbours) == (SHAPE, 12, "Flat")
    assert manifest.files == digest_files(target)
    assert manifest.fingerprint == classifier.fingerprint
    assert Classifier.load(target / MODEL, model=network()).fingerprint == classifier.fingerprint
    assert {path.name for path in target.iterdir()} == {MANIFEST, MODEL, "exemplars.lance"}


def test_the_same_build_gives_the_same_exemplars(tmp_path):
    for name in ("a", "b"):
        tiny_build(tmp_path / name)
    (first, a), (second, b) = opened(tmp_path / "a"), opened(tmp_path / "b")
    rows = np.arange(COUNT)
    np.testing.assert_array_equal(a.features(rows).view(np.int32), b.features(rows).view(np.int32))
    assert (first.fingerprint, first.source, first.exemplars) == (second.fingerprint, second.source, second.exemplars)


def test_images_and_predictions_are_those_of_embed_and_predict(classifier):
    images, _ = tiny_arrays(3)
    features = embed(images, classifier)
    np.testing.assert_allclose(features, reference_features(classifier, images), rtol=1e-4, atol=1e-5)
    expected = classifier.logits(torch.from_numpy(features)).argmax(1).numpy()
    np.testing.assert_array_equal(predict(features, classifier), expected)


def test_metadata_of_all_kinds_comes_back(target):
    images, labels = tiny_arrays(0, 4)
    metadata = {
        "text": ["", None, "日本 \n\x00", "x"],
        "whole": [-(2**63), None, 2**63 - 1, 0],
        "real": [0.1, None, float("inf"), -0.0],
        "flag": [True, None, False, True],
        "empty": [None] * 4,
    }
    write_index(ArraySource(images, labels, metadata=metadata), target, tiny_classifier())
    rows = np.array([3, 1, 0, 2, 1])
    assert opened(target)[1].metadata(rows) == [
        {name: column[row] for name, column in metadata.items()} for row in rows
    ]


class Negative(FeatureColumn):
    """The features of the negative."""

    name = "negative_feature"

    def compute(self, images: np.ndarray) -> np.ndarray:
        return embed(255 - images, self.classifier)

    def save(self, index: Path) -> None:
        (index / "negative.txt").write_bytes(b"negative")


class Halved(FeatureColumn):
    """The first 5 features of the halved image."""

    name = "halved_feature"
    dimension = 5

    def compute(self, images: np.ndarray) -> np.ndarray:
        return embed(images // 2, self.classifier)[:, :5]


def test_more_columns_of_features_are_stored_beside_what_made_them(target):
    tiny_build(target, columns=[Negative(tiny_classifier()), Halved(tiny_classifier())])
    manifest, store = opened(target)
    assert manifest.columns == {"feature": 12, "negative_feature": 12, "halved_feature": 5}
    assert (target / "negative.txt").read_bytes() == b"negative"
    assert "negative.txt" in manifest.files
    assert manifest.files == digest_files(target)
    images = tiny_arrays(0)[0]
    for column, changed in (("negative_feature", 255 - images), ("halved_feature", images // 2)):
        expected = reference_features(tiny_classifier(), changed)[:, : manifest.columns[column]]
        found = store.features(np.arange(COUNT), column=column)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert seed_of(target) == 0


def test_progress_moves_on_and_arrives(target):
    told: list[tuple[str, int, int]] = []
    tiny_build(target, progress=lambda step, done, total: told.append((step, done, total)))
    assert [done for _, done, _ in told] == list(range(16, COUNT + 1, 16))
    assert {(step, total) for step, _, total in told} == {("building", COUNT)}


def test_the_factory_string_is_recorded(target):
    tiny_build(target, neighbours="HNSW32")
    assert opened(target)[0].neighbours == "HNSW32"


@pytest.mark.parametrize("again", [3, 40])  # in the first batch, and in another
def test_an_id_twice_is_refused_and_the_old_index_stays(target, again):
    tiny_build(target, seed=1)
    before = snapshot(target)
    images, labels = tiny_arrays(0)
    records = [ImageRecord(f"id {n}", images[n], int(labels[n]), {}) for n in range(again)]
    source = GivenRecords([*records, ImageRecord("id 1", images[50], 0, {})])
    with pytest.raises(InputError, match="got 'id 1' twice; make the source's ids unique"):
        write_index(source, target, tiny_classifier(), overwrite=True)
    assert snapshot(target) == before
    assert beside(target) == set()


# ---- images that cannot be read


def spoiled(folder: Path) -> Path:
    """Photos of which three are broken in different ways."""
    files = sorted(photos(folder).rglob("*.png"))
    files[0].write_bytes(b"")
    files[40].write_bytes(b"no image at all")
    files[-1].write_bytes(files[-1].read_bytes()[:60])
    return folder


def test_unreadable_images_are_skipped_counted_and_explained(tmp_path, target):
    folder = spoiled(tmp_path / "photos")
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))]
    report = write_index(open_source(folder), target, tiny_classifier())
    assert (report.exemplars, report.skipped_count) == (COUNT - 3, 3)
    assert [image.id for image in report.skipped] == [files[0], files[40], files[-1]]
    assert all(image.reason for image in report.skipped)
    manifest, store = opened(target)
    assert (manifest.exemplars, manifest.skipped) == (COUNT - 3, 3)
    assert store.ids.tolist() == [file for file in files if file not in {image.id for image in report.skipped}]
    assert [NAMES[label] for label in store.labels] == [id_.split("/")[0] for id_ in store.ids]


def test_strict_fails_at_the_first_of_them_and_leaves_nothing(tmp_path, target):
    folder = spoiled(tmp_path / "photos")
    first = min(folder.rglob("*.png")).relative_to(folder).as_posix()
    with pytest.raises(ImageError, match=rf"{first}: .*without `strict=True` it would be skipped"):
        write_index(open_source(folder), target, tiny_classifier(), strict=True)
    assert not target.exists()
    assert beside(target) == set()


def test_only_some_of_many_unreadable_images_are_listed(target):
    image = ImageRecord("good", tiny_arrays(0)[0][0], 1, {})
    bad: list[ImageRecord | UnreadableImage] = [UnreadableImage(str(number), "torn") for number in range(50)]
    report = write_index(GivenRecords([*bad, image]), target, tiny_classifier())
    assert (report.exemplars, report.skipped_count) == (1, 50)
    assert [image.id for image in report.skipped] == [str(number) for number in range(MAX_REPORTED)]


@pytest.mark.parametrize("records", [[], [UnreadableImage("a.png", "torn"), UnreadableImage("b.png", "empty")]])
def test_nothing_readable_is_an_error_with_reasons(target, records):
    with pytest.raises(InputError, match="no image could be read") as raised:
        write_index(GivenRecords(records), target, tiny_classifier())
    assert all(f"{image.id}: {image.reason}" in str(raised.value) for image in records)
    assert not target.exists()
    assert beside(target) == set()


# ---- what does not fit


@pytest.mark.parametrize("wrong", [CLASSES, -1, 10**6])
def test_a_label_out_of_range_names_its_image(target, wrong):
    image = tiny_arrays(0)[0][0]
    records = [ImageRecord(f"image {number}", image, wrong if number == 33 else 0, {}) for number in range(40)]
    with pytest.raises(InputError, match=f"image 33: label {wrong}, but the model's head has 4 classes"):
        write_index(GivenRecords(records), target, tiny_classifier())
    assert not target.exists()
    assert beside(target) == set()


class Logarithm(nn.Module):
    """Not finite where a pixel is 0, as a damaged network would be on some images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.log()


def test_an_image_that_the_model_cannot_digest_is_skipped_and_most_such_blame_the_model(target):
    model = nn.Sequential(Logarithm(), nn.Flatten(), nn.Linear(192, CLASSES))
    classifier = Classifier.from_module(model, image_shape=SHAPE)
    images = np.full((COUNT, *SHAPE), 9, np.uint8)
    images[37, 1, 2, 3] = 0
    report = write_index(ArraySource(images), target, classifier)
    assert [(image.id, "not finite" in image.reason) for image in report.skipped] == [("00000037", True)]
    assert report.exemplars == len(opened(target)[1]) == COUNT - 1
    with pytest.raises(ImageError, match=r"00000037: the model's features .* are not finite"):
        write_index(ArraySource(images), target, classifier, strict=True, overwrite=True)
    images[: COUNT // 2 + 1] = 0
    with pytest.raises(ModelError, match=rf"not finite numbers for {COUNT // 2 + 1} of {COUNT} images; check the"):
        write_index(ArraySource(images), target, classifier, overwrite=True)
    assert len(opened(target)[1]) == COUNT - 1


def test_a_bad_factory_string_is_refused_before_reading(target):
    with pytest.raises(InputError, match=r"expected a FAISS factory string .* got 'Flatt'"):
        write_index(Unread(*tiny_arrays(0)), target, tiny_classifier(), neighbours="Flatt")
    assert list(target.parent.iterdir()) == []


def test_arrays_of_another_shape_than_the_models(target):
    with pytest.raises(InputError, match="resize"):
        write_index(ArraySource(np.zeros((3, 9, 9), np.uint8)), target, tiny_classifier())
    assert not target.exists()


def test_a_number_too_large_for_its_column(target):
    image = tiny_arrays(0)[0][0]
    source = GivenRecords([ImageRecord("a", image, 0, {"hash": 2**63})], hash=int)
    with pytest.raises(InputError, match="expected int64 in column 'hash'"):
        write_index(source, target, tiny_classifier())
    assert not target.exists()
    assert beside(target) == set()


# ---- the target


def test_an_existing_index_is_left_untouched_without_overwrite(target):
    tiny_build(target)
    before = snapshot(target)
    with pytest.raises(IndexStateError, match="is an index already; `overwrite=True`"):
        write_index(Unread(*tiny_arrays(1)), target, tiny_classifier())
    assert snapshot(target) == before


def test_overwrite_replaces_the_whole_index_and_readers_of_the_old_one_go_on(target):
    tiny_build(target)
    (target / "cache").mkdir()
    (target / "cache" / "old.faiss").write_bytes(b"of the old index")
    _, old = opened(target)
    first = old.images(np.arange(3))
    tiny_build(target, 1, overwrite=True)
    assert seed_of(target) == 1
    assert {path.name for path in target.iterdir()} == {MANIFEST, MODEL, "exemplars.lance"}
    assert beside(target) == set()
    np.testing.assert_array_equal(first, tiny_arrays(0)[0][:3])


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_not_an_index_is_never_touched(target, overwrite):
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    before = snapshot(target.parent)
    with pytest.raises(IndexStateError, match="is not an index: it is left alone"):
        write_index(Unread(*tiny_arrays(0)), target, tiny_classifier(), overwrite=overwrite)
    assert snapshot(target.parent) == before


@pytest.mark.parametrize("failure", ["label", "strict", "progress"])
def test_a_failing_overwrite_leaves_the_old_index(target, failure):
    tiny_build(target)
    before = snapshot(target)
    image = tiny_arrays(0)[0][0]
    good: list[ImageRecord | UnreadableImage] = [ImageRecord(str(number), image, 0, {}) for number in range(40)]
    last = ImageRecord("last", image, 99, {}) if failure == "label" else UnreadableImage("last", "torn")

    def stop(step: str, done: int, total: int) -> None:
        if failure == "progress" and done > 16:
            raise RuntimeError("the display is gone")

    with pytest.raises((InputError, RuntimeError)):
        write_index(GivenRecords([*good, last]), target, tiny_classifier(), overwrite=True, strict=True, progress=stop)
    assert snapshot(target) == before
    assert beside(target) == set()


@pytest.mark.parametrize("there", [True, False])
def test_ctrl_c_cleans_up(target, there):
    if there:
        tiny_build(target)
    before = snapshot(target)

    def interrupted(step: str, done: int, total: int) -> None:
        if done > 40:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_build(target, 1, overwrite=True, progress=interrupted)
    assert target.exists() == there
    assert snapshot(target) == before
    assert beside(target) == set()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("prefetch", "decode"))] == []
