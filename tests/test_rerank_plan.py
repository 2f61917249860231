"""Plans: which exemplars a head is found on and which are scored, drawn as they were before there were plans."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import configs
from tmm_engine.rerank.plan import Plan
from tmm_engine.rerank.settings import ClosedForm, IndexTrigger, Sample, TmmConfig

# The type checks of the tests look at random items of tuples, also where a strategy makes a configuration.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

GLOBAL = TmmConfig(trigger=IndexTrigger(), head=ClosedForm())
CANDIDATES = st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True).map(np.array)


def rows_before(exemplars, config, candidates):
    """(rows that tune the head, rows that are scored) as version 1 drew them; None is all."""
    generator = np.random.default_rng(config.seed)
    if candidates is None:
        if exemplars <= config.sample.max_exemplars:
            return None, None
        return np.sort(generator.choice(exemplars, config.sample.max_exemplars, replace=False)), None
    others = np.setdiff1d(np.arange(exemplars), candidates)
    companions = generator.choice(others, min(config.sample.companions, len(others)), replace=False)
    return np.concatenate([candidates, np.sort(companions)]), candidates


@settings(max_examples=200)
@given(
    config=configs().filter(lambda config: config.draws),
    sample=st.builds(Sample, max_exemplars=st.integers(1, 60), companions=st.integers(0, 50)),
    candidates=st.none() | CANDIDATES,
)
def test_the_rows_are_those_of_before(config, sample, candidates):
    config = replace(config, sample=sample)
    plan = Plan.draw(40, config, candidates)
    found_on, scored = rows_before(40, config, candidates)
    assert (plan.found_on is None, plan.candidates is None) == (found_on is None, scored is None)
    if found_on is not None:
        np.testing.assert_array_equal(plan.found_on, found_on)
    np.testing.assert_array_equal(plan.scored, np.arange(40) if candidates is None else candidates)
    assert plan.exemplars == 40
    assert plan.streamed == (candidates is None and sample.max_exemplars < 40)
    again = Plan.draw(40, config, candidates)
    np.testing.assert_array_equal(again.found_on, plan.found_on)


def test_another_seed_draws_others():
    config = TmmConfig(sample=Sample(max_exemplars=20, companions=20))
    for candidates in (None, np.arange(5)):
        first, other = (Plan.draw(1000, config.with_seed(seed), candidates).found_on for seed in (0, 1))
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("candidates", [None, np.array([7, 3, 30])])
def test_where_nothing_is_drawn_no_generator_is_made(monkeypatch, candidates):
    def draw(*_: object) -> None:
        raise AssertionError("nothing is drawn")

    monkeypatch.setattr(np.random, "default_rng", draw)
    plan = Plan.draw(40, GLOBAL, candidates)
    assert plan.found_on is candidates
    assert plan.candidates is candidates
    assert not plan.streamed
    with pytest.raises(AssertionError, match="nothing is drawn"):
        Plan.draw(40, TmmConfig(), np.arange(3))


@pytest.mark.parametrize(("exemplars", "streamed"), [(60_000, False), (60_001, True)])
def test_more_than_are_held_at_once_are_streamed_also_where_nothing_is_drawn(exemplars, streamed):
    plan = Plan.draw(exemplars, GLOBAL, None)
    assert (plan.streamed, plan.found_on, plan.candidates) == (streamed, None, None)
    assert len(plan.scored) == exemplars
    assert not Plan.draw(exemplars, GLOBAL, np.arange(3)).streamed
    drawn = Plan.draw(exemplars, TmmConfig(), None)
    assert (drawn.streamed, drawn.found_on is None) == (streamed, not streamed)
