"""`index.json`: round trips, every kind of damage, sizes and digests."""

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import finished, start
from tmm_engine.index.columns import is_column_name
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.files import TEMPORARY
from tmm_engine.index.models.architectures import ModelSpec
from tmm_engine.index.store.manifest import (
    CACHE,
    EXEMPLARS,
    FORMAT_VERSION,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL,
    VERSIONS,
    FileDigest,
    Manifest,
    digest_files,
    sealed,
)

MODEL_SPEC = ModelSpec("resnet18", 3, 1, True, (8, 9), (0.5,), (0.25,), "fc")
GOOD = Manifest(
    version=3,
    change="added 2, “é”",
    created="2026-01-02T03:04:05+00:00",
    source="digits, “é” 日本 \x00\n",
    exemplars=7,
    skipped=0,
    image_shape=(1, 8, 9),
    columns={"feature": 4},
    class_names=("zero", "", "zwölf"),
    labels_predicted=False,
    model=MODEL_SPEC,
    fingerprint="f" * 64,
    neighbours="Flat",
    backend_speeds={},
    lance_version=1,
    files={"model.safetensors": FileDigest(3, "a" * 64), "exemplars.lance/data/x.lance": FileDigest(0, "b" * 64)},
)


def good() -> dict[str, Any]:
    """The content of a good `index.json`."""
    with tempfile.TemporaryDirectory() as folder:
        GOOD.write(Path(folder))
        content: dict[str, Any] = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    return content


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a manifest; its model and files as their own fields."""
    counts, text = st.integers(1, 2**63), st.text()
    channels, *size = draw(st.tuples(st.sampled_from([1, 3]), st.integers(1, 2**31), st.integers(1, 2**31)))
    classes = draw(st.integers(2, 6))
    parts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=6)
    paths = st.lists(parts.filter(lambda part: part != ".."), min_size=1, max_size=3).map("/".join)
    digests = st.tuples(st.integers(0, 2**63), st.text("0123456789abcdef", max_size=64))
    names = st.text().map(lambda text: f"{text}_feature").filter(is_column_name)
    per_channel = st.tuples(*[st.floats(0.001, 1.0)] * channels)
    return {
        "version": draw(counts),
        "change": draw(text),
        "created": draw(text),
        "source": draw(text),
        "exemplars": draw(counts),
        "skipped": draw(st.integers(0, 2**63)),
        "image_shape": (channels, size[0], size[1]),
        "columns": {"feature": draw(counts)} | draw(st.dictionaries(names, counts, max_size=3)),
        "class_names": tuple(draw(st.lists(text, min_size=classes, max_size=classes))),
        "labels_predicted": draw(st.booleans()),
        "model": (
            draw(text),
            classes,
            channels,
            draw(st.booleans()),
            tuple(size),
            draw(per_channel),
            draw(per_channel),
        ),
        "fingerprint": draw(text),
        "neighbours": draw(text),
        "backend_speeds": draw(st.dictionaries(st.text(), st.floats(0, 1e9), max_size=2)),
        "lance_version": draw(counts),
        "files": draw(st.dictionaries(paths, digests, max_size=4)),
    }


@settings(max_examples=50)
@given(fields())
def test_what_is_written_is_read(given):
    files = {name: FileDigest(*digest) for name, digest in given.pop("files").items()}
    manifest = Manifest(**given | {"model": ModelSpec(*given["model"]), "files": files})
    with tempfile.TemporaryDirectory() as folder:
        manifest.write(Path(folder))
        assert Manifest.read(Path(folder)) == manifest
        assert [path.name for path in Path(folder).iterdir()] == [MANIFEST]


def test_the_file_is_json_for_humans_and_others_may_read_it(tmp_path):
    GOOD.write(tmp_path)
    text = (tmp_path / MANIFEST).read_text(encoding="utf-8")
    assert "zwölf" in text
    assert text.startswith('{\n "format": "tmm-engine index",\n "format_version": 4,\n "sha256": "')
    assert (tmp_path / MANIFEST).stat().st_mode & 0o777 == 0o644


# ---- damage

MISSING = object()


def changed(*changes: tuple[str, Any], seal: bool = True) -> str:
    """A good manifest with values at dotted places replaced or removed, and its SHA-256 made to fit."""
    content = good()
    for place, value in changes:
        *parents, name = place.split(".")
        inside = content
        for parent in parents:
            inside = inside[parent]
        if value is MISSING:
            del inside[name]
        else:
            inside[name] = value
    fitting = sealed(content)["sha256"] if seal else content["sha256"]
    return json.dumps(content | {"sha256": fitting})


def wrong_values() -> dict[str, list[Any]]:
    """For every key the values of a wrong type or range."""
    return {
        "format": ["other", None, 1],
        "format_version": [0, 1, 2, 5, "2", "3", None, [3]],  # of what is in it not even 2
        "version": [0, -1, 1.5, "1", None],
        "change": [1, None, ["x"]],
        "created": [1, None, ["x"]],
        "source": [1, None, {}],
        "exemplars": [0, -1, 1.5, "7", None, [7], math.inf, math.nan],
        "skipped": [-1, 1.5, "0", None, math.inf],
        "image_shape": [
            [8, 9],
            [1, 8, 9, 1],
            [1, 8, 0],
            [1, -8, 9],
            [1, 8, math.inf],
            [1, 8, "x"],
            3,
            None,
            [[1], 8, 9],
        ],
        "columns": [
            *(None, 4, [], {}, ["feature"], {"another_feature": 4}, {"feature": 4, "label": 4}, {"feature": 4, "x": 4}),
            *({"feature": 4, "another_feature": wrong} for wrong in (0, -4, 4.5, "4", None, True)),
            *({"feature": wrong, "another_feature": 4} for wrong in (0, -4, 4.5, "4", None, True)),
        ],
        "class_names": [None, 3, ["a", "b"], ["a"] * 4, "ab", []],
        "other_labels": [3, "ab", {"a": 1}],
        "agreement": [3, [1], {"labelled": 1}, dict.fromkeys(("labelled", "compared", "agreeing", "chance"), "x")],
        "labels_predicted": ["yes", None, [], {}],
        "backend_speeds": [[], {"torch": "fast"}, None],
        "model": [None, {}, [], "resnet18", good()["model"] | {"extra": 1}, good()["model"] | {"num_classes": "3"}],
        "fingerprint": [None, 1, ["f"]],
        "neighbours": [None, 32, ["Flat"]],
        "lance_version": [0, -1, 1.5, "1", None],
        "files": [
            None,
            [],
            "x",
            {"a": None},
            {"a": 3},
            {"a": {}},
            {"a": {"bytes": 1}},
            {"a": {"bytes": "x", "sha256": ""}},
        ]
        + [{"a": {"bytes": math.inf, "sha256": ""}}, {"a": {"bytes": -1, "sha256": ""}}]
        + [{path: {"bytes": 1, "sha256": ""}} for path in ("/etc/passwd", "../x", "a/../../x", "a/..", "..")],
    }


def damaged() -> dict[str, str | bytes]:
    """By name: contents of `index.json` that must be refused."""
    whole = json.dumps(good())
    cases: dict[str, str | bytes] = {
        "empty": "",
        "cut short": whole[: len(whole) // 2],
        "not JSON": "<html>",
        "not text": b"\x80\xff\x00",
        "UTF-16": whole.encode("utf-16"),
        "not an object": "[1, 2]",
        "a string": '"tmm-engine index"',
        "null": "null",
        "an empty object": "{}",
        "deep nesting": "[" * 200_000,
        "deep nesting inside": changed(("source", 1)).replace(
            '"source": 1', '"source": ' + "[" * 100_000 + "]" * 100_000
        ),
        "a number of 10,000 digits": changed(("exemplars", 1)).replace(
            '"exemplars": 1', '"exemplars": ' + "9" * 10_000
        ),
        "1e999": changed(("image_shape", [1, 8, 77])).replace("77", "1e999"),
        "another key": changed(("surprise", 1)),
        "another value": changed(("exemplars", 8), seal=False),
        "no SHA-256": whole.replace('"sha256"', '"sha-256"', 1),
    }
    for key, values in wrong_values().items():
        cases[f"{key} is missing"] = changed((key, MISSING))
        cases |= {f"{key} = {json.dumps(value)}"[:80]: changed((key, value)) for value in values}
    return cases


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"global_trigger": False}, {"feature": 4}),
        ({"global_trigger": True}, {"feature": 4, "global_feature": 4, "stretched_feature": 4}),
    ],
)
def test_format_2_is_read_and_written_as_format_3(tmp_path, changes, columns):
    """It had one dimension, and a flag that stood for two more columns."""
    content = {key: value for key, value in good().items() if key != "columns"} | {"feature_dim": 4} | changes
    (tmp_path / MANIFEST).write_text(json.dumps(sealed(content, version=2)), encoding="utf-8")
    found = Manifest.read(tmp_path)
    assert found == dataclasses.replace(GOOD, columns=columns)
    found.keep(tmp_path)
    dataclasses.replace(found, version=4).write(tmp_path)
    assert Manifest.read(tmp_path, version=3) == found
    assert json.loads((tmp_path / VERSIONS / "3.json").read_text())["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize(
    "changes",
    [{}, {"feature_dim": 4}, {"global_trigger": False}]
    + [{"feature_dim": wrong, "global_trigger": True} for wrong in (0, -4, 4.5, "4", None, [4])]
    + [{"feature_dim": 4, "global_trigger": wrong} for wrong in ("no", None, 2, 1, {})],
)
def test_damage_of_format_2_is_found(tmp_path, changes):
    content = {key: value for key, value in good().items() if key != "columns"} | changes
    (tmp_path / MANIFEST).write_text(json.dumps(sealed(content, version=2)), encoding="utf-8")
    with pytest.raises(IndexStateError, match="damaged"):
        Manifest.read(tmp_path)


CHECK = """
import json, sys
from pathlib import Path
from tmm_engine.index.store.manifest import Manifest
for index in sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.name)):
    try:
        Manifest.read(index)
        say(json.dumps(["nothing", ""]))
    except Exception as error:
        say(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What reading each damaged manifest ends in, in a process without the tests' checks of argument types."""
    folder = tmp_path_factory.mktemp("damaged")
    cases = damaged()
    for number, content in enumerate(cases.values()):
        (folder / str(number)).mkdir()
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / str(number) / MANIFEST).write_bytes(raw)
    lines = [json.loads(line) for line in finished(start(CHECK, folder)).splitlines()]
    return {name: (kind, text) for name, (kind, text) in zip(cases, lines, strict=True)}


@pytest.mark.parametrize("name", damaged())
def test_damage_is_an_index_state_error(refusals, name):
    kind, text = refusals[name]
    assert kind == "IndexStateError", text
    assert MANIFEST in text or "format version" in text
    assert len(text) < 1000


def test_damage_says_what_is_wrong(refusals):
    assert "expected 'format': 'tmm-engine index'" in refusals['format = "other"'][1]
    assert f"index format version 1, this program reads 2 to {FORMAT_VERSION}" in refusals["format_version = 1"][1]
    assert "not what its 'sha256' says" in refusals["another value"][1]
    assert "not JSON" in refusals["cut short"][1]
    assert "KeyError: 'class_names'" in refusals["class_names is missing"][1]
    assert "2 class names for 3 classes" in refusals['class_names = ["a", "b"]'][1]
    assert "'../x' is not a path inside the index" in refusals['files = {"../x": {"bytes": 1, "sha256": ""}}'][1]


def test_no_index_there(tmp_path):
    with pytest.raises(IndexStateError, match="does not exist; make one with"):
        Manifest.read(tmp_path / "nothing")
    with pytest.raises(IndexStateError, match=r"it has no index\.json"):
        Manifest.read(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(IndexStateError, match="is not an index"):
        Manifest.read(tmp_path / "file")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(IndexStateError, match="cannot be read"):
        Manifest.read(tmp_path)


def test_every_flipped_byte_is_found_or_changes_nothing(tmp_path):
    GOOD.write(tmp_path)
    whole = (tmp_path / MANIFEST).read_bytes()
    found = 0
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        (tmp_path / MANIFEST).write_bytes(flipped)
        try:
            assert Manifest.read(tmp_path) == GOOD
        except IndexStateError:
            found += 1
    assert found > 0.8 * len(whole)  # the rest is white space


def test_older_versions_are_kept_and_read_by_number(tmp_path):
    for number in range(1, 4):
        manifest = dataclasses.replace(GOOD, version=number, source=f"version {number}")
        if number > 1:
            Manifest.read(tmp_path).keep(tmp_path)
        manifest.write(tmp_path)
    assert [Manifest.read(tmp_path, version=number).source[-1] for number in (1, 2, 3)] == ["1", "2", "3"]
    assert Manifest.read(tmp_path).version == 3
    for number in (0, -1, 4, 10**30):
        with pytest.raises(IndexStateError, match=rf"has the versions 1 to 3, not {number}"):
            Manifest.read(tmp_path, version=number)
    shutil.copy(tmp_path / VERSIONS / "1.json", tmp_path / VERSIONS / "2.json")
    with pytest.raises(IndexStateError, match="it says version 1"):
        Manifest.read(tmp_path, version=2)


def test_an_enormous_file_is_not_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(IndexStateError, match="larger than 64 MiB"):
        Manifest.read(tmp_path)


# ---- files


def index_of(folder: Path) -> dict[str, bytes]:
    """A folder with an index's files and others; returns those that count."""
    files = {
        MODEL: b"model",
        f"{EXEMPLARS}/data/a.lance": b"data",
        f"{EXEMPLARS}/_versions/1.manifest": bytes(range(256)) * 4096,
    }
    others = {MANIFEST: b"{}", f"{TEMPORARY}0": b"x", f"{CACHE}/flat.faiss": b"cache", f"{VERSIONS}/1.json": b"{}"}
    for name, content in (files | others).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


@pytest.mark.parametrize("needed", [True, False])
def test_digests_are_hashlibs(tmp_path, needed):
    """Also of what a column of features needs."""
    files = index_of(tmp_path)
    if needed:
        (tmp_path / "tau.safetensors").write_bytes(b"tau")
        files["tau.safetensors"] = b"tau"
    expected = {name: FileDigest(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()}
    assert digest_files(tmp_path) == expected


@pytest.mark.parametrize("name", [MODEL, f"{EXEMPLARS}/_versions/1.manifest"])
def test_sizes_that_differ_are_found(tmp_path, name):
    index_of(tmp_path)
    manifest = dataclasses.replace(GOOD, files=digest_files(tmp_path))
    manifest.check_sizes(tmp_path)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:-1])
    with pytest.raises(
        IndexStateError, match=rf"{Path(name).name} has {len(raw) - 1:,} bytes, expected {len(raw):,} bytes"
    ):
        manifest.check_sizes(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(IndexStateError, match=f"{Path(name).name} is missing, expected"):
        manifest.check_sizes(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "model.safetensors/inside", "", "exemplars.lance"])
def test_sizes_of_files_that_cannot_be(tmp_path, name):
    index_of(tmp_path)
    manifest = dataclasses.replace(GOOD, files={name: FileDigest(1, "a" * 64)})
    with pytest.raises(IndexStateError, match="is missing"):
        manifest.check_sizes(tmp_path)


@pytest.mark.parametrize("name", [MODEL, f"{EXEMPLARS}/_versions/1.manifest", f"{EXEMPLARS}/data/a.lance"])
def test_content_that_differs_at_equal_size_is_found(tmp_path, name):
    index_of(tmp_path)
    manifest = dataclasses.replace(GOOD, files=digest_files(tmp_path))
    manifest.check_digests(tmp_path, exemplars=True)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[-1] ^= 1
    (tmp_path / name).write_bytes(raw)
    manifest.check_sizes(tmp_path)
    with pytest.raises(IndexStateError, match=f"{Path(name).name} is not what was written"):
        manifest.check_digests(tmp_path, exemplars=True)
    if "/data/" in name:
        manifest.check_digests(tmp_path)  # which leaves out what is large
    else:
        with pytest.raises(IndexStateError, match="is not what was written"):
            manifest.check_digests(tmp_path)


def test_readers_see_the_old_or_the_new_manifest_and_never_half(tmp_path):
    variants = [dataclasses.replace(GOOD, source=letter * 200_000) for letter in "ab"]
    variants[0].write(tmp_path)
    done = threading.Event()

    def write() -> None:
        for turn in range(100):
            variants[turn % 2].write(tmp_path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert Manifest.read(tmp_path) in variants
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_the_address_of_a_server_is_told_from_a_folder_that_is_missing():
    with pytest.raises(IndexStateError, match=r"^http:/+localhost:8000/photos is the address of a server"):
        Manifest.read(Path("http://localhost:8000/photos"))
