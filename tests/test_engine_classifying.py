"""Classes by neighbours: scores against brute force, p-values against crepes, promises kept, bad input refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SHAPE, classifier_of, network
from tmm_engine import Calibration, Engine, build_index
from tmm_engine.classifying import kept
from tmm_engine.classifying.calibrating import calibrate_on_itself
from tmm_engine.classifying.classifying import shift
from tmm_engine.classifying.conformal import margins, p_values
from tmm_engine.classifying.nearness import class_scores
from tmm_engine.index import ArraySource, Classifier
from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import exact_scores
from tmm_engine.info import describe_index
from tmm_engine.options import SearchOptions
from tmm_engine.rerank import preset
from tmm_engine.scanning import ByRanking, ByVector
from tmm_engine.snapshot import Snapshot
from tmm_engine.verify import repair_index, verify_index

NAMES = ("dark", "bright")
N, HELD = 80, 60


def looks(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Dark and bright noise: images of two classes of the user's own, which any network tells apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    level = np.where(labels == 0, 70, 185)[:, None, None, None] + rng.normal(0, 25, (n, 1, 1, 1))
    return (level + rng.normal(0, 30, (n, *SHAPE))).clip(0, 255).astype(np.uint8), labels


def source(n: int, *, seed: int, name: str = "held-out") -> ArraySource:
    images, labels = looks(n, seed=seed)
    return ArraySource(images, labels, class_names=NAMES, name=name)


@pytest.fixture(scope="module")
def engine(classifier: Classifier) -> Engine:
    images, labels = looks(N, seed=0)
    return Engine.from_arrays(images, labels, classifier, class_names=NAMES, views=1)


@pytest.fixture(scope="module")
def calibrated(engine: Engine) -> Calibration:
    return engine.calibrate(source(HELD, seed=1), mode="cosine", name="by-cosine", k=5)


def test_scores_of_classes_are_means_over_the_nearest(engine: Engine):
    store, rng = engine.store, np.random.default_rng(0)
    classes = rng.integers(0, 3, N)
    classes[-2:] = 3  # fewer than k
    queries = store.features(np.arange(4)) + rng.normal(0, 0.1, (4, store.feature_dim)).astype(np.float32)
    for metric in Metric:
        ranked = [ByVector(query, "feature", metric) for query in queries]
        found = class_scores(store, ranked, classes, k=5)
        left_out = class_scores(store, ranked, classes, k=5, without=np.arange(4))
        for place, query in enumerate(queries):
            every = exact_scores(query, store.features(np.arange(N)), metric)
            for own in range(4):
                rows = np.flatnonzero(classes == own)
                np.testing.assert_allclose(found[place, own], np.sort(every[rows])[-5:].mean(), atol=1e-9)
                rows = rows[rows != place]
                np.testing.assert_allclose(left_out[place, own], np.sort(every[rows])[-5:].mean(), atol=1e-9)
    some = class_scores(store, [ByRanking(np.array([3, 5]), np.array([2.0, 1.0]))], classes, k=5)
    assert np.isneginf(some).sum() >= 2


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_a_margin_is_what_the_nearest_other_class_is_nearer(scores: list[float]):
    found = margins(np.array([scores]))[0]
    for own, score in enumerate(scores):
        others = [other for place, other in enumerate(scores) if place != own]
        assert found[own] == (max(others) - score if others else -score)


def test_a_class_without_a_score_is_as_strange_as_can_be():
    assert margins(np.array([[1.0, -np.inf, -np.inf]])).tolist() == [[-np.inf, np.inf, np.inf]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(-1, 10), min_size=1, max_size=5))
def test_p_values_count(calibrated: list[int], strange: list[int]):
    found = p_values(np.array(strange, dtype=float), np.sort(np.array(calibrated, dtype=float)))
    expected = [(1 + sum(a >= new for a in calibrated)) / (1 + len(calibrated)) for new in strange]
    np.testing.assert_allclose(found, expected)


@pytest.mark.slow
def test_p_values_are_those_of_crepes():
    crepes = pytest.importorskip("crepes")
    rng = np.random.default_rng(0)
    calibrated, strange = rng.integers(0, 20, 50).astype(float), rng.integers(-1, 21, (30, 4)).astype(float)
    reference = crepes.ConformalClassifier()
    reference.fit(calibrated)
    np.testing.assert_allclose(p_values(strange, np.sort(calibrated)), reference.predict_p(strange, smoothing=False))


def test_sets_cover_as_often_as_said(engine: Engine, calibrated: Calibration):
    images, labels = looks(150, seed=2)
    found = engine.classify([*images], mode="cosine", k=5, calibration=calibrated)
    right = [
        next(each.p_value for each in one.candidates if each.class_name == NAMES[label])
        for one, label in zip(found, labels, strict=True)
    ]
    for alpha in (0.1, 0.3):
        spread = 3 * np.sqrt(alpha * (1 - alpha) * (1 / len(right) + 1 / HELD))
        assert abs(np.mean(np.array(right) > alpha) - (1 - alpha)) < spread + 1 / HELD


def test_an_answer_says_what_it_rests_on(engine: Engine, calibrated: Calibration):
    images, labels = looks(5, seed=3)
    [one, *_] = engine.classify([*images], mode="cosine", k=5, alpha=0.2, calibration="by-cosine")
    name = NAMES[labels[0]]
    assert (one.class_name, one.calibration, one.alpha) == (name, "by-cosine", 0.2)
    assert engine.label_names[one.label] == name
    assert one.credibility == one.candidates[0].p_value
    assert one.confidence == 1 - one.candidates[1].p_value
    assert one.prediction_set == tuple(each.class_name for each in one.candidates if each.p_value > 0.2)
    assert (one.abstains is None) == (len(one.prediction_set) == 1)
    assert "80 of 100 images drawn like those of held-out" in one.guarantee
    assert [hit.class_name for hit in one.search.hits] == [name] * 5
    told = json.loads(json.dumps(one.to_json()))
    assert [hit["id"] for hit in told["hits"]] == [hit.id for hit in one.search.hits]
    table = one.to_arrow().to_pylist()
    assert table[0]["prediction_set"] == list(one.prediction_set)
    assert table[0]["neighbours"] == [hit.id for hit in one.search.hits]
    assert table[0]["error"] is None


def test_alone_and_among_others_the_answer_is_the_same(engine: Engine):
    images, _ = looks(6, seed=4)
    for mode in ("robust", "l2"):
        together = engine.classify([*images], mode=mode)
        alone = engine.classify(images[2], mode=mode)
        assert (alone.class_name, alone.credibility) == (together[2].class_name, together[2].credibility)
    assert engine.classify([]) == []


def test_without_a_calibration_exemplars_stand_in_each_left_out(engine: Engine):
    image = looks(1, seed=5)[0][0]
    one = engine.classify(image, k=3)
    assert one.calibration == "leave-one-out"
    assert "calibrate on labelled images" in one.guarantee
    exemplar = engine.classify(engine.exemplar("00000007"), mode="l2", k=3)  # itself among its neighbours
    assert exemplar.class_name == exemplar.true_class
    assert exemplar.calibration == "leave-one-out"


def test_what_is_like_nothing_is_an_outlier(engine: Engine, calibrated: Calibration):
    rng = np.random.default_rng(0)
    odd = (255 * rng.integers(0, 2, SHAPE)).astype(np.uint8)
    one = engine.classify(odd, mode="l2", outliers=0.05)
    assert one.outlier
    assert one.abstains is not None
    assert one.abstains.startswith("unlike everything")
    assert not engine.classify(odd, mode="l2", outliers=0.0).outlier
    few = engine.classify(odd, mode="cosine", k=5, calibration=calibrated, alpha=0.01)
    assert {note.split(" need")[0].split(" ")[0] for note in few.notes} == {"alpha", "outliers"}
    assert set(few.prediction_set) == set(NAMES)


def test_a_shift_of_many_images_is_told(engine: Engine, calibrated: Calibration):
    same = engine.classify([*looks(60, seed=6)[0]], mode="cosine", k=5, calibration=calibrated)
    assert same.notes == ()
    odd = [(255 * np.random.default_rng(seed).integers(0, 2, SHAPE)).astype(np.uint8) for seed in range(30)]
    [note] = engine.classify(odd, mode="cosine", k=5, calibration=calibrated).notes
    assert note.startswith("these 30 images are not like the calibration images")
    assert shift(np.zeros(19), calibrated) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected a share from 1e-06 to below 1"),
        ({"alpha": 1.0}, "alpha: expected"),
        ({"alpha": 5e-324}, "alpha: expected"),
        ({"outliers": 1.0}, "outliers: expected 0, or a share"),
        ({"calibration": "by-cosin"}, "no calibration 'by-cosin': there are by-cosine"),
        ({"calibration": "../x"}, "expected a calibration's name"),
        ({"calibration": "by-cosine", "k": 4}, "made with k 5, not 4"),
        ({"calibration": "by-cosine", "mode": "l2"}, "made with mode 'cosine', not 'l2'"),
        ({"mode": "tmm"}, "mode 'tmm' cannot be calibrated on the index itself"),
    ],
)
def test_bad_input_is_named(engine: Engine, calibrated: Calibration, settings: dict, message: str):
    asked = {"mode": "cosine", "k": 5} | settings
    if asked["mode"] == "tmm":
        asked["config"] = preset("paper").with_settings(["trigger.steps=3", "head.min_steps=3"])
    with pytest.raises(InputError, match=message):
        engine.classify(looks(1, seed=7)[0][0], **asked)


def test_a_calibration_that_overlaps_the_index_is_an_error(engine: Engine):
    images, labels = looks(N, seed=0)
    overlapping = ArraySource(
        np.concatenate([looks(3, seed=8)[0], images[:2]]), [0, 1, 0, *labels[:2].tolist()], class_names=NAMES
    )
    with pytest.raises(InputError, match="2 of the 5 images of arrays are in the index \\(00000003 = 00000000"):
        engine.calibrate(overlapping)


def test_a_calibration_needs_labels_that_the_index_has(engine: Engine):
    images, labels = looks(6, seed=9)
    with pytest.raises(InputError, match="expected labelled images"):
        engine.calibrate(ArraySource(images, None))
    with pytest.raises(InputError, match="labels of the index \\(dark, bright\\), got red, green"):
        engine.calibrate(ArraySource(images, labels, class_names=("red", "green")))
    with pytest.raises(InputError, match="other than 'leave-one-out'"):
        engine.calibrate(source(6, seed=9), name="leave-one-out")
    mixed = engine.calibrate(
        ArraySource(images, ["dark", "bright", "red", None, "dark", "bright"]), mode="l2", name="mixed"
    )
    assert len(mixed) == 5
    assert np.isinf(mixed.margins[-1])
    assert "1 images of arrays have no label" in mixed.notes[0]
    assert "1 of the 5 images have labels that no exemplar has (red)" in mixed.notes[1]


def test_one_class_no_labels_and_few_exemplars(classifier: Classifier):
    images, _ = looks(12, seed=10)
    with Engine.from_arrays(images[:6], [1] * 6, classifier, views=0) as one_class:
        one = one_class.classify(images[6], mode="l2", k=10)
        assert (one.class_name, one.confidence) == ("1", 1.0)
        assert any("there is nothing else to choose" in note for note in one.notes)
        assert any("k = 10 is more than" in note for note in one.notes)
    with Engine.from_arrays(images[:6], None, classifier, views=0) as unlabelled:
        notes = unlabelled.classify(images[6], mode="l2").notes
        assert any("6 of the 6 exemplars have no label of their own" in note for note in notes)
    single = Engine.from_arrays(images[:1], [0], classifier, views=0)
    with pytest.raises(InputError, match="at least 2 exemplars"):
        single.classify(images[6], mode="l2")


def test_an_index_keeps_its_calibrations_until_it_changes(tmp_path: Path):
    index, classifier = tmp_path / "a.idx", classifier_of(network())
    build_index(source(40, seed=0, name="exemplars"), index, classifier, views=0)
    query = looks(1, seed=11)[0][0]
    with Engine.open(index, model=network()) as engine:
        made = engine.calibrate(source(30, seed=1), mode="l2")
        before = engine.classify(query, mode="l2")
    with Engine.open(index, model=network()) as engine:
        after = engine.classify(query, mode="l2")
        assert after.calibration == made.name == "l2"
        assert (after.credibility, after.guarantee) == (before.credibility, before.guarantee)
        assert engine.classify(query, mode="cosine").calibration == "leave-one-out"
        assert describe_index(index)["calibrations"] == ["l2: 30 images of held-out, mode l2, k 10"]
        with pytest.raises(InputError, match="has no calibration 'l3': it has l2"):
            engine.classify(query, mode="l2", calibration="l3")
        engine.delete(ids=["00000003"])
        assert describe_index(index)["calibrations"][0].endswith("; made of other exemplars: make it anew")
        with pytest.raises(InputError, match="made when the index held other exemplars"):
            engine.classify(query, mode="l2")
        assert engine.classify(query, mode="l2", calibration="leave-one-out").calibration == "leave-one-out"
    kept = index / "calibrations" / "l2.json"
    kept.write_text(kept.read_text().replace("0.", "1.", 1))
    assert describe_index(index)["calibrations"] == ["l2: damaged; delete it, and calibrate anew"]
    with Engine.open(index, model=network()) as engine, pytest.raises(IndexStateError, match="damaged"):
        engine.classify(query, mode="l2")


def test_a_calibration_on_the_index_itself_is_computed_once_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, classifier = tmp_path / "a.idx", classifier_of(network())
    build_index(source(40, seed=0, name="exemplars"), index, classifier, views=0)
    queries = [*looks(3, seed=11)[0]]
    computed: list[str] = []

    def counted(snapshot: Snapshot, options: SearchOptions) -> Calibration:
        computed.append(str(options.where))
        return calibrate_on_itself(snapshot, options)

    monkeypatch.setattr(kept, "calibrate_on_itself", counted)

    def asked(engine: Engine, **options: object) -> list[tuple[float, float]]:
        found = engine.classify(queries, mode="l2", **options)  # type: ignore[call-overload]
        return [(one.credibility, one.familiarity) for one in found]

    with Engine.open(index, model=network()) as engine:
        first = asked(engine)
        assert asked(engine) == first
        assert len(computed) == 1
        assert asked(engine, k=3) != first
        for _ in range(2):
            assert asked(engine, where="label = 'dark'") != first
            asked(engine.matching("label = 'dark'"))  # another engine each time
        assert computed == ["None", "None", "label = 'dark'", "None", "None"]
    with Engine.open(index, model=network()) as engine:  # another process
        computed.clear()
        assert asked(engine) == first
        assert computed == []
        engine.delete(ids=[str(id_) for id_ in engine.store.ids[:15]])
        changed = asked(engine)
        assert len(computed) == 1
        assert changed != first
        assert verify_index(index, model=network()).findings == []
        for path in (index / "cache").glob("*.calibration"):
            path.write_text("{}")
        assert "calibration is damaged; searches ignore it" in str(verify_index(index, model=network()).findings)
        repair_index(index, model=network())
        assert not list((index / "cache").glob("*.calibration"))
    with Engine.open(index, model=network(), version=1) as engine:
        assert asked(engine) == first


def test_a_filter_leaves_its_exemplars_alone_to_answer(engine: Engine):
    one = engine.classify(looks(1, seed=12)[0][0], mode="l2", where="label = 'dark'")
    assert one.class_name == "dark"
    assert {each.class_name for each in one.candidates} == {"dark"}
