"""The fast path is the slow, literal version: in float64, to rounding, whatever the reading of the paper."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.configs import changed
from tmm_engine.index.neighbours.ranking import best_first
from tmm_engine.rerank import TmmNN
from tmm_engine.rerank.optimisation import make_trigger
from tmm_engine.rerank.reference import reference_discriminant_scores, reference_scores, reference_trigger
from tmm_engine.rerank.settings import (
    Blend,
    ClosedForm,
    FixedPatch,
    PatchTrigger,
    QueryTrigger,
    Score,
    TmmConfig,
    TunedHead,
)

QUICK = TmmConfig(trigger=QueryTrigger(steps=20), head=TunedHead(min_steps=20, batch=16, lr=0.02))
TRIGGERS = pytest.mark.parametrize("trigger", [QueryTrigger(steps=20), PatchTrigger(steps=20), FixedPatch()])


def reference(classifier, store, query, config, rows=None, **options):
    rows = np.arange(len(store)) if rows is None else rows
    images, labels = torch.tensor(store.images(rows)), torch.tensor(store.labels[rows])
    return reference_scores(classifier, query, images, labels, config, **options)


def assert_equal_to_reference(classifier, store, query, config):
    expected = reference(classifier, store, query, config)
    ranking = TmmNN(classifier, store).rank(query, k=len(store), config=config)
    np.testing.assert_allclose(ranking.view.found.trigger, expected.trigger, rtol=0.0, atol=1e-8)
    np.testing.assert_allclose(ranking.scores, expected.scores[ranking.rows], rtol=1e-8, atol=1e-8)
    order = best_first(expected.scores, np.arange(len(store)), store.ids, k=len(store))
    np.testing.assert_array_equal(ranking.rows, order)
    assert len(store) == 1 or np.ptp(ranking.scores) > 1e-3, "a comparison of constants would prove nothing"
    return ranking


@TRIGGERS
@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("blend", Blend)
def test_every_reading(precise, make_store, make_queries, *, blend, clamp, score, trigger):
    config = replace(changed(QUICK, blend=blend, clamp=clamp, score=score), trigger=trigger)
    assert_equal_to_reference(precise, make_store(precise, 40), make_queries(1)[0], config)


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (33, {"tuning_epochs": 4, "tuning_min_steps": 1}),  # epochs decide; the last batch of each has one exemplar
        (32, {"tuning_epochs": 2, "tuning_min_steps": 1}),  # batches fit exactly
        (5, {"tuning_epochs": 1, "tuning_min_steps": 7}),  # fewer exemplars than a batch
        (1, {"tuning_epochs": 3, "tuning_min_steps": 1}),
        (40, {"tuning_min_steps": 235, "tuning_lr": 1e-3}),
        (40, {"ewc_lambda": 0.0}),
        (40, {"ewc_lambda": 100.0, "seed": 5}),
        (40, {"intensity": 0.75}),
        (40, {"trigger_steps": 0}),
        (40, {"trigger_steps": 300, "trigger_tolerance": 0.05}),
        (40, {"trigger_lr": 1e200}),
    ],
)
@pytest.mark.parametrize("head", ["precise", "biasless"])
def test_sizes_and_settings(request, make_store, make_queries, *, head, n, settings):
    classifier = request.getfixturevalue(head)
    config, query = changed(QUICK, **settings), make_queries(1, seed=7)[0]
    assert_equal_to_reference(classifier, make_store(classifier, n, seed=3), query, config)


CLOSED = replace(QUICK, head=ClosedForm())


def assert_equal_to_closed_form(classifier, store, query, config):
    expected = reference_discriminant_scores(
        classifier, query, torch.tensor(store.images(np.arange(len(store)))), config
    )
    ranking = TmmNN(classifier, store).rank(query, k=len(store), config=config)
    np.testing.assert_allclose(ranking.scores, expected[ranking.rows], rtol=1e-7, atol=1e-7)
    assert sorted(ranking.rows) == list(range(len(store)))
    assert len(store) == 1 or np.ptp(ranking.scores) > 1e-2, "a comparison of constants would prove nothing"
    return ranking


@TRIGGERS
@pytest.mark.parametrize("fusion", [0.0, 4.0])
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("blend", Blend)
def test_every_reading_in_closed_form(precise, make_store, make_queries, *, blend, clamp, fusion, trigger):
    config = replace(changed(CLOSED, blend=blend, clamp=clamp, fusion=fusion), trigger=trigger)
    assert_equal_to_closed_form(precise, make_store(precise, 40), make_queries(1)[0], config)


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (1, {}),
        (2, {}),
        (8, {}),  # fewer exemplars than the 12 dimensions
        (40, {"shrinkage": 1.0, "fusion": 4.0, "intensity": 0.1}),
        (40, {"shrinkage": 1e-3}),
        (40, {"shrinkage": 100.0}),
        (40, {"trigger_steps": 0}),
    ],
)
@pytest.mark.parametrize("head", ["precise", "biasless"])
def test_sizes_and_settings_in_closed_form(request, make_store, make_queries, *, head, n, settings):
    classifier = request.getfixturevalue(head)
    config, query = changed(CLOSED, **settings), make_queries(1, seed=7)[0]
    assert_equal_to_closed_form(classifier, make_store(classifier, n, seed=3), query, config)


def test_a_query_that_is_an_exemplar_is_first_in_closed_form(precise, make_store):
    store = make_store(precise, 40)
    query = torch.tensor(store.images(np.array([17]))[0]).double() / 255.0
    for fusion, best in ((0.0, 1.0), (4.0, 5.0)):
        ranking = assert_equal_to_closed_form(precise, store, query, changed(CLOSED, fusion=fusion))
        assert ranking.rows[0] == 17
        assert ranking.scores[0] == pytest.approx(best, abs=1e-6)
        assert ranking.confidences[0] == pytest.approx(1.0, abs=1e-6)


def test_a_query_that_is_an_exemplar(precise, make_store):
    store = make_store(precise, 40)
    query = torch.tensor(store.images(np.array([17]))[0]).double() / 255.0
    assert_equal_to_reference(precise, store, query, QUICK)


def test_the_confidence_is_the_softmax_of_the_dummy_class(precise, make_store, make_queries):
    store, query = make_store(precise, 40), make_queries(1)[0]
    for score in Score:
        config = changed(QUICK, score=score, blend=Blend.ADDED, clamp=False)
        expected = reference(precise, store, query, config)
        ranking = TmmNN(precise, store).rank(query, k=40, config=config)
        triggered = torch.tensor(store.images(ranking.rows)).double() / 255.0 + expected.trigger
        with torch.no_grad():
            p = torch.softmax(expected.model(triggered), dim=1)[:, -1]
        np.testing.assert_allclose(ranking.confidences, p, rtol=1e-7)


def test_candidates_are_the_reference_on_candidates_alone(precise, make_store, make_queries):
    store, query, candidates = make_store(precise, 60), make_queries(1)[0], np.array([50, 3, 17, 31, 8, 44, 2, 29])
    config = changed(QUICK, candidate_companions=0)
    expected = reference(precise, store, query, config, candidates)
    ranking = TmmNN(precise, store).rank(query, k=8, config=config, candidates=candidates)
    by_row = dict(zip(candidates, expected.scores, strict=True))
    np.testing.assert_allclose(ranking.scores, [by_row[row] for row in ranking.rows], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("how", [QueryTrigger(steps=100), PatchTrigger(steps=100), FixedPatch()])
def test_every_trigger_of_several_is_the_references(precise, make_queries, how):
    queries = make_queries(4)
    found = make_trigger(precise, queries, how, seed=3)
    model = torch.nn.Sequential(precise.backbone, precise.head)
    for query, trigger in zip(queries, found.trigger, strict=True):
        torch.testing.assert_close(trigger, reference_trigger(model, query, how, seed=3), rtol=0.0, atol=1e-6)


def test_a_given_trigger_is_used(precise, make_store, make_queries):
    store, query = make_store(precise, 40), make_queries(1)[0]
    own = reference(precise, store, query, QUICK)
    given = reference(precise, store, query, QUICK, trigger=own.trigger)
    other = reference(precise, store, query, QUICK, trigger=-own.trigger)
    np.testing.assert_array_equal(given.scores, own.scores)
    assert np.abs(other.scores - own.scores).max() > 1e-3


def test_backbone_layers_may_be_tuned_and_only_those_change(precise, make_store, make_queries):
    store, query = make_store(precise, 40), make_queries(1)[0]
    before = precise.backbone.state_dict()
    head_only = reference(precise, store, query, QUICK)
    deeper = reference(precise, store, query, QUICK, tune_layers=("network.4",))
    changed = {
        name for name, value in before.items() if not torch.equal(deeper.model.backbone.state_dict()[name], value)
    }
    assert changed == {"network.4.weight", "network.4.bias"}
    unchanged = head_only.model.backbone.state_dict()
    assert all(torch.equal(unchanged[name], value) for name, value in before.items())
    assert np.abs(deeper.scores - head_only.scores).max() > 1e-3


def test_the_reference_changes_nothing_it_is_given(precise, make_store, make_queries):
    store, query = make_store(precise, 20), make_queries(1)[0]
    modules = (precise.backbone, precise.head)
    tensors = [value for module in modules for value in module.state_dict().values()]
    before = [tensor.numpy().tobytes() for tensor in [query, *tensors]]
    reference(precise, store, query, QUICK, tune_layers=("network.0",))
    assert [tensor.numpy().tobytes() for tensor in [query, *tensors]] == before
    parameters = itertools.chain(*(module.parameters() for module in modules))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
