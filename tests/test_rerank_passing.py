"""How often a search passes images through the network: exactly as often as needed."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.configs import changed, flat
from tests.robust import RECIPE, ROBUST, N, by_row, store_with
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.exemplars import Subset
from tmm_engine.rerank import TmmNN
from tmm_engine.rerank.backbone import Precision
from tmm_engine.rerank.global_trigger import GlobalTrigger, make_global_trigger

PAPER = flat(trigger_steps=12, tuning_min_steps=5)
MANY = 60_001  # one more than `Sample.max_exemplars`


@pytest.fixture(scope="module")
def shared(classifier, make_images) -> GlobalTrigger:
    return make_global_trigger(ArraySource(make_images(N), None), classifier, RECIPE)


@pytest.fixture(scope="module")
def tmm(shared, classifier, make_store) -> TmmNN:
    return TmmNN(classifier, store_with(shared, make_store(classifier, N), classifier), global_trigger=shared)


@contextmanager
def batches(*of: TmmNN) -> Iterator[list[int]]:
    """How many images are in each pass through φ."""
    seen: list[int] = []
    networks = {id(one): one.classifier.backbone.get_submodule("network") for one in of}.values()
    hooks = [network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))) for network in networks]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("recognition", [None, 0.8])
@pytest.mark.parametrize("candidates", [None, np.array([4, 9, 33])])
def test_a_robust_search_passes_the_querys_pair_once_and_no_exemplar(tmm, make_queries, recognition, candidates):
    config = changed(ROBUST, recognition=recognition)
    with batches(tmm) as seen:
        ranking = tmm.rank(make_queries(1, dtype=torch.float32)[0], k=3, config=config, candidates=candidates)
        assert seen == [2]
        tmm.rank_many(make_queries(3, dtype=torch.float32), k=3, config=config)
    assert seen == [2] * 4
    assert (ranking.recognised is None) == (recognition is None)


@pytest.mark.parametrize("recognition", [None, 0.8])
def test_a_search_by_paper_passes_every_exemplar_once(tmm, make_queries, recognition):
    queries, config = make_queries(2, dtype=torch.float32), changed(PAPER, recognition=recognition)
    with batches(tmm) as seen:
        found = tmm.rank(queries[0], k=3, config=config).view.found
    of_trigger = [1] * (1 + found.steps)  # what f says of the query, then Eq. 8
    of_recognised = [] if recognition is None else [1]
    assert seen == [*of_trigger, 2, N, *of_recognised]
    with batches(tmm) as seen:
        rankings = tmm.rank_many(queries, k=3, config=config, together=True)
    of_triggers = [2] * (1 + max(ranking.view.found.steps for ranking in rankings))
    assert seen == [*of_triggers, 2, 2, N, N, *of_recognised, *of_recognised]


def test_a_sample_is_passed_and_then_all(tmm, make_queries):
    config = changed(PAPER, trigger="fixed-patch", max_tuning_exemplars=25, candidate_companions=5)
    query = make_queries(1, dtype=torch.float32)[0]
    of_query = [1, 1, 2]
    with batches(tmm) as seen:
        tmm.rank(query, k=3, config=config)
    assert seen == [*of_query, 25, N]
    with batches(tmm) as seen:
        tmm.rank(query, k=3, config=config, candidates=np.array([4, 9, 33]))
    assert seen == [*of_query, 3 + 5]


def test_variants_share_one_pass(tmm, make_queries):
    config = changed(PAPER, trigger="fixed-patch")
    configs = [config, changed(config, fusion=2.0), changed(config, tuning="discriminant")]
    with batches(tmm) as seen:
        tmm.rank_variants(make_queries(1, dtype=torch.float32)[0], k=3, configs=configs)
    assert seen == [1, 1, 2, N]


def test_over_other_exemplars_the_network_is_the_same(classifier, shared, make_store, make_queries):
    store = store_with(shared, make_store(classifier, N), classifier)
    tmm = TmmNN(classifier, store, precision=Precision.BF16, global_trigger=shared)
    some = tmm.over(Subset(store, np.arange(20)))
    assert some.backbone is tmm.backbone
    assert some.classifier is tmm.classifier
    assert some.global_trigger is shared
    assert (len(some.store), len(tmm.store)) == (20, N)
    ranking = some.rank(make_queries(1, dtype=torch.float32)[0], k=N, config=ROBUST)
    assert sorted(ranking.rows) == list(range(20))


def test_too_many_to_hold_are_scored_from_the_column_as_when_they_are_given(shared, classifier, make_store):
    """Nothing is drawn: all are scored chunk by chunk, and by the discriminant of all."""
    store = store_with(shared, make_store(classifier, MANY), classifier)
    tmm, config = TmmNN(classifier, store, global_trigger=shared), changed(ROBUST, recognition=0.8)
    query = torch.tensor(store.images(np.array([60_000]))[0]).float() / 255.0
    with batches(tmm) as seen:
        streamed = tmm.rank(query, k=MANY, config=config)
    assert seen == [2]
    assert (streamed.scored, streamed.found_on, streamed.plan.streamed) == (MANY, MANY, True)
    given = tmm.rank(query, k=MANY, config=config, candidates=np.arange(MANY))
    assert not given.plan.streamed
    assert streamed.rows[0] == given.rows[0] == 60_000
    np.testing.assert_allclose(by_row(streamed), by_row(given), rtol=0.0, atol=1e-5)
    assert streamed.recognised is not None
    assert streamed.recognised.row == 60_000
