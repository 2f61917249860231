"""Samples of sources: the same whether drawn before or after decoding; only what is drawn is decoded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources import records
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.sampling import readable, reservoir, sampled

SHAPE = (1, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number:02d}.png")
    return tmp_path


def ids(folder: Path, size: int) -> list[str]:
    return [record.id for record in sampled(FolderSource(folder), SHAPE, size)]


def test_only_what_is_drawn_is_decoded_and_it_is_what_reading_all_gives(folder, monkeypatch):
    generator = np.random.default_rng(0)
    kept = reservoir(readable(FolderSource(folder), SHAPE), 7, generator)
    expected = [kept[place] for place in generator.permutation(7)]
    decoded = []
    decode = records.decode_image
    monkeypatch.setattr(
        records, "decode_image", lambda source, **options: (decoded.append(source), decode(source, **options))[1]
    )
    told = []
    found = sampled(FolderSource(folder), SHAPE, 7, progress=lambda *step: told.append(step))
    assert len(decoded) == 7
    assert told == [("reading", done, 7) for done in range(1, 8)]
    assert [record.id for record in found] == [record.id for record in expected]
    assert all((one.image == other.image).all() for one, other in zip(found, expected, strict=True))


def test_what_cannot_be_read_is_left_out_and_where_nothing_drawn_can_all_are_looked_at(folder):
    [first, second] = ids(folder, 2)
    (folder / first).write_bytes(b"no image")
    assert ids(folder, 2) == [second]
    (folder / second).write_bytes(b"no image")
    others = ids(folder, 2)
    assert len({first, second, *others}) == 4
    assert len(ids(folder, 100)) == 58
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image could be read"):
        ids(folder, 2)
