"""Metadata beside a folder of images."""

from pathlib import Path

import pytest

from tests.digits import write_photos
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.folders import FolderSource
from tmm_engine.index.sources.records import ImageRecord, UnreadableImage

SHAPE = (1, 8, 8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", count=12)


def metadata(source: FolderSource) -> dict[str, dict]:
    return {record.id: record.metadata for record in source.read(SHAPE) if isinstance(record, ImageRecord)}


@pytest.mark.parametrize("key", ["file_name", "path", "id"])
def test_columns_have_their_types_and_belong_to_the_named_image(photos: Path, key: str):
    (photos / "metadata.csv").write_text(
        f'{key},place,height,age,indoors,taken,id 2\ndigit-3/0003.png,"a ""b"",\nc",1.5,7,true,2024-01-02,x\n'
        "digit-0/0000.png,é,2,8,false,2024-01-03,y\n"
    )
    source = FolderSource(photos)
    assert source.metadata_types == {
        "path": str, "place": str, "height": float, "age": int, "indoors": bool, "taken": str, "id_2": str,
    }  # fmt: skip
    found = metadata(source)
    assert len(found) == 12
    assert found["digit-3/0003.png"] == {
        "path": str(photos / "digit-3/0003.png"), "place": 'a "b",\nc', "height": 1.5, "age": 7, "indoors": True,
        "taken": "2024-01-02", "id_2": "x",
    }  # fmt: skip
    assert found["digit-0/0000.png"]["place"] == "é"
    assert set(found["digit-1/0001.png"].values()) == {str(photos / "digit-1/0001.png"), None}


def test_what_is_written_is_not_lost(photos: Path):
    (photos / "metadata.csv").write_text(
        "file_name,code,phone,big,version,weight,none\n"
        "digit-3/0003.png,007,+491,12345678901234567890,1.10,1.50,\ndigit-0/0000.png,7,,3,2,,\n"
    )
    source = FolderSource(photos)
    found = metadata(source)["digit-3/0003.png"]
    del found["path"]
    assert found == {
        "code": "007", "phone": "+491", "big": "12345678901234567890", "version": "1.10", "weight": 1.5, "none": None,
    }  # fmt: skip
    assert metadata(source)["digit-0/0000.png"]["code"] == "7"


def test_json_lines_are_read_and_what_they_cannot_say_is_said(photos: Path):
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "digit-3/0003.png", "code": "007", "n": 1, "mixed": 1, "tags": ["a"], "label": "three"}\n\n'
        '{"file_name": "digit-0/0000.png", "code": "é", "x": 0.5, "mixed": "one", "ok": true}\n'
    )
    source = FolderSource(photos)
    assert source.metadata_types == {
        "path": str, "code": str, "n": int, "mixed": str, "source_label": str, "x": float, "ok": bool,
    }  # fmt: skip
    found = metadata(source)["digit-3/0003.png"]
    assert (found["code"], found["n"], found["mixed"], found["x"]) == ("007", 1, "1", None)
    assert source.remarks[0].startswith("metadata.jsonl: columns left out: tags (list<")
    assert "the column 'label' is metadata" in source.remarks[1]
    for content, message in (("[1]\n", "an object in line 1"), ('{"a": 1}\n{', "JSON in line 2")):
        (photos / "metadata.jsonl").write_text(content)
        with pytest.raises(InputError, match=message):
            FolderSource(photos)
    (photos / "metadata.csv").touch()
    with pytest.raises(InputError, match="keep one"):
        FolderSource(photos)


def test_names_that_are_in_use_are_prefixed(photos: Path):
    (photos / "metadata.csv").write_text("file_name,path,label,row_digest\ndigit-3/0003.png,p,3,d\n")
    found = metadata(FolderSource(photos))["digit-3/0003.png"]
    assert (found["source_path"], found["source_label"], found["source_row_digest"]) == ("p", 3, "d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected CSV with a header line"),
        ("name,age\nx,1\n", "one of file_name, path, id"),
        ("file_name,file_name\nx,1\n", "expected different columns"),
        ("file_name,a,a\ndigit-3/0003.png,1,1\n", "expected different columns"),
        ("file_name,age\ndigit-3/0003.png,1\ndigit-3/0003.png,2\n", "every image once"),
        ("file_name,age\ndigit-3/0003.pn,1\n", r"no image is called .*did you mean 'digit-3/0003.png'"),
        ("file_name,age\ndigit-3/0003.png,1,2,3\n", "expected CSV"),
    ],
)
def test_tables_that_do_not_fit_are_refused(photos: Path, content: str, message: str):
    (photos / "metadata.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        FolderSource(photos)


def test_bytes_that_are_no_text_are_refused(photos: Path):
    for content in (b"file_name,note\ndigit-3/0003.png,\xff\xfe\n", b"\x00\x01\x02" * 100, b"file_name,\xff\nx,1\n"):
        (photos / "metadata.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"metadata\.csv"):
            FolderSource(photos)


def test_a_limit_does_not_make_names_unknown(photos: Path):
    (photos / "metadata.csv").write_text("file_name,age\ndigit-9/0009.png,1\n")
    assert len(metadata(FolderSource(photos, limit=2))) == 2


def test_files_whose_names_are_not_utf8_are_skipped_and_folders_refused(photos: Path):
    odd = photos / "digit-0" / b"\xff.png".decode("utf-8", "surrogateescape")
    odd.write_bytes((photos / "digit-0" / "0000.png").read_bytes())
    [skipped] = [record for record in FolderSource(photos).read(SHAPE) if isinstance(record, UnreadableImage)]
    assert skipped.id == "digit-0/\\udcff.png"
    assert "UTF-8" in skipped.reason
    odd.unlink()
    (photos / "digit-0").rename(photos / b"\xfe".decode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="UTF-8"):
        FolderSource(photos)
