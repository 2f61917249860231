"""Intervals: against formulas, against what must hold of any data, and their coverage of a known truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm_engine.bench.statistics import (
    Interval,
    bootstrap_interval,
    by_query,
    paired_difference,
    share_at_least,
    wilson_interval,
)
from tmm_engine.index.errors import InputError

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=12).map(np.array)
seeds = st.integers(0, 2**31)


@settings(max_examples=40)
@given(numbers, seeds, st.sampled_from([np.mean, np.median]))
def test_an_interval_holds_its_estimate_and_stays_within_the_values(values, seed, statistic):
    found = bootstrap_interval(values, statistic, resamples=200, seed=seed)
    assert found.estimate == statistic(values)
    slack = 1e-9 * np.abs(values).max()
    assert values.min() - slack <= found.low <= found.high <= values.max() + slack
    assert found == bootstrap_interval(values, statistic, resamples=200, seed=seed)


def test_the_mean_s_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(0).exponential(size=400)
    found = bootstrap_interval(values, resamples=5_000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    narrow = bootstrap_interval(values, resamples=5_000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx((found.high - found.low) * 0.6745 / 1.96, rel=0.1)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = [
        found.low <= 0.5 <= found.high
        for found in (bootstrap_interval(generator.random(40), resamples=300, seed=number) for number in range(200))
    ]
    assert 0.89 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_equal_values_have_an_interval_of_no_width_and_one_value_has_none(statistic):
    assert bootstrap_interval(np.full(5, 0.25), statistic) == Interval(0.25, 0.25, 0.25)
    alone = bootstrap_interval(np.array([0.87]), statistic)
    assert math.isnan(alone.low)
    assert str(alone) == "0.87 [–, –]"


def test_booleans_count_as_zero_and_one():
    assert bootstrap_interval(np.array([True, False, True, True])).estimate == 0.75


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [1.0, np.inf]])
def test_values_that_cannot_be_averaged_are_refused(values):
    with pytest.raises(InputError, match="all finite"):
        bootstrap_interval(np.array(values))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=1, max_size=30))
def test_by_query_is_each_query_s_mean(pairs):
    queries, values = (np.array(column) for column in zip(*pairs, strict=True))
    expected = [np.mean([value for query, value in pairs if query == chosen]) for chosen in sorted(set(queries))]
    np.testing.assert_allclose(by_query(values, queries), expected, atol=1e-12)


def test_a_paired_difference_ignores_what_both_share():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(scale=10, size=50)
    a, b = difficulty + 0.1 + generator.normal(scale=0.01, size=50), difficulty
    found = paired_difference(a, b, np.arange(50))
    assert found.estimate == pytest.approx(0.1, abs=0.01)
    assert found.high - found.low < 0.02
    back = paired_difference(b, a, np.arange(50))
    assert (back.estimate, back.low) == pytest.approx((-found.estimate, -found.high), abs=1e-3)


def test_repeating_a_query_s_records_narrows_nothing():
    generator = np.random.default_rng(0)
    a, b, queries = generator.random(20), generator.random(20), np.array([f"q{n}" for n in range(20)])
    once = paired_difference(a, b, queries)
    many = paired_difference(np.repeat(a, 9), np.repeat(b, 9), np.repeat(queries, 9))
    assert (many.estimate, many.low, many.high) == pytest.approx((once.estimate, once.low, once.high))
    naive = bootstrap_interval(np.repeat(a - b, 9))
    assert naive.high - naive.low < 0.5 * (many.high - many.low)


@settings(max_examples=60)
@given(st.integers(1, 200).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_solves_its_equation(counts):
    successes, trials = counts
    found = wilson_interval(successes, trials)
    share = successes / trials
    assert found.estimate == share
    for bound, edge in ((found.low, 0.0), (found.high, 1.0)):
        solved = (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / trials, rel=1e-5, abs=1e-12)
        assert solved or bound == edge
    assert 0 <= found.low <= share <= found.high <= 1
    assert found.high - found.low > 0  # unlike the bootstrap's, at 0 and 1 too


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_counts_that_cannot_be(counts):
    with pytest.raises(InputError, match="at least one trial"):
        wilson_interval(*counts)


radius = st.floats(0, 5)


@settings(max_examples=60)
@given(st.lists(radius, min_size=1, max_size=20), st.lists(radius, max_size=8))
def test_without_censoring_the_curve_is_the_share(radii, grid):
    radii, grid = np.array(radii), np.sort([*grid, *radii])  # the radii themselves: at least, not more than
    curve = share_at_least(radii, np.zeros(len(radii), dtype=bool), grid)
    np.testing.assert_allclose(curve, [(radii >= epsilon).mean() for epsilon in grid], atol=1e-12)


@settings(max_examples=60)
@given(st.lists(st.tuples(radius, st.booleans()), min_size=1, max_size=20), st.lists(radius, min_size=1, max_size=8))
def test_with_censoring_the_curve_lies_between_what_is_known_and_what_is_possible(pairs, grid):
    radii, censored = np.array([value for value, _ in pairs]), np.array([flag for _, flag in pairs])
    grid = np.sort(grid)
    curve = share_at_least(radii, censored, grid)
    for epsilon, share in zip(grid, curve, strict=True):
        assert (radii >= epsilon).mean() - 1e-9 <= share <= ((radii >= epsilon) | censored).mean() + 1e-9
    assert (np.diff(curve) <= 1e-12).all()


def test_a_censored_query_is_out_of_the_count_beyond_its_radius():
    curve = share_at_least(
        np.array([1.0, 2.0, 3.0]), np.array([False, True, False]), np.array([0.0, 1, 1.5, 2, 3, 3.1])
    )
    np.testing.assert_allclose(curve, [1, 1, 2 / 3, 2 / 3, 2 / 3, 0])


def test_intervals_as_text():
    interval = Interval(0.8666, -0.001, 0.92)
    assert str(interval) == f"{interval}" == "0.87 [0.00, 0.92]"
    assert f"{interval:+z.1f}" == "+0.9 [+0.0, +0.9]"
