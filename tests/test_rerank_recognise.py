"""Recognition: how far a query's features move to those of the exemplar that it may be a copy of, and what is found."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.configs import changed
from tests.robust import HEADS, OWN, RECIPE, ROBUST, N, by_row, store_with
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank import TmmNN
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.blending import apply_trigger
from tmm_engine.rerank.columns import GLOBAL_FEATURE, STRETCHED_FEATURE
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger
from tmm_engine.rerank.recognise import ROUNDING, Recognised, chord, comes_first, recognise_nearest
from tmm_engine.rerank.reference import reference_discriminant_scores
from tmm_engine.rerank.score import dummy_scores
from tmm_engine.rerank.settings import MIN_RECOGNITION, Score
from tmm_engine.rerank.tuning import TuningSet, tune_head

THRESHOLDS = st.floats(MIN_RECOGNITION, 1.0)
DISTANCES = st.floats(0.0, 1e6) | st.sampled_from([0.0, 5e-324, 1.0])
PAIRS = st.tuples(DISTANCES, DISTANCES).map(sorted).map(tuple)
FEATURES = hnp.arrays(np.float32, 5, elements=st.floats(-100.0, 100.0, width=32)).map(torch.from_numpy)


def share(ratio: float, threshold: float) -> float:
    return Recognised.nearest(0, (ratio, 1.0), threshold=threshold).share


@given(distances=PAIRS, threshold=THRESHOLDS)
def test_the_share_is_the_logistic_function_of_the_ratio_and_never_overflows(distances, threshold):
    found = Recognised.nearest(3, distances, threshold=threshold)
    first, second = (max(distance, ROUNDING) for distance in distances)
    ratio = first / second
    assert (found.row, found.ratio) == (3, ratio)
    assert 0.0 <= found.ratio <= 1.0
    assert 0.0 <= found.share <= 1.0
    logit = 20.0 * (threshold - ratio) / threshold
    expected = 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0
    assert found.share == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(distances=st.tuples(DISTANCES, DISTANCES, DISTANCES).map(sorted), threshold=THRESHOLDS)
def test_the_nearer_the_nearest_and_the_farther_the_second_the_more_it_moves(distances, threshold):
    near, between, far = distances
    of = partial(Recognised.nearest, 0, threshold=threshold)
    assert of((between, far)).share <= of((near, far)).share
    assert of((near, between)).share <= of((near, far)).share
    if near > ROUNDING:
        assert of((4.0 * near, 4.0 * far)).ratio == pytest.approx(of((near, far)).ratio, rel=1e-9)  # has no scale


@given(low=st.floats(0.5, 1.4), step=st.floats(1e-3, 1.4), threshold=st.floats(MIN_RECOGNITION, 1.0))
def test_around_the_threshold_the_share_falls_strictly(low, step, threshold):
    low, high = threshold * low, threshold * min(low + step, 1.45)
    assume(high <= 1.0)
    assert share(high, threshold) < share(low, threshold)


@given(threshold=THRESHOLDS)
def test_a_half_at_the_threshold_all_but_everything_at_zero_and_nothing_far_above(threshold):
    assert share(threshold, threshold) == 0.5
    assert 1.0 - share(0.0, threshold) == pytest.approx(math.exp(-20.0 * (1.0 - ROUNDING / threshold)), rel=1e-4)
    assume(4.0 * threshold <= 1.0)
    assert share(4.0 * threshold, threshold) < 1e-25


@given(threshold=THRESHOLDS, distance=DISTANCES)
def test_of_two_as_near_none_is_recognised(threshold, distance):
    found = Recognised.nearest(0, (distance, distance), threshold=threshold)
    assert found.ratio == 1.0
    assert found.share == share(1.0, threshold)
    assert found.share < 0.5 or threshold == 1.0
    assert Recognised.nearest(0, (0.0, 3e-4), threshold=threshold).ratio == 1.0  # a similarity of 1, rounded twice
    assert share(1.0, 0.8) == pytest.approx(1.0 / (1.0 + math.exp(5.0)))  # in the preset robust: 0.7 % of the way


@given(angle=st.floats(0.0, math.pi))
def test_a_chord_is_the_distance_of_directions_up_to_a_factor(angle):
    distance = math.dist((1.0, 0.0), (math.cos(angle), math.sin(angle)))
    assert math.sqrt(2.0) * chord(math.cos(angle)) == pytest.approx(distance, abs=1e-7)
    assert chord(1.0) == chord(math.nextafter(1.0, 2.0)) == chord(1.0 + 1e-6) == 0.0


@given(query=FEATURES, exemplar=FEATURES, part=st.floats(0.0, 1.0))
def test_features_move_on_the_line_between_the_two(query, exemplar, part):
    def moved(share: float) -> torch.Tensor:
        return Recognised(0, 0.3, share).moved(query, exemplar)

    assert torch.equal(moved(0.0), query)
    assert torch.equal(moved(1.0), exemplar)
    expected = (1.0 - part) * query.double() + part * exemplar.double()
    torch.testing.assert_close(moved(part).double(), expected, rtol=0.0, atol=1e-4)
    pairs = Recognised(0, 0.3, part).moved(torch.stack([query, exemplar]), torch.stack([exemplar, query]))
    assert torch.equal(pairs[0], moved(part))
    assert pairs.dtype == query.dtype


# ---- by plain neighbours


@given(
    features=FEATURES,
    scores=st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 100.0)).map(sorted),
    threshold=THRESHOLDS,
    further=st.lists(st.floats(100.0, 200.0), max_size=3),
)
def test_by_l2_it_is_the_ratio_of_distances_in_units_of_the_querys_length(features, scores, threshold, further):
    nearest = [(number + 7, -distance) for number, distance in enumerate([*scores, *further])]
    found = recognise_nearest(features, nearest, metric=Metric.L2, threshold=threshold)
    length = float(features.norm()) or 1.0  # of features that are zero any unit will do
    first, second = (distance / length for distance in scores)
    assert found is not None
    assert found.ratio == max(ROUNDING, first) / max(ROUNDING, second)
    assert found == Recognised.nearest(7, (first, second), threshold=threshold)


@given(
    features=FEATURES,
    cosines=st.tuples(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)).map(lambda pair: sorted(pair, reverse=True)),
    threshold=THRESHOLDS,
)
def test_by_cosine_similarity_it_is_the_ratio_of_chords_whatever_the_length(features, cosines, threshold):
    nearest = [(5, cosines[0]), (2, cosines[1]), (9, -1.0)]
    found = recognise_nearest(features, nearest, metric=Metric.COSINE, threshold=threshold)
    assert found == Recognised.nearest(5, (chord(cosines[0]), chord(cosines[1])), threshold=threshold)
    assert found == recognise_nearest(3.0 * features, nearest[:2], metric=Metric.COSINE, threshold=threshold)


@pytest.mark.parametrize(
    ("ratio", "rank", "exemplars", "expected"),
    [
        (0.89, 59_999, 60_000, True),  # somewhat nearer than the second, wherever it ranks
        (0.9, 59_999, 60_000, False),
        (0.99, 49, 60_000, True),  # among the best fifty
        (0.99, 50, 60_000, False),
        (0.99, 9, 400, True),  # of few exemplars among the fortieth part
        (0.99, 10, 400, False),
        (0.99, 0, 39, False),
    ],
)
def test_the_nearest_comes_first_where_either_tells(ratio: float, rank: int, exemplars: int, expected: bool):
    recognised = Recognised.nearest(7, (ratio, 1.0), threshold=0.5)
    assert comes_first(recognised, rank, exemplars) is expected


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("nearest", [[], [(3, 0.0)]])
def test_of_fewer_than_two_neighbours_none_is_recognised(metric, nearest):
    assert recognise_nearest(torch.ones(5), nearest, metric=metric, threshold=0.8) is None


# ---- what is found

PATCH = changed(OWN, trigger="fixed-patch", intensity=0.5)  # neither τ nor ω depends on the query
BY_STEPS = changed(ROBUST, tuning="adam", tuning_min_steps=40, tuning_lr=0.05, recognition=1.0)
COPIES = {  # by which copies are recognised
    "global": changed(ROBUST, recognition=0.8),
    "global, not fused": changed(ROBUST, recognition=0.8, fusion=0.0),
    "patch": changed(PATCH, recognition=0.8),
    "patch, a sample": changed(PATCH, recognition=0.8, max_tuning_exemplars=25, seed=4),
}
BY_COPIES = pytest.mark.parametrize("config", COPIES.values(), ids=COPIES)
COPIED = (9, 12, 26, 50)
KINDS = pytest.mark.parametrize("config", [ROBUST, OWN], ids=["global", "query"])


@pytest.fixture(scope="module")
def shared(classifier, make_images) -> GlobalTrigger:
    """τ of N images with their contrast stretched."""
    return make_global_trigger(ArraySource(make_images(N), None), classifier, RECIPE)


@pytest.fixture(scope="module")
def store(shared, classifier, make_store) -> MemoryStore:
    return store_with(shared, make_store(classifier, N), classifier)


@pytest.fixture(scope="module")
def tmm(shared, classifier, store) -> TmmNN:
    return TmmNN(classifier, store, global_trigger=shared)


@pytest.fixture
def queries(make_queries) -> torch.Tensor:
    return make_queries(3, dtype=torch.float32)


def pixels_of(store: MemoryStore, row: int) -> torch.Tensor:
    return torch.tensor(store.images(np.array([row]))[0]).float() / 255.0


def noisy(image: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Noise that changes the order of the neighbours, and leaves no doubt whose copy it is."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + 0.05 * noise).clamp(0.0, 1.0)


@BY_COPIES
def test_a_noisy_copy_has_the_neighbours_of_its_exemplar(tmm, store, config):
    for row in COPIED:
        image = pixels_of(store, row)
        own, copy = (tmm.rank(seen, k=N, config=config) for seen in (image, noisy(image, seed=row)))
        assert own.recognised is not None
        assert copy.recognised is not None
        assert own.recognised.row == copy.recognised.row == own.rows[0] == row
        assert copy.recognised.share > 0.9999
        np.testing.assert_array_equal(copy.rows, own.rows)
        np.testing.assert_allclose(copy.scores, own.scores, rtol=0.0, atol=1e-4)
        without = changed(config, recognition=None)
        own, copy = (tmm.rank(seen, k=N, config=without) for seen in (image, noisy(image, seed=row)))
        assert own.recognised is copy.recognised is None
        assert not np.array_equal(copy.rows, own.rows)
        assert np.abs(by_row(copy) - by_row(own)).max() > 2e-2


@KINDS
@pytest.mark.parametrize("head", HEADS)
def test_a_query_unlike_every_exemplar_has_the_answer_it_has_without(tmm, queries, *, config, head):
    for query in queries:
        plain = replace(config, head=head)
        found = tmm.rank(query, k=N, config=changed(plain, recognition=0.1))
        assert found.recognised is not None
        assert found.recognised.ratio > 0.5
        assert found.recognised.share < 1e-30
        without = tmm.rank(query, k=N, config=plain)
        np.testing.assert_array_equal(found.rows, without.rows)
        np.testing.assert_allclose(found.scores, without.scores, rtol=0.0, atol=1e-5)


@KINDS
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fusion", [0.0, 0.5, 8.0])
def test_the_best_match_is_recognised_whatever_the_fusion(tmm, queries, *, config, head, fusion):
    for query in queries:
        plain = changed(replace(config, head=head), fusion=fusion)
        without = tmm.rank(query, k=N, config=plain)
        matches = confidences = without.confidences[np.argsort(without.rows)]
        if fusion > 0:
            cosine = (by_row(without) - confidences) / fusion
            matches = (4.0 * confidences + cosine) / 5.0
        first, second = np.sqrt(1.0 - np.sort(matches)[:-3:-1].astype(float))
        found = tmm.rank(query, k=N, config=changed(plain, recognition=float(first / second))).recognised
        assert found is not None
        assert found.row == matches.argmax()
        assert found.ratio == pytest.approx(first / second, abs=1e-4)
        assert found.share == pytest.approx(0.5, abs=1e-2)  # it was put at the threshold


def test_halfway_it_is_the_slow_search_too(tmm, shared, classifier, store):
    query = noisy(pixels_of(store, 18), seed=18)
    found = tmm.rank(query, k=N, config=changed(ROBUST, recognition=0.5)).recognised
    assert found is not None
    config = changed(ROBUST, recognition=found.ratio)
    images, tau = torch.tensor(store.images(np.arange(N))), shared.trigger
    slow = reference_discriminant_scores(classifier, query, images, config, trigger=tau)
    halfway = by_row(tmm.rank(query, k=N, config=config))
    np.testing.assert_allclose(halfway, slow, rtol=0.0, atol=2e-4)
    for recognition in (None, 1.0):
        assert np.abs(by_row(tmm.rank(query, k=N, config=changed(config, recognition=recognition))) - slow).max() > 1e-2


@BY_COPIES
@pytest.mark.parametrize("k", [5, N])
def test_confidences_stay_the_querys_own(tmm, store, queries, *, config, k):
    for query in (noisy(pixels_of(store, 9), seed=9), pixels_of(store, 26), queries[0]):
        without = tmm.rank(query, k=N, config=changed(config, recognition=None))
        own = without.confidences[np.argsort(without.rows)]
        found = tmm.rank(query, k=k, config=config)
        np.testing.assert_array_equal(found.confidences, own[found.rows])
    assert len(found.rows) == k


def test_confidences_are_not_those_of_the_exemplar(tmm, store):
    of_copy, of_exemplar = (
        tmm.rank(image, k=N, config=COPIES["global"])
        for image in (noisy(pixels_of(store, 9), seed=9), pixels_of(store, 9))
    )
    assert of_copy.rows[0] == of_exemplar.rows[0] == 9
    assert of_copy.confidences[0] < 0.999 < of_exemplar.confidences[0]
    assert of_copy.scores[0] == pytest.approx(of_exemplar.scores[0], abs=1e-4)


@BY_COPIES
def test_only_candidates_are_recognised(tmm, store, config):
    copy = noisy(pixels_of(store, 9), seed=9)
    for candidates in (np.array([40, 3, 51, 9, 22]), np.array([40, 3, 51, 22])):
        plain = tmm.rank(copy, k=N, config=changed(config, recognition=None), candidates=candidates)
        found = tmm.rank(copy, k=N, config=config, candidates=candidates)
        assert found.recognised is not None
        assert sorted(found.rows) == sorted(candidates)
        assert (found.scored, found.found_on) == (len(candidates), plain.found_on)
        assert found.recognised.row in candidates
        assert (found.recognised.row == 9) == (9 in candidates)
        assert 9 not in candidates or found.rows[0] == 9


@BY_COPIES
@pytest.mark.parametrize("row", [9, 33])
def test_of_one_candidate_nothing_is_recognised(tmm, store, config, row):
    copy = noisy(pixels_of(store, 9), seed=9)
    found, plain = (
        tmm.rank(copy, k=N, config=one, candidates=np.array([row]))
        for one in (config, changed(config, recognition=None))
    )
    assert found.recognised is None
    assert found.rows.tolist() == [row]
    np.testing.assert_array_equal(found.scores, plain.scores)


def test_in_a_store_of_one_nothing_is_recognised(shared, classifier, make_store):
    store = store_with(shared, make_store(classifier, 1), classifier)
    tmm = TmmNN(classifier, store, global_trigger=shared)
    found, plain = (tmm.rank(pixels_of(store, 0), k=3, config=changed(ROBUST, recognition=r)) for r in (0.8, None))
    assert found.recognised is None
    assert (found.rows.tolist(), found.scores.tolist()) == ([0], plain.scores.tolist())


@pytest.mark.parametrize("fusion", [0.0, 4.0])
def test_a_query_as_far_from_two_exemplars_keeps_its_answer(tmm, make_queries, fusion):
    plain = changed(ROBUST, fusion=fusion)
    seen = 0
    for query in make_queries(12, dtype=torch.float32):
        found = tmm.rank(query, k=N, config=changed(plain, recognition=0.8))
        without = tmm.rank(query, k=N, config=plain)
        assert found.recognised is not None
        if found.recognised.ratio > 0.95:
            seen += 1
            assert found.recognised.share < 0.025
            assert np.abs(by_row(found) - by_row(without)).max() < 0.03 * (1.0 + fusion)
            assert len(set(found.rows[:10]) & set(without.rows[:10])) >= 9
    assert seen >= 3


@BY_COPIES
def test_recognised_together_as_alone(tmm, store, queries, config):
    copies = [noisy(pixels_of(store, row), seed=row) for row in (9, 26)]
    queries = torch.stack([copies[0], queries[0], copies[1]])
    together = tmm.rank_many(queries, k=N, config=config)
    assert [ranking.recognised.row for ranking in together[::2] if ranking.recognised is not None] == [9, 26]
    for query, one in zip(queries, together, strict=True):
        alone = tmm.rank(query, k=N, config=config)
        assert one.recognised == alone.recognised
        np.testing.assert_array_equal(one.rows, alone.rows)
        np.testing.assert_array_equal(one.scores, alone.scores)
        assert {"recognition", "tuning", "scoring", "ranking"} <= one.timings.keys()


def test_where_a_sample_tunes_one_outside_it_is_recognised(tmm, store):
    row, config = 42, COPIES["patch, a sample"]
    assert row not in np.random.default_rng(config.seed).choice(N, config.sample.max_exemplars, replace=False)
    copy = noisy(pixels_of(store, row), seed=row)
    found, without = (tmm.rank(copy, k=N, config=one) for one in (config, changed(config, recognition=None)))
    assert found.recognised is not None
    assert (found.recognised.row, found.scored, found.found_on) == (row, N, config.sample.max_exemplars)
    assert found.scores[0] == pytest.approx(5.0, abs=1e-4)
    assert without.scores[0] < 4.99


@pytest.mark.parametrize("score", Score)
def test_a_head_is_tuned_anew_for_who_is_recognised(tmm, shared, classifier, store, score):
    every = np.arange(N)
    triggered, clean = (torch.tensor(store.features(every, column=c)) for c in (GLOBAL_FEATURE, STRETCHED_FEATURE))
    config = changed(BY_STEPS, fusion=0.0, score=score)
    for row in (0, 6, 18):
        copy = stretch_contrast(noisy(pixels_of(store, row), seed=row))
        blended = apply_trigger(
            copy, shared.trigger, intensity=shared.intensity, blend=shared.blend, clamp=shared.clamp
        )
        with torch.no_grad():
            query = classifier.features(torch.stack([blended, copy]))

        def tuned(query: torch.Tensor, label: int) -> torch.nn.Linear:
            data = TuningSet(query[0], query[1], label, triggered, clean, torch.tensor(store.labels))
            return tune_head(classifier.head, data, config.head, seed=config.seed)

        ranking = tmm.rank(noisy(pixels_of(store, row), seed=row), k=N, config=config)
        with torch.inference_mode():
            confidences = torch.sigmoid(dummy_scores(tuned(query, ranking.view.label), triggered, Score.LOG_ODDS))
            best, second = confidences.argsort(descending=True)[:2].tolist()
            distances = chord(float(confidences[best])), chord(float(confidences[second]))
            found = Recognised.nearest(best, distances, threshold=config.rank.recognition)
            moved = found.moved(query, torch.stack([triggered[best], clean[best]]))
            expected = dummy_scores(tuned(moved, ranking.view.label), triggered, score)
            first = dummy_scores(tuned(query, ranking.view.label), triggered, score)
        assert ranking.recognised is not None
        assert (ranking.recognised.row, ranking.view.label) == (best, int(classifier.logits(query[1:]).argmax()))
        assert 0.5 < ranking.recognised.share == pytest.approx(found.share, abs=1e-3)
        np.testing.assert_allclose(by_row(ranking), expected, rtol=0.0, atol=1e-3)
        assert float((expected - first).abs().max()) > 1e-2


def test_of_equal_exemplars_none_is_recognised(shared, classifier, make_images, make_store):
    images = make_images(20).copy()
    images[11] = images[4]
    ids = [f"exemplar {(number + 12) % 20:02}" for number in range(20)]  # row 11 comes before row 4
    store = store_with(shared, make_store(classifier, 20, images=images, ids=ids), classifier)
    tmm = TmmNN(classifier, store, global_trigger=shared)
    for row in (4, 11):
        copy = noisy(pixels_of(store, row), seed=row)
        found, without = (tmm.rank(copy, k=20, config=changed(ROBUST, recognition=r)) for r in (0.8, None))
        assert found.recognised is not None
        assert (found.recognised.row, *found.rows[:2]) == (11, 11, 4)
        assert found.recognised.ratio == pytest.approx(1.0, abs=1e-3)
        assert found.recognised.share < 0.01
        assert np.abs(by_row(found) - by_row(without)).max() < 0.02


@KINDS
def test_variants_with_and_without_recognition_do_not_meet(tmm, store, config):
    copy = noisy(pixels_of(store, 18), seed=18)
    configs = [
        changed(replace(config, head=head), recognition=recognition)
        for head in HEADS
        for recognition in (0.8, None, 1.0, 0.8)
    ]
    variants = tmm.rank_variants(copy, k=N, configs=configs)
    for variant, one in zip(variants, configs, strict=True):
        alone = tmm.rank(copy, k=N, config=one)
        assert variant.recognised == alone.recognised
        np.testing.assert_array_equal(variant.rows, alone.rows)
        np.testing.assert_array_equal(variant.scores, alone.scores)
        assert ("recognition" in variant.timings) == (one.rank.recognition is not None)
    assert len({variant.scores.tobytes() for variant in variants}) == 6  # 0.8 is there twice


def test_in_bf16_who_is_recognised_is_scored_exactly(classifier, store):
    tmm, exact = TmmNN(classifier, store, precision=Precision.BF16), TmmNN(classifier, store)
    for row in (9, 50):
        copy = noisy(pixels_of(store, row), seed=row)
        for fusion in (0.0, 4.0):
            config = changed(OWN, stretch=False, fusion=fusion, recognition=0.8)
            ranking = tmm.rank(copy, k=3, config=config)
            assert ranking.recognised is not None
            assert ranking.recognised.row == ranking.rows[0] == row
            assert ranking.scores[0] == pytest.approx(1.0 + fusion, abs=1e-4)
            own = exact.rank(copy, k=N, config=changed(config, recognition=None))
            confidences = own.confidences[np.argsort(own.rows)][ranking.rows]
            np.testing.assert_allclose(ranking.confidences, confidences, rtol=0.0, atol=0.05)
