"""Costs to reach a score and speed-ups, against closed forms and scipy's Welch test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mae_et.comparison.speedup import Speedup, cost_to_reach, speedup

RISING = [(1.0, 0.2), (3.0, 0.4), (7.0, 0.8)]
WAVY = [(1.0, 0.2), (2.0, 0.6), (3.0, 0.3), (4.0, 0.7)]


@pytest.mark.parametrize(
    ("points", "score", "log", "cost"),
    [
        (RISING, 0.2, False, 1.0),
        (RISING, 0.1, False, 1.0),  # there already: the first look's cost, which may be too much, but never too little
        (RISING, 0.3, False, 2.0),
        (RISING, 0.4, False, 3.0),
        (RISING, 0.5, False, 4.0),
        (RISING, 0.8, False, 7.0),
        (RISING, 0.81, False, None),
        (RISING, 0.3, True, math.sqrt(3)),
        (RISING, 0.5, True, 3 * (7 / 3) ** 0.25),
        (WAVY, 0.5, False, 1.75),  # the first crossing, although the curve falls again
        (WAVY, 0.65, False, 3.875),
        ([(0.0, 0.0), (2.0, 1.0)], 0.5, True, 1.0),  # 0 has no logarithm
        ([(5.0, 0.5)], 0.5, False, 5.0),
        ([(5.0, 0.5)], 0.6, False, None),
        ([], 0.1, False, None),
        ([(1.0, 0.1), (1.0, 0.9)], 0.5, False, 1.0),
        ([(1.0, -2.0), (3.0, -1.0)], -1.5, False, 2.0),
    ],
)
def test_cost_to_reach(points, score, log, cost):
    found = cost_to_reach(points, score, log)
    assert found is None if cost is None else found == pytest.approx(cost, rel=1e-12)  # a few roundings


few = settings(max_examples=30, deadline=None)
costs = st.floats(1e-3, 1e3)
curves = st.lists(st.tuples(costs, st.floats(0, 1)), min_size=1, max_size=5).map(sorted)


@few
@given(curves, st.floats(0, 1), st.booleans())
def test_cost_is_on_the_curve_where_it_first_gets_there(points, score, log):
    found = cost_to_reach(points, score, log)
    reached = [cost for cost, value in points if value >= score]
    assert (found is None) == (not reached)
    if found is not None:
        # Not after the first point that is there, and after all before it: powers round, so to 1e-12.
        before = [cost for cost, _ in points[: next(i for i, p in enumerate(points) if p[1] >= score)]]
        assert max(before, default=0) * (1 - 1e-12) <= found <= reached[0] * (1 + 1e-12)


@few
@given(curves, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_more_costs_more(points, one, other, log):
    low, high = (cost_to_reach(points, score, log) for score in sorted((one, other)))
    assert high is None or (low is not None and low <= high * (1 + 1e-12))


@few
@given(st.lists(curves, min_size=1, max_size=4), st.floats(0, 1), st.booleans())
def test_half_the_cost_is_twice_the_speed(seeds, score, log):
    half = [[(cost / 2, value) for cost, value in curve] for curve in seeds]
    found = speedup(seeds, half, score, log)
    reach = sum(max(value for _, value in curve) >= score for curve in seeds)
    assert found.seeds == (reach, reach)
    assert found.of == (len(seeds), len(seeds))
    if reach < len(seeds):
        assert found == Speedup(None, None, None, found.seeds, found.of)
    else:
        assert found.ratio == pytest.approx(2, rel=1e-12)


@few
@given(st.lists(curves, min_size=2, max_size=3), st.lists(curves, min_size=2, max_size=3), st.randoms())
def test_order_of_seeds_does_not_matter(baseline, group, random):
    shuffled = [random.sample(side, len(side)) for side in (baseline, group)]
    first, second = speedup(baseline, group, 0.1), speedup(shuffled[0], shuffled[1], 0.1)
    assert (first.seeds, first.of) == (second.seeds, second.of)
    for name in ("ratio", "low", "high"):
        one, other = getattr(first, name), getattr(second, name)
        # Sums in another order; the ends' logarithms are up to 200, and their exponentials have so many roundings.
        assert one is other is None or one == pytest.approx(other, rel=1e-7)


def reaching(*costs: float) -> list[list[tuple[float, float]]]:
    return [[(cost / 2, 0.0), (cost, 1.0)] for cost in costs]


@pytest.mark.parametrize(
    ("baseline", "group"),
    [
        ((10.0, 11.0), (5.0, 6.5)),
        ((10.0, 11.0, 12.5), (5.0, 6.5)),
        ((10.0, 10.1, 10.2, 9.9), (1.0, 30.0, 5.0)),
        ((4.0, 4.0, 4.0), (1.0, 2.0)),  # one side does not vary
        ((1e15, 1.2e15), (9e14, 9.00001e14)),
    ],
)
@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's word on the side that does not vary
def test_interval_is_welchs(baseline, group):
    found = speedup(reaching(*baseline), reaching(*group), 1.0)
    logs = [np.log(side) for side in (baseline, group)]
    interval = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    assert found.ratio == pytest.approx(stats.gmean(baseline) / stats.gmean(group), rel=1e-12)
    # The quantile of t is found by iteration in both: to some 1e-10, times the logarithm's width.
    assert found.low == pytest.approx(math.exp(interval.low), rel=1e-8)
    assert found.high == pytest.approx(math.exp(interval.high), rel=1e-8)
    back = speedup(reaching(*group), reaching(*baseline), 1.0)
    assert found.low is not None
    assert back.high == pytest.approx(1 / found.low, rel=1e-12)


def test_interval_covers_as_often_as_it_says():
    """The truth is 2, costs scatter by 10 % and 30 %, and of 400 intervals some 380 must hold it."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        baseline = np.exp(generator.normal(math.log(8), 0.1, 3))
        group = np.exp(generator.normal(math.log(4), 0.3, 4))
        found = speedup(reaching(*baseline.tolist()), reaching(*group.tolist()), 1.0)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 <= found.high
    assert 365 <= held <= 393  # three deviations of a binomial count, and Welch's form is no exact one


@pytest.mark.parametrize(
    ("baseline", "group", "ratio", "seeds"),
    [
        ((8.0,), (4.0, 5.0), 8 / math.sqrt(20), (1, 2)),  # one seed
        ((8.0, 8.0), (4.0, 4.0), 2.0, (2, 2)),  # no seed differs
        ((8.0, 9.0), (4.0, None), None, (2, 1)),
        ((8.0, 9.0), (None, None), None, (2, 0)),
        ((None,), (4.0,), None, (0, 1)),
        ((0.0,), (4.0,), None, (1, 1)),  # no cost has no logarithm
    ],
)
def test_what_is_not_known_is_none(baseline, group, ratio, seeds):
    curves = [[[(0.0 if cost is None else cost, cost is not None)] for cost in side] for side in (baseline, group)]
    found = speedup(curves[0], curves[1], 1.0)
    assert found.ratio is None if ratio is None else found.ratio == pytest.approx(ratio, rel=1e-12)
    assert (found.low, found.high, found.seeds) == (None, None, seeds)


def test_two_seeds_far_apart_have_no_end_of_their_interval():
    found = speedup(reaching(1e-200, 1e200), reaching(1.0, 1.0), 1.0)
    assert (found.low, found.high) == (0.0, math.inf)
