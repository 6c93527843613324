"""How much sooner one group of runs reaches a score than another, with its interval over seeds.

A curve is a sequence of (cost, score) in order of cost. Scores fall as well as rise on the way; the first time that a
curve reaches the score counts, and not whether it stays there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Curve = Sequence[tuple[float, float]]

LEVEL = 0.95


@dataclass(frozen=True)
class Speedup:
    """What a group costs against the baseline.

    Attributes:
        ratio: geometric mean of the baseline's costs over that of the group's; above 1 the group is faster. None where
            some seed never reaches the score, since those that do are a selection, or reaches it at no cost.
        low, high: two-sided 95 % interval of the ratio, by Welch's t on the logarithms of the costs, one cost a seed.
            None without a ratio, with fewer than two seeds on either side, and where no two seeds of a side differ,
            which tells nothing of how they vary.
        seeds: how many of (baseline, group) reach the score.
        of: how many there are of each.
        bound: "at least" or "at most" where the ratio is no more than that; "" where it is an estimate.
    """

    ratio: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, int]
    of: tuple[int, int]
    bound: str = ""


@dataclass(frozen=True)
class Reached:
    """What it costs a group to reach a score.

    Attributes:
        group: its name.
        score: that was to be reached.
        costs: one a seed; None where it never does.
        speedup: against the baseline.
    """

    group: str
    score: float
    costs: tuple[float | None, ...]
    speedup: Speedup


def cost_to_reach(points: Curve, score: float, log: bool = False) -> float | None:
    """The least cost at which a curve, straight between its points, has reached a score.

    Args:
        points: (cost, score) in order of cost.
        score: to be reached, or passed.
        log: straight in the logarithm of the cost. From a point without cost on, which has none, straight in the cost.

    Returns:
        The cost; the first point's where it is there already; None where the curve never gets there.
    """
    for index, (cost, reached) in enumerate(points):
        if reached < score:
            continue
        if index == 0:
            return cost
        before, below = points[index - 1]
        share = (score - below) / (reached - below)
        if log and before > 0:
            return before * (cost / before) ** share
        return before + share * (cost - before)
    return None


def speedup(baseline: Sequence[Curve], group: Sequence[Curve], score: float, log: bool = False) -> Speedup:
    """The baseline's cost to reach a score over the group's.

    Args:
        baseline, group: curves, one a seed; at least one each.
        score: to be reached.
        log: see `cost_to_reach`.
    """
    found = [[cost_to_reach(curve, score, log) for curve in curves] for curves in (baseline, group)]
    costs = [[cost for cost in side if cost is not None] for side in found]
    seeds, of = (len(costs[0]), len(costs[1])), (len(baseline), len(group))
    if seeds != of or min(map(min, costs)) <= 0:
        return Speedup(None, None, None, seeds, of)
    first, second = (np.log(side) for side in costs)
    middle = float(first.mean() - second.mean())
    if min(of) < 2 or np.ptp(first) == np.ptp(second) == 0:
        return Speedup(math.exp(middle), None, None, seeds, of)
    reach = welch_reach(first, second)
    with np.errstate(over="ignore", under="ignore"):  # two seeds that differ much leave an interval without an end
        low, high = np.exp([middle - reach, middle + reach])
    return Speedup(math.exp(middle), float(low), float(high), seeds, of)


def begins_above(curves: Sequence[Curve], score: float) -> bool:
    """Whether some seed is above a score where its curve begins, so that it may have got there for less."""
    return any(curve[0][1] > score for curve in curves)


def with_bounds(found: Speedup, baseline: Sequence[Curve], group: Sequence[Curve], score: float) -> Speedup:
    """What is left of a speed-up where curves begin above the score: a bound; nothing where both sides' do."""
    late, early = begins_above(baseline, score), begins_above(group, score)
    if found.ratio is None or not (late or early):
        return found
    if late and early:
        return replace(found, ratio=None, low=None, high=None)
    return replace(found, low=None, high=None, bound="at most" if late else "at least")


def welch_reach(first: np.ndarray, second: np.ndarray) -> float:
    """Half the width of the 95 % interval of a difference of means, whose variances need not be the same.

    Welch, Biometrika 34 (1947), 28-35, with the degrees of freedom of Satterthwaite, Biometrics Bulletin 2 (1946).

    Args:
        first, second: at least two values each, of which some differ.
    """
    from scipy.special import stdtrit  # half a second that no other command should wait for

    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    total = sum(parts)
    # By shares of the total, since squares of small variances would vanish.
    shares = [part / total for part in parts]
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (first, second)))
    return float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(total)
