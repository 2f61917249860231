"""Lists of paths and labels, and data sets of Hugging Face, as sources."""

from pathlib import Path

import pytest
from PIL import Image

from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.hugging_face import SavedDatasetSource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, UnreadableImage

SHAPE = (3, 4, 4)
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def pictures(folder: Path) -> list[str]:
    """Two PNG files of each colour, and their paths relative to the folder."""
    names = []
    for colour, value in COLOURS.items():
        for number in range(2):
            name = f"img/{colour}{number}.png"
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            Image.new("RGB", (4, 4), value).save(folder / name)
            names.append(name)
    return names


def colours(source) -> list[tuple[int, ...]]:
    return [tuple(record.image[:, 0, 0].tolist()) for record in source.read(SHAPE)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_list_of_paths_and_labels(tmp_path, suffix):
    names = pictures(tmp_path)
    rows = [(name, Path(name).stem[:-1], "007") for name in names]
    if suffix == ".jsonl":
        lines = [f'{{"path": "{name}", "label": "{label}", "code": "{code}"}}' for name, label, code in rows]
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [comma.join(("path", "label", "code")), *(comma.join(row) for row in rows)]
    (tmp_path / f"list{suffix}").write_text("\n".join(lines))
    source = open_source(tmp_path / f"list{suffix}")
    assert (source.class_names, source.metadata_types) == (("blue", "green", "red"), {"path": str, "code": str})
    records = list(source.read(SHAPE))
    assert [(record.id, record.label) for record in records] == [(name, i // 2) for i, name in enumerate(names)]
    assert colours(source) == [value for value in COLOURS.values() for _ in range(2)]
    assert records[0].metadata == {"path": str(tmp_path / names[0]), "code": "007"}
    assert source.remarks == (
        "images are the column 'path' (`image_column=…`), labels the column 'label' (`label_column=…`)",
    )
    with pytest.raises(InputError, match="no split"):
        open_source(tmp_path / f"list{suffix}", split="train")


def test_lists_that_do_not_fit(tmp_path):
    names = pictures(tmp_path)
    path = tmp_path / "list.csv"
    path.write_text(f"file,image,species\n{names[0]},{names[1]},x\nmissing.png,{names[2]},y\n")
    with pytest.raises(InputError, match=r"several, file \(string\), image \(string\); say which"):
        open_source(path)
    source = open_source(path, image_column="file", label_column="species")
    first, second = source.read(SHAPE)
    assert isinstance(first, ImageRecord)
    assert isinstance(second, UnreadableImage)
    assert "no such file" in second.reason
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"one column of the images' paths .*got none among a \(int64\), b"):
        open_source(path)


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = pictures(tmp_path)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["blue", "green", "red"]),
            "page": datasets.Value("int64"),
        }
    )
    files = [str(tmp_path / name) for name in names]
    rows = {"picture": files, "kind": [0, 0, 1, 1, 2, 2], "page": range(6)}
    return datasets.Dataset.from_dict(rows, features=features, split="train")


def test_a_data_set_that_was_saved(tmp_path, saved):
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    source = open_source(tmp_path / "one")
    assert isinstance(source, SavedDatasetSource)
    assert (source.name, source.class_names, len(source)) == ("one (train)", ("blue", "green", "red"), 6)
    assert source.metadata_types == {"path": str, "page": int}
    assert [(record.id, record.label, record.metadata["page"]) for record in source.read(SHAPE)] == [
        (f"train/{row:08d}", row // 2, row) for row in range(6)
    ]
    assert colours(source) == [value for value in COLOURS.values() for _ in range(2)]
    (tmp_path / "one" / "data-00000-of-00002.arrow").write_bytes(b"junk")
    first, *rest = open_source(tmp_path / "one").read(SHAPE)
    assert isinstance(first, UnreadableImage)
    assert (first.id, len(rest)) == ("data-00000-of-00002.arrow", 3)


def test_a_dict_of_data_sets_that_was_saved(tmp_path, saved):
    import datasets

    datasets.DatasetDict({"train": saved, "test": saved.select([5])}).save_to_disk(tmp_path / "two")
    assert colours(open_source(tmp_path / "two", split="test")) == [COLOURS["red"]]
    with pytest.raises(InputError, match="one of the splits train, test, got none"):
        open_source(tmp_path / "two")
