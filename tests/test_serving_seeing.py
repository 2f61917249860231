"""What the page asks the server for beside searches: changed queries, and what scores are usual."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.index.columns import FEATURE
from tmm_engine.index.descriptors.columns import ROBUST_FEATURE
from tmm_engine.query import Query
from tmm_engine.serving.changing import changed
from tmm_engine.serving.likeness import Likeness
from tmm_engine.serving.requests import SearchParameters

SEARCH = "/collections/photos/search"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    write_photos(folder / "photos", count=40)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=1)
    return folder / "photos.idx"


@pytest.fixture(scope="module")
def client(index: Path) -> Iterator[httpx.Client]:
    with running({"photos": index}) as client:
        yield client


@pytest.fixture(scope="module")
def engine(index: Path) -> Iterator[Engine]:
    with Engine.open(index, device="cpu") as engine:
        yield engine


def as_changed(query: Query, **asked) -> np.ndarray:
    return changed(query, SearchParameters(**asked)).pixels


@pytest.fixture
def grey() -> Query:
    rng = np.random.default_rng(0)
    return Query("q", rng.integers(0, 256, (3, 40, 60)).astype(np.float32) / np.float32(255))


def test_a_query_that_is_not_changed_is_itself(grey: Query):
    assert changed(grey, SearchParameters(seed=3)) is grey


def test_darkened_is_a_share_of_the_light(grey: Query):
    assert np.abs(as_changed(grey, darken=0.75) - 0.25 * grey.pixels).max() <= 0.5 / 255 + 1e-6
    assert not as_changed(grey, darken=1).any()


def test_noise_has_the_deviation_that_is_asked_for_and_is_drawn_by_the_seed():
    grey = Query("q", np.full((3, 64, 64), 0.5, dtype=np.float32))
    noisy = as_changed(grey, noise=0.1)
    assert np.std(noisy) == pytest.approx(0.1, rel=0.05)
    assert np.array_equal(noisy, as_changed(grey, noise=0.1))
    assert not np.array_equal(noisy, as_changed(grey, noise=0.1, seed=1))


def test_blur_is_of_a_share_of_the_shorter_side():
    point = np.zeros((1, 41, 81), dtype=np.float32)
    point[0, 20, 40] = 1.0
    profile = as_changed(Query("q", point), blur=0.05).sum(axis=(0, 1))
    deviation = np.sqrt((profile * (np.arange(81) - 40) ** 2).sum() / profile.sum())
    assert deviation == pytest.approx(0.05 * 41, rel=0.15)


def test_a_changed_query_is_answered_for_as_the_changed_picture_is(
    client: httpx.Client, engine: Engine, tmp_path: Path
):
    [path] = write_queries(tmp_path, count=1).iterdir()
    asked = {"darken": 0.5, "blur": 0.1, "noise": 0.2, "seed": 7}
    response = client.post(SEARCH, files={"image": path.read_bytes()}, data={k: str(v) for k, v in asked.items()})
    [found] = response.json()["results"]
    original = np.asarray(Image.open(path))[None].astype(np.float32) / np.float32(255)
    pixels = as_changed(Query("q", original), **asked)
    expected = engine.search(np.rint(pixels * 255).astype(np.uint8), k=10)
    assert [(hit["id"], hit["score"]) for hit in found["hits"]] == [(hit.id, hit.score) for hit in expected.hits]
    assert [hit.id for hit in expected.hits] != [hit.id for hit in engine.search(path, k=10).hits]


def test_an_exemplar_can_be_changed_too(client: httpx.Client, engine: Engine):
    id_ = str(engine.store.ids[0])
    for darken in (0.0, 0.9):
        [found] = client.post(SEARCH, json={"query": {"id": id_}, "mode": "l2", "darken": darken}).json()["results"]
        assert (found["hits"][0]["score"] > -1e-4) == (darken == 0)


@pytest.mark.parametrize("asked", [{"darken": 1.1}, {"blur": 0.6}, {"noise": -0.1}, {"seed": -1}])
def test_a_change_that_there_is_not_is_refused(client: httpx.Client, asked: dict):
    response = client.post(SEARCH, json={"query": {"id": "digit-0/0000.png"}, **asked})
    assert response.status_code == 422
    assert next(iter(asked)) in response.json()["detail"]


def test_usual_scores_are_those_of_the_nearest_other_exemplars(client: httpx.Client, engine: Engine):
    told = client.get("/collections/photos/likeness").json()
    assert told["sample"] == 40
    assert sorted(told["modes"]) == ["cosine", "l2", "robust"]
    for mode, found in told["modes"].items():
        features = engine.store.features(np.arange(40), column=ROBUST_FEATURE if mode == "robust" else FEATURE)
        scores = -np.linalg.norm(features[:, None] - features[None], axis=2)
        if mode != "l2":
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            scores = unit @ unit.T
        nearest = np.where(np.eye(40, dtype=bool), -np.inf, scores).max(axis=1)
        expected = [*np.quantile(nearest, [0.1, 0.5, 0.9]), np.median(scores[np.triu_indices(40, 1)])]
        assert [found[name] for name in ("low", "usual", "high", "any_two")] == pytest.approx(expected, abs=1e-4)


def test_one_exemplar_alone_has_no_usual_scores(engine: Engine):
    alone = engine.matching("id = 'digit-0/0000.png'")
    assert Likeness(alone.store).told() == {"sample": 1, "modes": {}}
