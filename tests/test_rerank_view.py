"""A query as viewed: stretched once, triggered, embedded once; the model's prediction, and the label it is given."""

from dataclasses import replace

import pytest
import torch

from tests.configs import changed, flat
from tmm_engine.index.contrast import stretch_contrast
from tmm_engine.index.errors import InputError
from tmm_engine.rerank import view as module
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.recognise import Recognised
from tmm_engine.rerank.settings import Blend, IndexTrigger
from tmm_engine.rerank.timing import Timings
from tmm_engine.rerank.trigger import find_triggers
from tmm_engine.rerank.view import view_queries

QUICK = flat(trigger_steps=12)
OF_INDEX = GlobalTrigger(torch.linspace(0, 1, 192).reshape(3, 8, 8), 0.4, Blend.PRINTED, clamp=True, stretch=True)
BY_INDEX = replace(changed(QUICK, stretch=True), trigger=IndexTrigger())


def viewed(classifier, queries, config, *, labels=None, timings=None):
    return view_queries(
        classifier,
        queries,
        config,
        labels=labels or [None] * len(queries),
        shared=OF_INDEX,
        together=False,
        timings=timings or Timings(len(queries)),
    )


@pytest.mark.parametrize("stretch", [False, True])
def test_queries_are_stretched_once_and_before_all_else(precise, make_queries, monkeypatch, stretch):
    queries, config = make_queries(3), changed(QUICK, stretch=stretch)
    calls: list[int] = []

    def counted(images):
        calls.append(len(images))
        return stretch_contrast(images)

    monkeypatch.setattr(module, "stretch_contrast", counted)
    views = viewed(precise, queries, config)
    assert calls == ([3] if stretch else [])
    seen = stretch_contrast(queries) if stretch else queries
    assert torch.equal(torch.stack([view.pixels for view in views]), seen)
    assert not torch.equal(stretch_contrast(queries), queries)
    found = find_triggers(precise, seen, config, shared=None, together=False)
    for view, own in zip(views, found, strict=True):
        assert torch.equal(view.found.trigger, own.trigger)
        assert view.found.intensity == own.intensity


@pytest.mark.parametrize("config", [QUICK, changed(QUICK, stretch=True, blend=Blend.ADDED), BY_INDEX])
def test_a_view_has_both_embeddings_and_the_prediction_on_the_query_itself(precise, make_queries, config):
    for view in viewed(precise, make_queries(4), config):
        assert torch.equal(view.triggered, view.found.applied(view.pixels))
        with torch.no_grad():
            expected = precise.features(torch.stack([view.triggered, view.pixels]))
            predicted = int(precise.logits(precise.features(view.pixels[None])).argmax())
        torch.testing.assert_close(view.features, expected, rtol=0.0, atol=1e-12)
        assert (view.predicted, view.label) == (predicted, predicted)
        assert not torch.equal(view.features[0], view.features[1])


def test_a_label_stands_beside_the_prediction(precise, make_queries):
    queries = make_queries(3)
    plain = viewed(precise, queries, BY_INDEX)
    labels = [None, (plain[1].predicted + 1) % 4, 3]
    views = viewed(precise, queries, BY_INDEX, labels=labels)
    assert [view.predicted for view in views] == [view.predicted for view in plain]
    assert [view.label for view in views] == [plain[0].predicted, *labels[1:]]


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_is_refused_before_anything_is_done(precise, make_queries, monkeypatch, label):
    monkeypatch.setattr(module, "find_triggers", None)
    with pytest.raises(InputError, match=f"label: expected 0 to 3, got {label}"):
        viewed(precise, make_queries(2), QUICK, labels=[None, label])


def test_the_trigger_is_shared_time_and_each_embedding_is_its_querys(precise, make_queries):
    timings = Timings(2)
    viewed(precise, make_queries(2), QUICK, timings=timings)
    assert [list(timings.of(query)) for query in range(2)] == [["trigger", "embedding"]] * 2
    assert timings.of(0)["trigger"] == timings.of(1)["trigger"] > 0.0


def test_a_view_moves_only_its_features(precise, make_queries):
    [view] = viewed(precise, make_queries(1), BY_INDEX)
    exemplar, before = torch.ones_like(view.features), view.features.clone()
    moved = view.moved(Recognised(3, 0.1, 0.25), exemplar)
    torch.testing.assert_close(moved.features, 0.75 * before + 0.25 * exemplar)
    assert torch.equal(view.features, before)
    assert (moved.pixels is view.pixels, moved.found is view.found, moved.label) == (True, True, view.label)
