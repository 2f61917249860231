"""TMM-NN in closed form, fused, with stretched contrast: what the preset robust is made of, as a whole and in parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.configs import changed, flat
from tests.robust import HEADS, OWN, RECIPE, ROBUST, N, by_row, store_with
from tmm_engine.index.errors import InputError
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.exemplars import STRETCHED_FEATURE, Subset
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank import TmmNN
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger
from tmm_engine.rerank.reference import reference_discriminant_scores, reference_scores
from tmm_engine.rerank.settings import ClosedForm, Score, TunedHead, View

KINDS = pytest.mark.parametrize("config", [ROBUST, OWN], ids=["global", "query"])


@pytest.fixture(scope="module")
def shared(classifier, make_images) -> dict[bool, GlobalTrigger]:
    """τ of N images as they are, and of N images with their contrast stretched."""
    source = ArraySource(make_images(N), None)
    return {
        stretch: make_global_trigger(source, classifier, replace(RECIPE, view=View(stretch=stretch)))
        for stretch in (False, True)
    }


@pytest.fixture(scope="module")
def store(shared, classifier, make_store) -> MemoryStore:
    return store_with(shared[True], make_store(classifier, N), classifier)


@pytest.fixture(scope="module")
def tmm(shared, classifier, store) -> TmmNN:
    return TmmNN(classifier, store, global_trigger=shared[True])


@pytest.fixture(scope="module")
def query(make_queries) -> torch.Tensor:
    return make_queries(1, dtype=torch.float32)[0]


# ---- the slow one


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("fusion", [0.0, 4.0])
@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
@pytest.mark.parametrize("recognition", [None, 0.5, 0.7])
def test_under_the_global_trigger_it_is_the_slow_search(
    shared, classifier, make_store, make_queries, *, stretch, fusion, shrinkage, recognition
):
    store = store_with(shared[stretch], make_store(classifier, N), classifier)
    tmm = TmmNN(classifier, store, global_trigger=shared[stretch])
    config = changed(ROBUST, stretch=stretch, fusion=fusion, shrinkage=shrinkage, recognition=recognition)
    for query in make_queries(3, dtype=torch.float32):
        ranking = tmm.rank(query, k=N, config=config)
        images, tau = torch.tensor(store.images(np.arange(N))), shared[stretch].trigger
        slow = reference_discriminant_scores(classifier, query, images, config, trigger=tau)
        np.testing.assert_allclose(by_row(ranking), slow, rtol=0.0, atol=1e-4)
        assert np.ptp(slow) > 0.1
        assert (ranking.scored, ranking.found_on, ranking.view.found.steps) == (N, N, 0)


@pytest.mark.parametrize("fusion", [0.0, 4.0])
@pytest.mark.parametrize("recognition", [None, 0.6])
def test_under_the_querys_own_trigger_it_is_the_slow_search(classifier, store, query, fusion, recognition):
    config = changed(OWN, fusion=fusion, recognition=recognition)
    slow = reference_discriminant_scores(classifier, query, torch.tensor(store.images(np.arange(N))), config)
    found = by_row(TmmNN(classifier, store).rank(query, k=N, config=config))
    np.testing.assert_allclose(found, slow, rtol=0.0, atol=0.02)  # stretched exemplars are rounded to 8 bits again
    assert np.ptp(slow) > 0.5


@pytest.mark.parametrize("score", Score)
def test_stretching_goes_with_a_head_tuned_by_steps_too(tmm, shared, classifier, store, query, score):
    config = changed(ROBUST, tuning="adam", fusion=0.0, score=score, tuning_min_steps=40, tuning_lr=0.05)
    images, labels = torch.tensor(store.images(np.arange(N))), torch.tensor(store.labels)
    slow = reference_scores(classifier, query, images, labels, config, trigger=shared[True].trigger)
    ranking = tmm.rank(query, k=N, config=config)
    np.testing.assert_allclose(by_row(ranking), slow.scores, rtol=1e-4, atol=1e-4)
    assert np.ptp(slow.scores) > 0.1


@KINDS
@pytest.mark.parametrize("head", HEADS)
def test_fused_is_confidence_plus_weighted_cosine_similarity(tmm, classifier, store, query, *, config, head):
    plain = tmm.rank(query, k=N, config=changed(replace(config, head=head), fusion=0.0))
    fused = tmm.rank(query, k=N, config=changed(replace(config, head=head), fusion=2.5))
    low, high = query.min(), query.max()
    with torch.no_grad():
        clean = classifier.features(((query - low) / (high - low))[None])[0].numpy()
    features = store.features(np.arange(N), column=STRETCHED_FEATURE)
    cosine = features @ clean / np.linalg.norm(features, axis=1) / np.linalg.norm(clean)
    confidences = plain.confidences[np.argsort(plain.rows)]
    np.testing.assert_allclose(by_row(fused), confidences + 2.5 * cosine, rtol=0.0, atol=1e-4)
    np.testing.assert_allclose(fused.confidences[np.argsort(fused.rows)], confidences, rtol=0.0, atol=1e-6)
    if isinstance(head, ClosedForm):
        np.testing.assert_array_equal(plain.confidences, np.maximum(plain.scores, 0.0))


@KINDS
def test_a_query_that_is_an_exemplar_comes_first_also_when_it_is_darkened(tmm, store, config):
    for row in (3, 17, 42):
        image = torch.tensor(store.images(np.array([row]))[0]).float() / 255.0
        for seen in (image, 0.5 * image, 0.4 + 0.2 * image):
            ranking = tmm.rank(seen, k=N, config=config)
            assert ranking.rows[0] == row
            assert ranking.scores[0] == pytest.approx(5.0, abs=0.05)


# ---- who is scored, and what Σ is of


@pytest.mark.parametrize("fusion", [0.0, 4.0])
def test_under_the_global_trigger_scores_do_not_depend_on_who_else_is_scored(tmm, query, fusion):
    config = changed(ROBUST, fusion=fusion)
    of_all = by_row(tmm.rank(query, k=N, config=config))
    for candidates in (np.array([49, 3, 17, 8]), np.array([5]), np.arange(N)[::-1].copy()):
        ranking = tmm.rank(query, k=N, config=config, candidates=candidates)
        assert sorted(ranking.rows) == sorted(candidates)
        assert ranking.scored == len(candidates)
        np.testing.assert_allclose(ranking.scores, of_all[ranking.rows], rtol=0.0, atol=1e-5)


def test_under_the_querys_own_trigger_the_sample_or_the_candidates_decide_and_all_are_scored(classifier, store, query):
    tmm, config = TmmNN(classifier, store), changed(OWN, max_tuning_exemplars=25, candidate_companions=0, seed=4)
    ranking = tmm.rank(query, k=N, config=config)
    assert (ranking.scored, ranking.found_on) == (N, 25)
    sample = np.sort(np.random.default_rng(4).choice(N, 25, replace=False))
    on_sample = tmm.rank(query, k=N, config=config, candidates=sample)
    np.testing.assert_allclose(on_sample.scores, by_row(ranking)[on_sample.rows], rtol=0.0, atol=1e-5)
    whole = tmm.rank(query, k=N, config=changed(config, max_tuning_exemplars=N))
    assert np.abs(by_row(whole) - by_row(ranking)).max() > 1e-2


def test_over_others_nothing_of_the_whole_is_kept(tmm, shared, classifier, store, query):
    whole = by_row(tmm.rank(query, k=N, config=ROBUST))
    rows = np.arange(0, N, 3)
    alone = TmmNN(classifier, Subset(store, rows), global_trigger=shared[True])
    expected = by_row(alone.rank(query, k=N, config=ROBUST))
    np.testing.assert_array_equal(by_row(tmm.over(Subset(store, rows)).rank(query, k=N, config=ROBUST)), expected)
    assert np.abs(expected - whole[rows]).max() > 1e-2
    np.testing.assert_array_equal(by_row(tmm.rank(query, k=N, config=ROBUST)), whole)


@pytest.mark.parametrize("cache_bytes", [0, N * 3 * 8 * 8, 1 << 30])
def test_neither_what_is_kept_nor_what_was_asked_before_matters(shared, classifier, store, make_queries, cache_bytes):
    tmm = TmmNN(classifier, store, global_trigger=shared[True], cache_bytes=cache_bytes)
    configs = [changed(ROBUST, shrinkage=shrinkage) for shrinkage in (1.0, 0.01, 1.0)]
    for query in make_queries(2, dtype=torch.float32):
        first, other, again = (tmm.rank(query, k=N, config=config) for config in configs)
        fresh = [TmmNN(classifier, store, global_trigger=shared[True]).rank(query, k=N, config=c) for c in configs]
        for one, expected in zip((first, other, again), fresh, strict=True):
            np.testing.assert_allclose(by_row(one), by_row(expected), rtol=0.0, atol=1e-6)
        assert np.abs(by_row(first) - by_row(other)).max() > 1e-3


def test_queries_together_are_as_alone(tmm, make_queries):
    queries = make_queries(3, dtype=torch.float32)
    for config in (ROBUST, changed(OWN, max_tuning_exemplars=30)):
        for query, one in zip(queries, tmm.rank_many(queries, k=N, config=config), strict=True):
            np.testing.assert_allclose(by_row(one), by_row(tmm.rank(query, k=N, config=config)), rtol=0.0, atol=1e-5)


# ---- precision


def test_in_bf16_the_best_are_scored_again_exactly(classifier, store, query):
    exact = TmmNN(classifier, store).rank(query, k=N, config=OWN)
    rough = TmmNN(classifier, store, precision=Precision.BF16)
    found = rough.rank(query, k=N, config=OWN)
    np.testing.assert_allclose(by_row(found), by_row(exact), rtol=0.0, atol=0.05)
    assert found.rows[0] == exact.rows[0]
    image = torch.tensor(store.images(np.array([7]))[0]).float() / 255.0
    own = rough.rank(image, k=1, config=changed(OWN, fusion=0.0, stretch=False))
    assert own.rows.tolist() == [7]
    assert own.scores[0] == pytest.approx(1.0, abs=1e-4)  # both are passed in fp32 in the end, in bf16 only Σ was


def test_under_the_global_trigger_the_precision_of_the_pass_plays_no_part(tmm, shared, classifier, store, query):
    rough = TmmNN(classifier, store, precision=Precision.BF16, global_trigger=shared[True])
    expected = tmm.rank(query, k=N, config=ROBUST)
    np.testing.assert_array_equal(by_row(rough.rank(query, k=N, config=ROBUST)), by_row(expected))


# ---- several configurations in one pass


@KINDS
def test_variants_are_what_each_configuration_gives_alone(tmm, query, config):
    configs = [
        config,
        replace(config, head=TunedHead(min_steps=10)),
        changed(replace(config, head=TunedHead(min_steps=10, lr=0.02)), score=Score.LOGIT, fusion=0.0),
        changed(config, fusion=0.0),
        changed(config, shrinkage=0.01),
    ]
    variants = tmm.rank_variants(query, k=N, configs=configs, label=2)
    for variant, one in zip(variants, configs, strict=True):
        alone = tmm.rank(query, k=N, config=one, label=2)
        np.testing.assert_array_equal(variant.rows, alone.rows)
        np.testing.assert_array_equal(variant.scores, alone.scores)
        np.testing.assert_array_equal(variant.confidences, alone.confidences)
        np.testing.assert_array_equal(variant.view.found.trigger, alone.view.found.trigger)
        assert (variant.view.label, variant.scored, variant.found_on) == (2, N, N)
        assert set(variant.timings) == set(alone.timings)
    assert len({variant.scores.tobytes() for variant in variants}) == len(configs)


def test_variants_take_the_models_prediction_where_no_label_is_given(tmm, query):
    [variant] = tmm.rank_variants(query, k=3, configs=[replace(OWN, head=TunedHead(min_steps=10))])
    assert variant.view.label == tmm.rank(query, k=3, config=replace(OWN, head=TunedHead(min_steps=10))).view.label


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"stretch": False}, {"trigger_steps": 3}, {"trigger": "patch"}, {"intensity": None}]
)
def test_variants_with_other_triggered_features_are_refused(tmm, query, change):
    with pytest.raises(InputError, match="differ only after the pass"):
        tmm.rank_variants(query, k=3, configs=[OWN, changed(OWN, **change)])


def test_variants_with_a_label_that_is_no_class_are_refused(tmm, query):
    with pytest.raises(InputError, match="label: expected 0 to 3, got 4"):
        tmm.rank_variants(query, k=3, configs=[changed(ROBUST, tuning="adam")], label=4)


# ---- refusals


def test_a_store_without_the_columns_is_refused(classifier, make_store, query):
    tmm = TmmNN(classifier, make_store(classifier, 10))
    with pytest.raises(InputError, match="no global trigger, which this configuration needs: build it with"):
        tmm.rank(query, k=3, config=ROBUST)
    with pytest.raises(InputError, match="no features of images with their contrast stretched: build it with"):
        tmm.rank(query, k=3, config=OWN)
    assert len(tmm.rank(query, k=3, config=changed(OWN, fusion=0.0)).rows) == 3  # needs no clean features
    assert len(tmm.rank(query, k=3, config=flat(trigger_steps=2, tuning_min_steps=2)).rows) == 3


def test_a_trigger_made_for_images_as_they_are_is_refused_for_stretched_ones(shared, classifier, make_store, query):
    store = store_with(shared[False], make_store(classifier, 10), classifier)
    tmm = TmmNN(classifier, store, global_trigger=shared[False])
    with pytest.raises(InputError, match=r"stretch=False, the configuration says stretch=True.*build the index with"):
        tmm.rank(query, k=3, config=ROBUST)
