"""Step 1 for queries: the index's trigger or their own, each with its intensity, and how it is put into images."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import changed, flat
from tests.robust import ROBUST
from tmm_engine.index.errors import ImageError, InputError
from tmm_engine.rerank import trigger as module
from tmm_engine.rerank.blending import apply_trigger, intensity_of
from tmm_engine.rerank.global_trigger import GlobalTrigger
from tmm_engine.rerank.optimisation import make_trigger
from tmm_engine.rerank.settings import Blend, Blending, FixedPatch, PatchTrigger, QueryTrigger
from tmm_engine.rerank.trigger import FoundTrigger, find_triggers

OF_INDEX = GlobalTrigger(torch.linspace(0, 1, 192).reshape(3, 8, 8), 0.1, Blend.PRINTED, clamp=True, stretch=True)
QUICK = flat(trigger_steps=12, seed=3)


def found_in(classifier, queries, config, *, shared=None, together=False):
    return find_triggers(classifier, queries, config, shared=shared, together=together)


@settings(max_examples=30)
@given(formula=st.sampled_from(Blend), clamp=st.booleans(), intensity=st.floats(0.0, 1.0), seed=st.integers(0, 1000))
def test_it_is_applied_as_its_blending_says(formula, clamp, intensity, seed):
    blending = Blending(formula=formula, clamp=clamp)
    images, tau = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split([2, 1])
    found = FoundTrigger(tau[0], intensity, blending, (1.0, 0.5), 3)
    how = {"intensity": intensity, "blend": formula, "clamp": clamp}
    assert torch.equal(found.applied(images), apply_trigger(images, tau[0], **how))
    assert torch.equal(found.applied(images[1]), found.applied(images)[1])
    assert found.weights == formula.weights(intensity)


def test_the_indexs_trigger_has_its_own_intensity_and_no_loss(precise, make_queries):
    found = found_in(precise, make_queries(3), changed(ROBUST, intensity=None), shared=OF_INDEX)
    assert len(found) == 3
    assert all(one is found[0] for one in found)
    assert found[0].trigger.dtype == torch.float64
    assert torch.equal(found[0].trigger.float(), OF_INDEX.trigger)
    assert (found[0].intensity, found[0].steps) == (0.1, 0)
    assert all(map(math.isnan, found[0].loss))


def test_an_index_without_a_trigger_or_with_another_is_refused(precise, make_queries):
    with pytest.raises(InputError, match="the index has no global trigger, which this configuration needs"):
        found_in(precise, make_queries(1), ROBUST)
    with pytest.raises(InputError, match="blend=printed, the configuration says blend=added"):
        found_in(precise, make_queries(1), changed(ROBUST, blend=Blend.ADDED), shared=OF_INDEX)
    assert found_in(precise, make_queries(1), QUICK)[0].steps > 0  # the query's own needs none


@pytest.mark.parametrize("how", [QueryTrigger(steps=12), PatchTrigger(steps=12), FixedPatch()])
@pytest.mark.parametrize("given_intensity", [None, 0.3])
def test_a_querys_own_trigger_is_made_for_it_with_its_intensity(precise, make_queries, how, given_intensity):
    queries, config = make_queries(3), replace(changed(QUICK, intensity=given_intensity), trigger=how)
    for query, found in zip(queries, found_in(precise, queries, config), strict=True):
        made = make_trigger(precise, query[None], how, seed=3)
        assert torch.equal(found.trigger, made.trigger[0])
        assert found.loss == (float(made.initial_loss[0]), float(made.loss[0]))
        assert found.steps == int(made.steps[0])
        assert found.intensity == (intensity_of(query) if given_intensity is None else given_intensity)
        assert found.blending == config.blending


@pytest.mark.parametrize(("together", "parts"), [(False, [1] * 5), (True, [2, 2, 1])])
def test_together_so_many_are_optimised_jointly(precise, make_queries, monkeypatch, together, parts):
    made: list[int] = []

    def counted(classifier, queries, how, **options):
        made.append(len(queries))
        return make_trigger(classifier, queries, how, **options)

    monkeypatch.setattr(module, "make_trigger", counted)
    monkeypatch.setattr(module, "TOGETHER", 2)
    found = found_in(precise, make_queries(5), QUICK, together=together)
    assert made == parts
    assert len(found) == 5


@pytest.mark.parametrize(("together", "total"), [(False, 3 * 12), (True, 2 * 12)])
def test_optimisation_reports_its_steps_as_one_piece_of_work(precise, make_queries, monkeypatch, together, total):
    monkeypatch.setattr(module, "TOGETHER", 2)
    said: list[tuple[str, int, int]] = []
    find_triggers(
        precise, make_queries(3), QUICK, shared=None, together=together, progress=lambda *now: said.append(now)
    )
    assert {step for step, _, _ in said} == {"optimising the trigger"}
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    assert (said[-1][1], said[-1][2]) == (total, total)


def test_a_constant_query_is_refused_before_anything_is_optimised(precise, make_queries, monkeypatch):
    monkeypatch.setattr(module, "make_trigger", None)
    queries = torch.cat([make_queries(1), torch.full((1, 3, 8, 8), 0.25, dtype=torch.float64)])
    with pytest.raises(ImageError, match=r"ω = 0 .*every triggered image the same.*is the image constant\?"):
        found_in(precise, queries, QUICK)
    with pytest.raises(ImageError, match=r"ω = 1 .*the trigger invisible"):
        found_in(precise, queries, replace(QUICK, blending=Blending(intensity=1.0)))
