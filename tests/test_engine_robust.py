"""Mode robust through the engine: what it finds under noise, on disk, in memory, after changes, and how it fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from tests.digits import IMAGES, LABELS, make_classifier, write_photos, write_queries
from tmm_engine import Engine, Query, build_index
from tmm_engine.cli.main import main
from tmm_engine.describing import DEFAULT_VIEWS
from tmm_engine.index import ArraySource, ImageError, InputError
from tmm_engine.index.descriptors.calibration import calibrate
from tmm_engine.index.descriptors.columns import COPY_FEATURE, DESCRIPTORS, ROBUST_FEATURE
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.verify import verify_index

N = 300


def source(start: int = 0, stop: int = N) -> ArraySource:
    return ArraySource(
        IMAGES[start:stop],
        LABELS[start:stop],
        ids=[f"{n:04d}" for n in range(start, stop)],
        metadata={"page": [*range(start, stop)]},
    )


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("robust") / "digits.idx"
    build_index(source(), path, classifier, views=2)
    return path


@pytest.fixture(scope="module")
def engine(built: Path) -> Engine:
    return Engine.open(built, device="cpu")


def pixels(number: int) -> np.ndarray:
    return (IMAGES[number][None] / np.float32(255)).astype(np.float32)


def noisy(number: int) -> np.ndarray:
    """Dark, and a little noisy."""
    noise = np.random.default_rng(number).normal(0, 0.02, (1, 8, 8)).astype(np.float32)
    return np.clip(0.4 * pixels(number) + noise, 0, 1)


def found(engine: Engine, query, **options) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in engine.search(query, **options).hits]


def test_it_is_the_default_and_says_what_it_did(engine: Engine):
    result = engine.search(noisy(12), k=5)
    assert (result.mode, result.config, result.scored, result.backend) == ("robust", None, N, "matrix products, fp32")
    assert result.score_meaning == "cosine similarity of robust descriptors"
    assert all(hit.confidence is None for hit in result.hits)
    assert result.hits[0].id == result.recognised_as == "0012"
    assert result.notes == ("recognised as 0012: ranked by what is like that exemplar",)


def test_under_noise_exemplars_find_themselves_where_cosine_does_not(engine: Engine):
    def changed(number: int) -> np.ndarray:
        noise = np.random.default_rng(number).normal(0, 0.05, (1, 8, 8)).astype(np.float32)
        return np.clip(0.3 * pixels(number) + 0.3 + noise, 0, 1)

    first = {
        mode: np.mean([engine.search(changed(n), k=1, mode=mode).hits[0].id == f"{n:04d}" for n in range(0, N, 5)])
        for mode in ("robust", "cosine")
    }
    assert first["robust"] > first["cosine"] + 0.2, first


def test_without_recognition_nothing_is_moved(engine: Engine):
    plain = engine.search(noisy(12), k=N, recognition=False)
    assert (plain.recognised_as, plain.recognised_share, plain.notes) == (None, None, ())
    moved = engine.search(noisy(12), k=N)
    as_itself = engine.search(engine.exemplar("0012"), k=N, recognition=False)
    assert moved.hits[0].score > plain.hits[0].score
    np.testing.assert_allclose(
        [hit.score for hit in moved.hits], [hit.score for hit in as_itself.hits], atol=2e-3
    )  # the share is nearly 1


def test_scores_are_cosines_of_the_stored_descriptors(engine: Engine):
    rows = np.arange(N)
    stored = engine.store.features(rows, column=ROBUST_FEATURE)
    query = stored[7]
    hits = engine.search(engine.exemplar("0007"), k=N, recognition=False).hits
    expected = dict(zip(engine.store.ids, stored @ query, strict=True))
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.id] for hit in hits], atol=1e-5)


def test_disk_and_memory_answer_alike(engine: Engine, classifier: Classifier):
    memory = Engine.from_arrays(IMAGES[:N], LABELS[:N], classifier, ids=[f"{n:04d}" for n in range(N)], views=2)
    for query in (noisy(12), pixels(N + 5)):
        ours, theirs = found(engine, query, k=N), found(memory, query, k=N)
        assert dict(ours).keys() == dict(theirs).keys()
        for id_, score in ours:
            assert score == pytest.approx(dict(theirs)[id_], abs=1e-4)


def test_a_list_is_answered_as_each_alone(engine: Engine):
    queries = [noisy(n) for n in (3, 4, 5)]
    together = [[(hit.id, hit.score) for hit in result.hits] for result in engine.search(queries, alone=True)]
    assert together == [found(engine, query) for query in queries]


def test_a_filter_answers_as_an_index_of_the_rest(engine: Engine):
    narrowed = engine.search(noisy(12), k=N, where="page >= 100")
    assert len(narrowed.hits) == N - 100
    everything = dict(found(engine, noisy(12), k=N, recognition=False))
    for id_, score in found(engine, noisy(12), k=N, where="page >= 100", recognition=False):
        assert score == pytest.approx(everything[id_], abs=1e-12)


def test_what_is_added_later_is_described_as_the_rest(built: Path, tmp_path: Path, classifier: Classifier):
    path = tmp_path / "grown.idx"
    build_index(source(), path, classifier, views=2)
    with Engine.open(path, device="cpu") as grown:
        grown.add(source(N, N + 20))
        grown.delete(ids=["0003"])
        assert grown.search(noisy(N + 7), k=1).hits[0].id == f"{N + 7:04d}"
        assert "0003" not in dict(found(grown, noisy(3), k=N))
        again = grown.store.features(np.arange(5), column=COPY_FEATURE)
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1.0, rtol=1e-5)
    assert verify_index(path).findings == []


def test_an_approximate_index_serves_it_too(tmp_path: Path, classifier: Classifier):
    path = tmp_path / "hnsw.idx"
    build_index(source(), path, classifier, views=1, neighbours="HNSW16")
    with Engine.open(path, device="cpu") as engine:
        assert engine.search(noisy(12), k=1).hits[0].id == "0012"


def test_few_constant_and_single_exemplars_are_searched(classifier: Classifier):
    for images in (IMAGES[:1], IMAGES[:2], np.full((30, 8, 8), 90, dtype=np.uint8)):
        result = Engine.from_arrays(images, None, classifier).search(pixels(5), k=3)
        assert len(result.hits) == min(3, len(images))
        assert all(np.isfinite(hit.score) for hit in result.hits)


class Standardising(nn.Module):
    """Divides each image by its own deviation: of a constant one it makes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.head = nn.Conv2d(1, 20, 3), nn.Linear(20, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean, spread = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
        return self.head(self.maps((images - mean) / spread).relu().mean((2, 3)))


def test_what_the_model_cannot_digest_is_named_and_never_measured_on():
    classifier = Classifier.from_module(Standardising(), image_shape=(1, 8, 8))
    engine = Engine.from_arrays(IMAGES[:80], None, classifier, views=1)
    flat = np.zeros((1, 8, 8), dtype=np.uint8)
    for mode in ("robust", "l2", "cosine"):
        with pytest.raises(ImageError, match=r"query 0: .* not finite numbers \(is the image constant\?\)"):
            engine.search(flat, mode=mode)
        [good, bad] = engine.search_each([pixels(3), flat], mode=mode, k=1)
        assert good.hits[0].id == "00000003"
        assert "not finite" in bad.error
    chosen = calibrate(np.concatenate([IMAGES[:80, None], flat[None]]), None, classifier, queries=10)
    assert all(np.isfinite(each["mrr"]) for each in chosen.report["recognisers"])
    without = Engine.from_arrays(np.concatenate([IMAGES[:80, None], flat[None]]), None, classifier)
    assert len(without) == 80
    assert without.report is not None
    [skipped] = without.report.skipped
    assert skipped.id == "00000080"
    assert "finite" in skipped.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 11}, "views: expected 1 to 10, or 0 for no descriptors, got 11"),
        ({"views": -1}, "views: expected 1 to 10"),
        ({"views": True}, "views: expected 1 to 10"),
        ({"views": 0, "recogniser": "layer1"}, "recogniser has no effect without descriptors"),
        ({"recogniser": "layr1"}, r"no layer 'layr1' \(did you mean 'layer1'\?\)"),
        ({"recogniser": "layer1:3"}, "expected a layer such as 'layer2'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, classifier: Classifier, options: dict[str, object], message: str
):
    with pytest.raises(InputError, match=message):
        build_index(source(), tmp_path / "a.idx", classifier, **options)
    assert list(tmp_path.iterdir()) == []


def test_damaged_descriptors_are_told_when_the_index_is_opened(tmp_path: Path, classifier: Classifier):
    path = tmp_path / "a.idx"
    build_index(source(0, 60), path, classifier, views=1)
    content = bytearray((path / DESCRIPTORS).read_bytes())
    content[-1] ^= 1
    (path / DESCRIPTORS).write_bytes(bytes(content))
    with pytest.raises(IndexStateError, match="SHA-256 is another"):
        Engine.open(path)


# ---------------------------------------------------------------------------------------- command line


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_builds_searches_and_tells(tmp_path: Path):
    write_photos(tmp_path / "photos", count=80)
    write_queries(tmp_path / "queries", count=1)
    make_classifier().save(tmp_path / "w.safetensors")
    index = tmp_path / "photos.idx"
    build = ("build-index", tmp_path / "photos", index, "--weights", tmp_path / "w.safetensors")
    built = run(*build, "--views", 2, "--recogniser", "layer1:2x2")
    assert built.exit_code == 0, built.stderr
    assert "mode robust: ranks by " in built.stderr
    assert "recognises copies by layer1:2x2; chosen on 80 images" in built.stderr
    answer = run("search", index, tmp_path / "queries", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert json.loads(answer.stdout)["mode"] == "robust"
    assert [*Manifest.read(index).columns] == ["feature", COPY_FEATURE, ROBUST_FEATURE, "stretched_feature"]
    told = json.loads(run("info", index, "--json").stdout)
    assert told["descriptors"]["recogniser"] == "layer1:2x2"
    assert told["descriptors"]["views"] == 2
    shown = run("info", index).stdout
    assert "layer1:2x2" in shown
    assert "pixels:8x8" in shown
    refused = run(*build, "--overwrite", "--recogniser", "layer9")
    assert refused.exit_code == 1
    assert "no layer 'layer9'" in refused.stderr


def test_the_default_number_of_views_is_the_same_everywhere():
    shown = " ".join(run("build-index", "--help").stdout.split())
    assert f"[default: {DEFAULT_VIEWS}; 0<=x<=10]" in shown


def test_a_query_object_keeps_its_label(engine: Engine):
    result = engine.search(Query("mine", noisy(4), int(LABELS[4])))
    assert (result.query, result.true_label) == ("mine", int(LABELS[4]))


def test_among_few_exemplars_a_copy_is_told_of_with_its_doubt():
    few = Engine.from_arrays(IMAGES[:60], LABELS[:60], make_classifier())
    [note] = few.search(noisy(12), k=5).notes
    assert note.endswith("is like that exemplar; with 60 exemplars a stranger is sometimes taken for one")
