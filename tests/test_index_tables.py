"""Lists of paths and labels, and data sets of Hugging Face, as sources."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders import tiny_classifier
from tmm_engine import build_index
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.hugging_face import SavedDatasetSource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, UnreadableImage
from tmm_engine.index.sources.text_tables import read_text_table
from tmm_engine.query import queries_from

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


def test_what_looks_saved_and_is_not_or_is_empty(tmp_path, saved):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / "cat" / "a.png")
    (tmp_path / "photos" / "state.json").write_text('{"epoch": 3}')  # somebody's own
    assert isinstance(open_source(tmp_path / "photos"), FolderSource)
    saved.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="at least one row, got"):
        open_source(tmp_path / "none")


def test_a_dict_of_data_sets_that_was_saved(tmp_path, saved):
    import datasets

    datasets.DatasetDict({"train": saved, "test": saved.select([5])}).save_to_disk(tmp_path / "two")
    assert colours(open_source(tmp_path / "two", split="test")) == [COLOURS["red"]]
    with pytest.raises(InputError, match="one of the splits train, test, got none"):
        open_source(tmp_path / "two")


def test_a_label_that_is_missing_is_none_in_every_table_and_counted(tmp_path):
    """CSV, JSON Lines, tar: empty or null. An index has the prediction in its place and says how often."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8) + ord(name[0])).save(tmp_path / name)
    (tmp_path / "list.csv").write_text("file_name,label\na.png,cat\nb.png,\n")
    lines = '{"file_name": "a.png", "label": "cat", "text": "one\u2028two"}\n{"file_name": "b.png", "label": null}\n'
    (tmp_path / "list.jsonl").write_text(lines, encoding="utf-8")
    with tarfile.open(tmp_path / "list.tar", "w") as tar:
        for key, label in (("a", b"cat"), ("b", b"")):
            tar.add(tmp_path / f"{key}.png", f"{key}.png")
            member = tarfile.TarInfo(f"{key}.cls")
            member.size = len(label)
            tar.addfile(member, io.BytesIO(label))
    for name in ("list.csv", "list.jsonl", "list.tar"):
        source = open_source(tmp_path / name)
        assert source.class_names == ("cat",), name
        assert [record.label for record in source.read((3, 8, 8))] == [0, None], name
        report = build_index(source, tmp_path / f"{name}.idx", tiny_classifier(), views=0)
        assert "1 of 2 images have no label: predictions stand in" in report.remarks, name


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["1.1", "1.10", "1.20"], ["1.1", "1.10", "1.20"]),
        (["1.50", "2.25", ""], [1.5, 2.25, None]),
        (["1.5", "2", "-0.25"], [1.5, 2.0, -0.25]),
        (["1", "NA", "3"], ["1", "NA", "3"]),
        (["NA", "NA", "null"], ["NA", "NA", "null"]),
        (["1", "", "3"], [1, None, 3]),
    ],
)
def test_a_column_of_csv_is_of_numbers_where_nothing_is_lost(tmp_path, written, expected):
    (tmp_path / "list.csv").write_text("path,value\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(written)))
    assert read_text_table(tmp_path / "list.csv")["value"].to_pylist() == expected


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
def test_numbers_of_a_table_are_names_where_the_model_knows_them_and_where_they_are_beyond_its_classes(tmp_path, form):
    names = pictures(tmp_path)
    path, numbers = tmp_path / f"list.{form}", [1, 2, 3, 1, 2, 3]
    for first, model, expected in ((0, ("1", "2", "3", "4"), "123123"), (2018, tuple("abcd"), None)):
        labels = [first + number for number in numbers]
        if form == "csv":
            rows = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
            path.write_text("\n".join(["file_name,label", *rows]))
        elif form == "jsonl":
            rows = [f'{{"file_name": "{name}", "label": {label}}}' for name, label in zip(names, labels, strict=True)]
            path.write_text("\n".join(rows))
        elif form == "parquet":
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            images = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in names]
            pq.write_table(pa.table({"image": images, "label": labels}), path)
        else:
            with tarfile.open(path, "w") as tar:
                for row, (name, label) in enumerate(zip(names, labels, strict=True)):
                    for suffix, content in (("png", (tmp_path / name).read_bytes()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{row:04d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        adapted = AdaptedSource.of_new_index(open_source(path), model)
        found = [adapted.labels.vocabulary.names[record.label] for record in adapted.read(SHAPE)]
        assert found == ([*expected] if expected else [str(label) for label in labels])
        assert "they are taken for names" in adapted.remarks[0]
        queries = queries_from(open_source(path), SHAPE, vocabulary=adapted.labels.vocabulary)
        assert [query.label for query in queries] == found


@pytest.mark.parametrize(("yes", "no"), [("true", "false"), ("True", "False"), ("TRUE", "FALSE")])
def test_labels_that_are_true_and_false_keep_their_spelling(tmp_path, yes, no):
    names = pictures(tmp_path)
    rows = [f"{name},{yes if row % 2 else no},{yes}" for row, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("\n".join(["file_name,label,checked", *rows]))
    source = open_source(tmp_path / "list.csv")
    assert (source.class_names, source.metadata_types["checked"]) == ((no, yes), bool)
    assert [record.label for record in source.read(SHAPE)] == [0, 1] * 3
    (tmp_path / "list.jsonl").write_text(f'{{"path": "{names[0]}", "label": true}}\n{{"path": "x", "label": false}}')
    assert open_source(tmp_path / "list.jsonl").class_names == ("false", "true")
    (tmp_path / "mixed.csv").write_text(f"path,label\n{names[0]},true\n{names[1]},True\n")
    assert open_source(tmp_path / "mixed.csv").class_names == ("True", "true")


def test_what_else_could_be_meant_is_said(tmp_path):
    [name, other, *_] = pictures(tmp_path)
    (tmp_path / "list.csv").write_text(f"image,file_name,target,label\n{other},{name},x,cat\n")
    source = open_source(tmp_path / "list.csv")
    assert source.remarks == (
        "images are the column 'file_name' (`image_column=…`), labels the column 'label' (`label_column=…`); image "
        "could be images; target could be labels",
    )
    assert open_source(tmp_path / "list.csv", image_column="image", label_column="label").remarks == ()


def test_separators_spaces_and_the_mark_at_the_beginning_of_a_file(tmp_path):
    [name, *_] = pictures(tmp_path)
    path = tmp_path / "list.csv"
    path.write_text(f"file_name;label\n{name};cat\n")
    with pytest.raises(InputError, match=r"separated by commas, got semicolons in the header 'file_name;label'; write"):
        open_source(path)
    path.write_text(f"file_name, label, rank\n{name}, cat, 3\n")
    source = open_source(path)
    assert (source.class_names, source.metadata_types) == (("cat",), {"path": str, "rank": int})
    lines = tmp_path / "list.jsonl"
    lines.write_text(f'\ufeff{{"file_name": "{name}", "label": "cat"}}', "utf-8")
    assert open_source(lines).class_names == ("cat",)


@pytest.mark.parametrize("kind", ["struct", "text", "null bytes"])
def test_paths_in_parquet_are_relative_to_the_file(tmp_path, kind):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = [*pictures(tmp_path)[:2], "img/none.png"]
    values = {
        "struct": [{"path": name} for name in names],
        "text": names,
        "null bytes": pa.array(
            [{"bytes": None, "path": name} for name in names], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
    }
    pq.write_table(pa.table({"image": values[kind], "label": ["a", "b", "c"]}), tmp_path / "list.parquet")
    source = open_source(tmp_path / "list.parquet")
    *read, missing = source.read(SHAPE)
    assert [(record.label, record.image[2, 0, 0]) for record in read] == [(0, 255), (1, 255)]
    assert f"{tmp_path / 'img/none.png'}: expected an image file, got no such file" in missing.reason
    said = f"images are files: the column 'image' has their paths, relative to {tmp_path}"
    assert (said in source.remarks) == (kind != "null bytes")
