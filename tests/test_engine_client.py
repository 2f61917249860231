"""`Client` and `engine search http://…`: what they answer is what `Engine` answers, object by object."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.cli.main import main
from tmm_engine.client import Client, ServerError
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.rerank.settings import TmmConfig, preset
from tmm_engine.results import FailedQuery, SearchResult


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client")
    write_photos(folder / "photos", count=40)
    write_queries(folder / "queries", count=2)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=1)
    return folder


@pytest.fixture(scope="module")
def address(work: Path) -> Iterator[str]:
    with running({"photos": work / "photos.idx"}) as http:
        yield f"{http.base_url}/photos".replace("//photos", "/photos")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture(scope="module")
def engine(work: Path) -> Iterator[Engine]:
    with Engine.open(work / "photos.idx", device="cpu") as engine:
        yield engine


def assert_same(found: object, expected: object) -> None:
    """Everything but the seconds, to the last bit, and of the same classes."""
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    elif dataclasses.is_dataclass(expected):
        for each in dataclasses.fields(expected):
            if each.name != "timings":
                assert_same(getattr(found, each.name), getattr(expected, each.name))
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "cosine", "explain": True, "where": "label <> 'digit-3'", "recognition": 0.5},
        {"mode": "tmm", "candidates": 10, "config": preset("paper").with_settings(["trigger.steps=2", "blend=added"])},
        {"mode": "robust", "recognition": False},
    ],
)
def test_a_search_is_the_engines(client: Client, engine: Engine, work: Path, options: dict):
    query = work / "queries" / "query-200.png"
    assert_same(client.search(query, k=3, **options), engine.search(query, k=3, **options))


def test_lists_bytes_pictures_arrays_and_exemplars(client: Client, engine: Engine, work: Path):
    path = work / "queries" / "query-200.png"
    pixels = np.asarray(Image.open(path))
    items = [path, path.read_bytes(), Image.open(path), pixels, pixels[None], client.exemplar("digit-3/0003.png")]
    found = client.search(items, k=2, alone=True)
    expected = engine.search([*items[:-1], engine.exemplar("digit-3/0003.png")], k=2, alone=True)
    assert_same(tuple(found), tuple(expected))
    good, bad = client.search_each([path, b"?"], k=1)
    assert isinstance(good, SearchResult)
    assert isinstance(bad, FailedQuery)
    assert client.search_each([]) == []
    with pytest.raises(ImageError, match="expected an image"):
        client.search([path, b"?"])
    assert [type(each) for each in client.search_each(["/none.png", path])] == [FailedQuery, SearchResult]


def test_a_class_is_the_engines(client: Client, engine: Engine, work: Path):
    query = work / "queries" / "query-200.png"
    asked = {"k": 2, "alpha": 0.2, "mode": "l2"}
    expected = dataclasses.replace(engine.classify(query, **asked), query=str(query))
    assert_same(client.classify(query, **asked), expected)
    with pytest.raises(ImageError, match="expected an image"):
        client.classify(b"?")


@pytest.mark.parametrize("name", ["paper", "fast"])
def test_every_preset_arrives_as_it_is(name: str):
    from tmm_engine.client import _settings

    assert preset("paper").with_settings(_settings(preset(name))) == preset(name)
    assert TmmConfig().with_settings(_settings(preset(name))) == preset(name)


def test_changes_and_an_audit(client: Client, work: Path):
    before = client.describe()["exemplars"]
    assert client.put("new one", work / "queries" / "query-201.png", label="digit-1")["exemplars"] == before + 1
    assert client.search(work / "queries" / "query-201.png", k=1).hits[0].id == "new one"
    assert client.delete("new one")["exemplars"] == before
    name = "digit-1/../digit-3/./0003.png"  # no other exemplar's address
    with pytest.raises(InputError, match="expected an id that an address can have"):
        client.put(name, work / "queries" / "query-201.png")
    with pytest.raises(InputError, match=r"no exemplar has the id 'digit-1/\.\./digit-3"):
        client.delete(name)
    assert client.describe()["exemplars"] == before
    assert client.refresh()["refreshed"] is False
    seen = []
    found = client.audit(kinds=["duplicates"], progress=lambda *told: seen.append(told))
    assert set(found) >= {"findings", "rules", "notes"}


def test_what_is_wrong_is_said(client: Client, address: str):
    with pytest.raises(InputError, match="did you mean 'photos'"), Client(f"{address}s") as other:
        other.describe()
    with pytest.raises(InputError, match="no exemplar has the id"):
        client.search(client.exemplar("none"))
    with pytest.raises(InputError, match="mean 'cosine'"):
        client.search(b"", mode="cosin")
    with pytest.raises(ImageError, match=r"^/none\.png: expected an image file, got No such file"):
        client.search("/none.png")
    with pytest.raises(ServerError, match="cannot be reached"), Client("http://127.0.0.1:9/photos") as other:
        other.describe()
    with pytest.raises(InputError, match="expected an address"):
        Client("localhost:8000")


def lines(*arguments: object) -> list[dict]:
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_command_line_searches_a_server_as_a_folder(address: str, work: Path, tmp_path: Path):
    for options in (["--explain"], ["--mode", "cosine,l2"], ["--id", "digit-3/0003.png", "--recognition", "off"]):
        asked = [work / "queries" / "query-200.png", "-k", 2, "--json", *options]
        there, here = lines("search", address, *asked), lines("search", work / "photos.idx", *asked, "--device", "cpu")
        assert [each | {"timings": 0} for each in there] == [each | {"timings": 0} for each in here]
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(main, ["search", address, str(work / "queries"), "--html", str(page)])
    assert (shown.exit_code, page.exists()) == (0, True), shown.stderr
    assert "query-201.png" in shown.stdout
    refused = CliRunner().invoke(main, ["search", address, str(work / "queries"), "--verify"])
    assert (refused.exit_code, "--verify has no effect" in refused.stderr) == (2, True)


def test_a_key_is_taken_from_the_environment(work: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(request: httpx.Request) -> None:
        seen.append(request.headers.get("api-key"))

    seen: list[str | None] = []
    monkeypatch.setenv("TMM_ENGINE_READ_ONLY_API_KEY", "reading-key")
    made = httpx.Client.__init__
    monkeypatch.setattr(
        httpx.Client, "__init__", lambda self, **given: made(self, **given, event_hooks={"request": [wrong]})
    )
    CliRunner().invoke(main, ["search", "http://127.0.0.1:9/photos", str(work / "queries" / "query-200.png")])
    assert seen == ["reading-key"]
