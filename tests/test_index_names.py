"""Names that look the same, composed (NFC) as people type them and apart (NFD) as a Mac writes them."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import tiny_classifier
from tests.conftest import SHAPE, network
from tests.digits import write_photos
from tmm_engine.engine import Engine
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.names import composed, spelled
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.records import ImageRecord
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.changes import add_exemplars, delete_exemplars

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
BOTH_WAYS = pytest.mark.parametrize(("typed", "there"), [(NFC, NFD), (NFD, NFC)])


@BOTH_WAYS
def test_a_name_is_found_in_the_other_form(typed: str, there: str):
    assert typed != there
    assert spelled([typed, "tea", "gone"], [there, "tea"]) == {typed: there, "tea": "tea"}


def test_a_name_that_is_there_as_it_is_written_is_itself_and_one_that_could_be_two_is_none():
    assert spelled([NFC, NFD], [NFD, NFC]) == {NFC: NFC, NFD: NFD}
    dotted, below, above = "ṩ", "ṣ\u0307", "s\u0307\u0323"  # three ways to write one letter
    assert composed(below) == composed(above) == dotted
    assert spelled([dotted], [below, above]) == {}


@given(st.lists(st.text(max_size=4), unique_by=composed, max_size=8))
def test_among_names_that_differ_all_are_found_in_both_forms(names: list[str]):
    apart = [unicodedata.normalize("NFD", name) for name in names]
    assert spelled(apart, names) == dict(zip(apart, names, strict=True))


def test_no_message_proposes_what_was_typed():
    assert nearest("tae", ["tea"]) == " (did you mean 'tea'?)"
    assert nearest(NFC, [NFD]) == (
        r" (did you mean 'cafe\u0301'? It looks the same in another Unicode form, 'caf\xe9')"
    )


@BOTH_WAYS
def test_metadata_belongs_to_the_image_that_looks_the_same(tmp_path: Path, typed: str, there: str):
    photos = write_photos(tmp_path / "photos", count=4)
    (photos / "digit-1").rename(photos / there)
    (photos / "metadata.csv").write_text(f"file_name,site\n{typed}/0001.png,A\n", encoding="utf-8")
    records = [each for each in FolderSource(photos).read((1, 8, 8)) if isinstance(each, ImageRecord)]
    assert {each.id: each.metadata["site"] for each in records if each.metadata["site"]} == {f"{there}/0001.png": "A"}
    lines = f"file_name,site\n{typed}/0001.png,A\n{there}/0001.png,B\n"
    (photos / "metadata.csv").write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=r"every image once.*two Unicode forms"):
        FolderSource(photos)


def images(*ids: str, names: tuple[str, ...]) -> ArraySource:
    pixels = np.random.default_rng(len(ids)).integers(0, 256, (len(ids), *SHAPE), dtype=np.uint8)
    return ArraySource(pixels, np.arange(len(ids)) % len(names), ids=list(ids), class_names=names)


@BOTH_WAYS
def test_exemplars_and_classes_are_found_by_names_that_look_the_same(tmp_path: Path, typed: str, there: str):
    index, classifier = tmp_path / "x.idx", tiny_classifier()
    write_index(images(there, "tea", "milk", names=(there, "b", "c", "d")), index, classifier)
    add_exemplars(index, images("two", names=(typed,)), classifier)
    with Engine.open(index, model=network()) as engine:
        assert engine.exemplar(typed).name == there
        assert engine.exemplar("two").label == 0
    assert delete_exemplars(index, ids=[typed, there]).deleted == 1
    with pytest.raises(InputError, match="no exemplar has the id"):
        delete_exemplars(index, ids=[typed])
