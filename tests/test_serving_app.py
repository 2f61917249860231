"""The server, asked over HTTP: its answers are those of `Engine`, and its errors are in the command line's words."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.rerank.settings import preset
from tmm_engine.serving.keys import Keys, Right
from tmm_engine.serving.settings import Limits, Settings
from tmm_engine.serving.wire import decoded

SEARCH = "/collections/photos/search"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits."""
    folder = tmp_path_factory.mktemp("serving")
    write_photos(folder / "photos", count=60)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=2)
    return folder / "photos.idx"


@pytest.fixture(scope="module")
def query(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A digit that is no exemplar."""
    folder = write_queries(tmp_path_factory.mktemp("queries"), count=1)
    return next(folder.iterdir()).read_bytes()


@pytest.fixture(scope="module")
def client(index: Path) -> Iterator[httpx.Client]:
    limits = Limits(body_bytes=1 << 20, pixels=10_000, images=4)
    with running({"photos": index}, Settings(limits=limits)) as client:
        yield client


@pytest.fixture(scope="module")
def engine(index: Path) -> Iterator[Engine]:
    with Engine.open(index, device="cpu") as engine:
        yield engine


def as_json(image: bytes, **options) -> dict:
    return {"query": {"image": base64.b64encode(image).decode()}, **options}


def plain(result: dict) -> dict:
    """An answer without what differs from run to run, as JSON has it."""
    return json.loads(json.dumps({name: result[name] for name in result if name not in ("query", "timings")}))


@pytest.mark.parametrize("mode", ["robust", "l2", "cosine"])
def test_answers_are_those_of_the_engine_to_the_last_bit(client: httpx.Client, engine: Engine, query: bytes, mode: str):
    expected = plain(engine.search(query, mode=mode, k=5).to_json())
    image = base64.b64encode(query).decode()
    forms = (
        client.post(SEARCH, json={"query": {"image": image}, "mode": mode, "k": 5}),
        client.post(SEARCH, json={"query": [{"image": f"data:image/png;base64,{image}"}], "mode": mode, "k": 5}),
        client.post(SEARCH, files={"image": ("query.png", query)}, data={"mode": mode, "k": "5"}),
        client.post(SEARCH, content=query, headers={"content-type": "image/png"}, params={"mode": mode, "k": 5}),
    )
    for response in forms:
        assert response.status_code == 200, response.text
        [found] = response.json()["results"]
        meanings = {name: found.pop(name) for name in ("score_meaning", "confidence_meaning")}
        assert plain(found) == expected
        assert "distance" in meanings["score_meaning"] or "cosine" in meanings["score_meaning"]


@pytest.mark.parametrize("batched", [False, True])
def test_images_of_other_requests_pass_the_network_too_only_where_that_is_said(
    index: Path, engine: Engine, query: bytes, batched: bool, monkeypatch: pytest.MonkeyPatch
):
    asked, each = [], Engine.search_each
    monkeypatch.setattr(
        Engine, "search_each", lambda self, queries, options: asked.append(options) or each(self, queries, options)
    )
    with running({"photos": index}, Settings(batched=batched)) as client:
        for mode in ("robust", "tmm"):
            settings = {"settings": ["trigger.steps=3", "head.min_steps=3"]} if mode == "tmm" else {}
            [found] = client.post(SEARCH, json=as_json(query, mode=mode, k=5, **settings)).json()["results"]
            if mode == "robust":
                assert plain(found)["hits"] == plain(engine.search(query, k=5).to_json())["hits"]
    assert [options.alone for options in asked if options.mode == "robust"][-1] is not batched
    assert not any(options.alone for options in asked if options.mode == "tmm")


def test_tmm_over_http_has_its_settings_and_arrays(client: httpx.Client, engine: Engine, query: bytes):
    settings = ["trigger.steps=3", "head.min_steps=3"]
    body = as_json(query, preset="paper", settings=settings, candidates=20, pixels=True, pictures=True)
    [found] = client.post(SEARCH, json=body).json()["results"]
    expected = engine.search(query, config=preset("paper").with_settings(settings), candidates=20)
    assert found["mode"] == "tmm"
    assert [hit["score"] for hit in found["hits"]] == [hit.score for hit in expected.hits]
    for name in ("query_image", "trigger", "triggered_query"):
        np.testing.assert_array_equal(decoded(found[name]), getattr(expected, name))
    np.testing.assert_array_equal(decoded(found["hits"][3]["image"]), expected.hits[3].image)
    shown = base64.b64decode(found["pictures"]["query"].partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(shown))), expected.query_image[0])
    assert set(found["pictures"]) == {"query", "trigger", "triggered"}


def test_a_list_has_errors_in_their_places_and_exemplars_among_its_queries(client: httpx.Client, query: bytes):
    good, bad = base64.b64encode(query).decode(), base64.b64encode(b"no image").decode()
    queries = [{"id": "digit-3/0003.png"}, {"image": bad, "name": "odd.png"}, {"image": good}]
    response = client.post(SEARCH, json={"query": queries, "k": 1})
    first, second, third = response.json()["results"]
    assert first["hits"][0]["id"] == "digit-3/0003.png"
    assert set(second) == {"query", "error"}
    assert second["query"] == "odd.png"
    assert "expected an image" in second["error"]
    assert third["query"] == "query 2"


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"mode": "cosin"}, 422, "unknown mode 'cosin' (did you mean 'cosine'?)"),
        ({"where": "label = 'digit-33'"}, 422, "no label is called 'digit-33' (did you mean 'digit-3'?)"),
        ({"where": "id ="}, 422, "where: expected a condition in SQL"),
        ({"where": "id = 'none'"}, 422, "no exemplar matches"),
        ({"k": True}, 422, "k: expected no truth value, got true"),
        ({"recognition": True}, 422, "recognition: expected no truth value, got true"),
        ({"k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"preset": "fast", "mode": "l2"}, 422, "preset has no effect with mode l2"),
        ({"settings": ["blend"]}, 422, "blend"),
        ({"kk": 3}, 422, "kk: Extra inputs are not permitted"),
        ({"query": {"id": "digit-3/003.png"}}, 422, "no exemplar has the id 'digit-3/003.png' (did you mean"),
        ({"query": []}, 422, "expected an image or the id of an exemplar, got none"),
        ({"query": [{"id": "digit-3/0003.png"}] * 5}, 413, "at most 4 queries"),
        ({"query": {"image": "?"}}, 422, "expected an image file in base64"),
        ({"query": {"image": ""}}, 422, "0 bytes"),
    ],
)
def test_what_is_wrong_is_said_as_the_command_line_says_it(
    client: httpx.Client, query: bytes, options: dict, status: int, words: str
):
    response = client.post(SEARCH, json=as_json(query) | options)
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, response.json()["status"]) == (status, status)
    assert words in response.json()["detail"]


def test_bodies_that_are_none_of_the_three(client: httpx.Client, query: bytes):
    assert client.post(SEARCH, content=query).status_code == 415
    assert client.post(SEARCH, content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert client.post(SEARCH, content=b"[]", headers={"content-type": "application/json"}).status_code == 422
    assert client.post(SEARCH, content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    assert client.post(SEARCH, data={"k": "1"}, files={"picture": query}).status_code == 422


def test_uploads_are_bounded_before_they_are_decoded(client: httpx.Client):
    large = client.post(SEARCH, content=bytes(2 << 20), headers={"content-type": "image/png"})
    streamed = client.post(SEARCH, content=iter([bytes(1 << 20)] * 2), headers={"content-type": "image/png"})
    for refused in (large, streamed):
        assert (refused.status_code, refused.headers["content-type"]) == (413, "application/problem+json")
    buffer = io.BytesIO()
    Image.new("L", (200, 200)).save(buffer, "PNG")
    wide = client.post(SEARCH, content=buffer.getvalue(), headers={"content-type": "image/png"})
    assert wide.status_code == 422
    assert "expected at most 10000 pixels, got 200 × 200" in wide.json()["detail"]


def test_images_are_bounded_together_too(index: Path):
    buffer = io.BytesIO()
    Image.new("L", (100, 100)).save(buffer, "PNG")
    files = [("image", ("a.png", buffer.getvalue()))] * 17
    limits = Limits(pixels=10_000)
    with running({"photos": index}, Settings(limits=limits)) as client:
        assert client.post(SEARCH, files=files[:16]).status_code == 200
        refused = client.post(SEARCH, files=files)
        assert refused.status_code == 413
        assert "expected images of at most 160,000 pixels together, got 170,000" in refused.json()["detail"]
        exemplars = [{"id": str(n), "image": base64.b64encode(buffer.getvalue()).decode()} for n in range(17)]
        assert client.post("/collections/photos/exemplars", json={"exemplars": exemplars}).status_code == 413


def test_collections_are_described(client: httpx.Client, engine: Engine):
    [summary] = client.get("/collections").json()["collections"]
    assert summary == {"name": "photos", "version": 1, "exemplars": 60, "modes": ["robust", "tmm", "l2", "cosine"]}
    found = client.get("/collections/photos").json()
    assert found["facts"]["classes"] == list(engine.class_names)
    assert found["metadata"] == ["path"]
    missing = client.get("/collections/photo")
    assert missing.status_code == 404
    assert "no collection is called 'photo' (did you mean 'photos'?)" in missing.json()["detail"]


def test_exemplars_are_listed_and_shown(client: httpx.Client, engine: Engine):
    where = {"where": "label = 'digit-3'", "limit": 2, "start": 1}
    found = client.get("/collections/photos/exemplars", params=where).json()
    assert found["total"] == len(engine.matching("label = 'digit-3'"))
    assert [each["class_name"] for each in found["exemplars"]] == ["digit-3"] * 2
    own = client.get("/collections/photos/exemplars/digit-3/0003.png").json()
    assert (own["id"], own["class_name"], own["label_is_class"]) == ("digit-3/0003.png", "digit-3", True)
    missing = client.get("/collections/photos/exemplars/digit-3/003.png")
    assert (missing.status_code, "did you mean" in missing.json()["detail"]) == (404, True)


def test_pictures_of_exemplars_are_cached(client: httpx.Client, engine: Engine):
    address = "/collections/photos/images/digit-3/0003.png"
    stored = client.get(address)
    expected = engine.exemplar("digit-3/0003.png").pixels[0] * 255
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored.content))), np.rint(expected))
    small = client.get(address, params={"size": 20})
    assert Image.open(io.BytesIO(small.content)).size == (16, 16)
    again = client.get(address, params={"size": 20}, headers={"if-none-match": f'"other", {small.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(address, params={"size": 20_000}).status_code == 422


def test_health_needs_no_key_and_everything_else_does(index: Path, query: bytes):
    keys = Keys((("reading-key", Right.READ), ("writing-key", Right.WRITE)))
    with running({"photos": index}, Settings(keys=keys)) as client:
        assert client.get("/livez").json() == {"alive": True}
        assert client.get("/readyz").json() == {"ready": True, "collections": {"photos": True}}
        for headers in ({}, {"api-key": "reading-kex"}, {"api-key": ""}):
            refused = client.post("/collections/none/search", headers=headers)
            assert refused.status_code == 401
            assert "photos" not in refused.text
        allowed = client.post(SEARCH, json=as_json(query, k=1), headers={"api-key": "reading-key"})
        assert allowed.status_code == 200


def test_the_api_is_described_whole_and_its_page_asks_no_other_host(client: httpx.Client):
    described = client.get("/openapi.json").json()
    used = set(re.findall(r'"#/components/schemas/(\w+)"', client.get("/openapi.json").text))
    assert used <= described["components"]["schemas"].keys()
    for address in ("/docs", "/"):
        page = client.get(address)
        assert page.status_code == 200
        allowed = page.headers["content-security-policy"]
        assert "default-src 'self'" in allowed
        for script in re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL):
            assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in allowed
        assert "//" not in re.sub(r"<!--.*?-->|//.*", "", page.text)
        for file in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
            assert client.get(f"/{file}").status_code == 200, file


def test_classify_answers_as_the_engine(client: httpx.Client, engine: Engine, query: bytes):
    expected = engine.classify(query, k=2, alpha=0.2, mode="cosine")
    answer = client.post("/collections/photos/classify", json=as_json(query, k=2, alpha=0.2, mode="cosine")).json()
    [found] = answer["results"]
    assert plain(found) == plain(expected.to_json())
    several = {"image": [("good.png", query), ("bad.png", b"?")]}
    files = [("image", file) for file in several["image"]]
    good, bad = client.post("/collections/photos/classify", files=files).json()["results"]
    assert (good["query"], set(bad)) == ("good.png", {"query", "error"})
