"""`Engine`: opening, searching, refusing."""

import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tmm_engine as engine_package
import tmm_engine.index as index_package
import tmm_engine.rerank as rerank_package
from tests.digits import IMAGES, LABELS, SHORTLY, make_classifier
from tests.modes import in_mode, quick
from tmm_engine import Engine, Query
from tmm_engine.index import ArraySource, Classifier, ImageError, IndexStateError, InputError, ModelError
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.manifest import MANIFEST, Manifest, digest_of
from tmm_engine.rerank import PRESETS

QUICK = quick(trigger_steps=20, head_steps=30)
N = 150


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def memory(classifier: Classifier) -> Engine:
    return Engine.from_arrays(
        IMAGES[:N], LABELS[:N], classifier, metadata={"page": list(range(N))}, global_trigger=SHORTLY
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, classifier: Classifier) -> Path:
    path = tmp_path_factory.mktemp("engine") / "digits.idx"
    source = ArraySource(IMAGES[:N], LABELS[:N], metadata={"page": list(range(N))})
    write_index(source, path, classifier)
    return path


def answer(result: engine_package.SearchResult) -> list[tuple[str, float]]:
    return [(hit.id, hit.score) for hit in result.hits]


def test_the_public_surface():
    assert engine_package.__all__ == [
        "Audit", "Calibration", "Candidate", "Classification", "Classifications", "Engine", "Evidence", "Explanation",
        "FailedQuery", "Finding", "Hit", "Kind", "Known", "Mode", "Prefilter", "Query", "RayOptions", "Rule",
        "SearchOptions", "SearchResult", "SearchResults", "Version", "build_index", "repair_index", "verify_index",
        "write_audit", "write_html", "write_parquet", "write_png",
    ]  # fmt: skip
    assert rerank_package.__all__ == [
        "DEFAULT_PRESET", "GlobalRecipe", "PRESETS", "Ranking", "TmmConfig", "TmmNN", "preset",
    ]  # fmt: skip
    assert index_package.__all__ == [
        "ArraySource", "BuildReport", "Choice", "Classifier", "ExemplarStore", "ImageError", "ImageRecord",
        "ImageSource", "IndexStateError", "InputError", "MemoryStore", "Metric", "ModelError", "Neighbours",
        "TmmEngineError", "UnreadableImage", "decode_image", "open_source", "settled",
    ]  # fmt: skip
    for package in (engine_package, index_package, rerank_package):
        assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_the_index_on_disk_and_in_memory_answer_alike(index: Path, memory: Engine, mode: str):
    with Engine.open(index, device="cpu") as opened:
        for number in (200, 201):
            ours = opened.search(IMAGES[number], k=20, **in_mode(mode, QUICK))
            theirs = memory.search(IMAGES[number], k=20, **in_mode(mode, QUICK))
            assert answer(ours) == answer(theirs)
            assert [hit.metadata for hit in ours.hits] == [{"page": int(hit.id)} for hit in theirs.hits]
            assert [hit.label for hit in ours.hits] == [LABELS[int(hit.id)] for hit in ours.hits]
            assert all(np.array_equal(hit.image[0], IMAGES[int(hit.id)]) for hit in ours.hits)


@pytest.mark.parametrize("mode", ["tmm", "l2", "cosine"])
def test_results_carry_what_made_them(memory: Engine, mode: str):
    result = memory.search(IMAGES[200], k=5, **in_mode(mode, QUICK))
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    assert [hit.rank for hit in result.hits] == list(range(5))
    assert result.scored == result.exemplars == N
    assert result.query_image.dtype == np.uint8
    assert np.array_equal(result.query_image[0], IMAGES[200])
    assert result.seconds > 0
    if mode == "tmm":
        assert result.config == QUICK.to_json()
        assert {"embedding", "trigger", "pass", "tuning", "scoring"} <= result.timings.keys()
        assert result.trigger is not None
        assert np.linalg.norm(result.trigger) > 0.5
        assert all(hit.confidence is not None and 0 <= hit.confidence <= 1 for hit in result.hits)
    else:
        assert (result.config, result.trigger) == (None, None)
        assert all(hit.confidence is None for hit in result.hits)


def test_every_form_of_an_image_is_the_same_query(memory: Engine, tmp_path: Path):
    image = Image.fromarray(IMAGES[300])
    image.save(tmp_path / "query.png")
    forms = [
        tmp_path / "query.png",
        str(tmp_path / "query.png"),
        (tmp_path / "query.png").read_bytes(),
        BytesIO((tmp_path / "query.png").read_bytes()),
        image,
        IMAGES[300],
        IMAGES[300][None],
        IMAGES[300].astype(np.float32) / np.float32(255),
        torch.from_numpy(IMAGES[300]),
    ]
    results = memory.search(forms, k=4, mode="cosine")
    assert len({tuple(answer(result)) for result in results}) == 1
    assert results[0].query == str(tmp_path / "query.png")
    assert results[5].query == "query 5"


def test_floating_point_queries_keep_their_precision(memory: Engine):
    faint = IMAGES[300].astype(np.float32) / np.float32(255) * np.float32(0.999)
    assert answer(memory.search(faint, mode="l2")) != answer(memory.search(IMAGES[300], mode="l2"))


def test_what_was_assumed_of_a_query_is_among_the_answers_notes(memory: Engine, tmp_path: Path):
    dark = Image.fromarray(IMAGES[0].squeeze().astype(np.uint16) * 16)  # 12 bits in a file of 16
    dark.save(tmp_path / "dark.png")
    found = memory.search(tmp_path / "dark.png", k=1, mode="cosine")
    assert found.notes[0] == "the query was read as 12 bits, since no pixel of the 16-bit file is above 4095"
    assert not memory.search(IMAGES[0], k=1, mode="cosine").notes


def test_an_exemplar_finds_itself_and_stays_among_the_answers(memory: Engine):
    query = memory.exemplar("00000007")
    assert (query.name, query.label) == ("00000007", int(LABELS[7]))
    for mode in ("l2", "cosine"):
        assert memory.search(query, mode=mode).hits[0].id == "00000007"
    assert "00000007" in {hit.id for hit in memory.search(query, k=N, config=QUICK).hits}


@pytest.mark.parametrize("prefilter", ["l2", "cosine", "union"])
def test_candidates_are_the_prefilters_and_only_they_are_scored(memory: Engine, prefilter: str):
    result = memory.search(IMAGES[200], k=50, candidates=20, prefilter=prefilter, config=QUICK)
    assert (result.scored, len(result.hits)) == (20, 20)
    assert "50" in result.notes[0]
    found = {hit.id for hit in result.hits}
    near = {mode: [hit.id for hit in memory.search(IMAGES[200], k=20, mode=mode).hits] for mode in ("l2", "cosine")}
    if prefilter == "union":
        assert found <= {*near["l2"], *near["cosine"]}
        assert {*near["l2"][:10], *near["cosine"][:10]} <= found
    else:
        assert found == set(near[prefilter])


def test_more_candidates_than_exemplars_is_the_exact_search(memory: Engine):
    exact = memory.search(IMAGES[200], config=QUICK)
    assert answer(memory.search(IMAGES[200], candidates=10 * N, config=QUICK)) == answer(exact)


def test_same_seed_same_bytes_and_the_classifier_is_never_modified(memory: Engine):
    state = {name: value.clone() for name, value in memory.classifier.backbone.state_dict().items()}
    head = memory.classifier.head.weight.clone()
    first, second = (memory.search(IMAGES[200], k=N, config=QUICK) for _ in range(2))
    assert answer(first) == answer(second)
    assert first.trigger is not None
    assert second.trigger is not None
    assert first.trigger.tobytes() == second.trigger.tobytes()
    other = memory.search(IMAGES[200], k=N, config=QUICK.with_seed(1))
    assert answer(other) != answer(first)
    assert torch.equal(head, memory.classifier.head.weight)
    assert all(torch.equal(value, state[name]) for name, value in memory.classifier.backbone.state_dict().items())


def test_presets_by_name(memory: Engine):
    assert memory.search(IMAGES[200], k=3, candidates=10, config="paper").config == PRESETS["paper"].to_json()


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (IMAGES[0], {"mode": "tm"}, "did you mean 'tmm'"),
        (IMAGES[0], {"k": 0}, "at least 1"),
        (IMAGES[0], {"k": True}, "at least 1"),
        (IMAGES[0], {"candidates": 0}, "at least 1"),
        (IMAGES[0], {"candidates": 5, "prefilter": "cos"}, "unknown prefilter"),
        (IMAGES[0], {"config": "fats"}, "did you mean 'fast'"),
        (IMAGES[0], {"config": "paper", "label": 10}, "0 to 9"),
        (np.zeros((8, 9), np.uint8), {}, "expected an image of shape"),
        (np.full((8, 8), 2.0, np.float32), {}, r"\[0, 1\]"),
        (np.full((8, 8), np.nan, np.float32), {}, r"\[0, 1\]"),
        (np.zeros((8, 8), np.uint8), {"config": "paper"}, "ω = 0"),
        (Query("q", np.zeros((3, 8, 8), np.float32)), {}, "expected a query of shape"),
    ],
)
def test_bad_input_is_refused(memory: Engine, query: object, options: dict, message: str):
    with pytest.raises((InputError, ImageError), match=message):
        memory.search(query, **options)


def test_unlabelled_arrays_get_the_models_predictions_marked(classifier: Classifier):
    unlabelled = Engine.from_arrays(IMAGES[:30], None, classifier, global_trigger=None)
    hits = unlabelled.search(IMAGES[0], k=30, mode="l2").hits
    assert all(hit.label_is_predicted for hit in hits)
    predictions = {hit.id: unlabelled.search(IMAGES[int(hit.id)], k=1, mode="l2").predicted_label for hit in hits}
    assert {hit.id: hit.label for hit in hits} == predictions


def test_labels_outside_the_head_are_refused(classifier: Classifier):
    with pytest.raises(InputError, match="0 to 9"):
        Engine.from_arrays(IMAGES[:3], [0, 1, 10], classifier)


def test_another_model_is_refused(index: Path, tmp_path: Path):
    copy = tmp_path / "copy.idx"
    shutil.copytree(index, copy)
    make_classifier(seed=1).save(copy / "model.safetensors")
    manifest = Manifest.read(copy)
    digest = digest_of(copy / "model.safetensors")
    replace(manifest, files=manifest.files | {"model.safetensors": digest}).write(copy)
    with pytest.raises(ModelError, match="build the index again"):
        Engine.open(copy)


def test_an_own_module_has_to_be_given_again_and_must_be_the_same(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    write_index(
        ArraySource(IMAGES[:20], LABELS[:20]),
        tmp_path / "own.idx",
        Classifier.from_module(model, image_shape=(1, 8, 8)),
    )
    with pytest.raises(ModelError, match="model"):
        Engine.open(tmp_path / "own.idx")
    with Engine.open(tmp_path / "own.idx", model=model, device="cpu") as engine:
        assert engine.search(IMAGES[3], mode="l2").hits[0].id == "00000003"
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ModelError):
        Engine.open(tmp_path / "own.idx", model=other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "version"])
def test_a_damaged_index_is_an_error(index: Path, tmp_path: Path, damage: str):
    copy = tmp_path / "copy.idx"
    shutil.copytree(index, copy)
    data = next((copy / "exemplars.lance" / "data").iterdir())
    if damage == "missing":
        data.unlink()
    elif damage == "truncated":
        data.write_bytes(data.read_bytes()[:-10])
    elif damage == "manifest":
        (copy / MANIFEST).write_text("{")
    else:
        text = (copy / MANIFEST).read_text().replace('"format_version": 4', '"format_version": 99')
        assert "99" in text
        (copy / MANIFEST).write_text(text)
    with pytest.raises(IndexStateError):
        Engine.open(copy)


def test_a_query_whose_name_is_not_utf8_has_an_answer_that_can_be_printed(memory: Engine, tmp_path: Path):
    path = tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")
    stream = BytesIO()
    Image.fromarray(IMAGES[300]).save(stream, "PNG")
    path.write_bytes(stream.getvalue())
    assert memory.search(path, k=1, mode="l2").query == f"{tmp_path}/caf\\udce9.png"
    path.write_bytes(b"junk")
    [failed] = memory.search_each([path], k=1, mode="l2")
    assert (failed.query + failed.error).encode().count(b"caf\\udce9.png") == 2
