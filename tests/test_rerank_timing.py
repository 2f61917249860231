"""Timings: steps in the order in which they began; what is done together is shared equally."""

import itertools
from types import SimpleNamespace

import pytest

from tmm_engine.rerank import timing
from tmm_engine.rerank.timing import Timings


@pytest.fixture
def clock(monkeypatch):
    """Every look at it is a second later."""
    seconds = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))


def test_a_step_for_all_is_shared_equally(clock):
    timings = Timings(4)
    with timings.step("pass"):
        pass
    assert [timings.of(query) for query in range(4)] == [{"pass": 0.25}] * 4


def test_a_step_for_some_is_theirs_and_repeats_add_up(clock):
    timings = Timings(3)
    with timings.step("trigger"):
        pass
    for queries in ([0], [0, 2], [0]):
        with timings.step("tuning", queries):
            pass
    both = ["trigger", "tuning"]
    assert [list(timings.of(query)) for query in range(3)] == [both, ["trigger"], both]
    assert (timings.of(0)["tuning"], timings.of(2)["tuning"]) == (2.5, 0.5)


def test_steps_are_in_the_order_in_which_they_began(clock):
    timings = Timings(1)
    for name in ("trigger", "pass", "tuning", "pass", "ranking", "trigger"):
        with timings.step(name):
            pass
    assert list(timings.of(0)) == ["trigger", "pass", "tuning", "ranking"]


def test_what_is_told_is_a_copy(clock):
    timings = Timings(1)
    with timings.step("pass"):
        pass
    timings.of(0)["pass"] = 100.0
    assert timings.of(0)["pass"] == 1.0
