"""A comparison in plain words: what was found, and no more than was found."""

from __future__ import annotations

import math
from typing import NamedTuple

from mae_et.comparison.runs import ComparedRun, Comparison
from mae_et.comparison.scores import LOSS, is_share
from mae_et.comparison.speedup import Reached, Speedup
from mae_et.comparison.table import geometric_mean, number_text, score_text


class Axis(NamedTuple):
    """How an axis is spoken of.

    Attributes:
        label: under a figure.
        noun: "with 0.4 of the baseline's <noun>".
        less: "2.4× <less>".
        meaning: what is counted, for the foot of a page.
    """

    label: str
    noun: str
    less: str
    meaning: str


SPOKEN = {
    "compute": Axis(
        "training compute",
        "compute",
        "less",
        "Cost is training compute as the plan of each run counts it: 6 floating-point operations for each "
        "multiply-add of a forward pass, 4 of them in the backward pass. Loading images and scoring are not in it.",
    ),
    "hours": Axis(
        "training time",
        "time",
        "faster",
        "Cost is the time spent in training steps, waiting for images included, scoring and saving left out. Hours "
        "compare on equal machines only.",
    ),
    "images": Axis(
        "images seen",
        "images",
        "fewer",
        "Cost is the number of images seen, repetitions included, whatever their size: one at a low B is as dear as "
        "one at full size.",
    ),
    "fraction": Axis(
        "fraction of each run's own budget",
        "share of the budget",
        "sooner",
        "Cost is the fraction of each run's own compute budget. Runs of different budgets are at the same place when "
        "both are half done: this axis says nothing of what they cost.",
    ),
}
INTERVAL = (
    "A speed-up is the baseline's cost to reach the score over the group's, both as geometric means over seeds; its "
    "interval is Welch's t on the logarithms of the costs, one a seed. The first time that a curve, straight between "
    "its scores, reaches the score counts."
)
_SCORES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "probe": "accuracy of a logistic probe"}


def by_group(comparison: Comparison) -> dict[str, list[ComparedRun]]:
    """Runs by group: the baseline first, the others in the order given."""
    groups: dict[str, list[ComparedRun]] = {comparison.baseline: []}
    for run in comparison.runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def told(score: float, comparison: Comparison) -> str:
    """A score, in per cent where all are shares."""
    return score_text(score, is_share(comparison.runs, comparison.score))


def score_name(score: str) -> str:
    """A metric's name for people."""
    if score == LOSS:
        return "training loss, negated"
    short = score.rpartition("/")[2]
    if short.startswith("knn"):
        return f"accuracy of {short.removeprefix('knn')} nearest neighbours"
    return _SCORES.get(short, short)


def compact(value: float) -> str:
    """A cost in few letters, for the ticks of an axis: 1500000 is 1.5 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def cost_text(cost: float, comparison: Comparison) -> str:
    """A cost with its unit."""
    return f"{number_text(cost)} {comparison.unit or 'of the budget'}"


def times(ratio: float) -> str:
    """A ratio with as many digits as mean something: 0.83, 1.25, 2.4; of the far ends of an interval, the order."""
    if ratio < 0.01:
        return "<0.01"
    if ratio > 100:
        return ">100"
    return f"{ratio:.2f}" if ratio < 2 else f"{ratio:.1f}"


def findings(comparison: Comparison) -> list[tuple[str, str]]:
    """(group, sentence) of each group against the baseline, the largest speed-up first."""
    baseline = comparison.baseline
    others = [reached for reached in comparison.reached if reached.group != baseline]
    if not others:
        best = max(point.score for run in comparison.runs for point in run.scores[comparison.score])
        said = f"One group, {baseline}: no costs to compare. Its best {score_name(comparison.score)}: "
        return [(baseline, f"{said}{told(best, comparison)}.")]
    others.sort(key=lambda reached: -(reached.speedup.ratio or 0))
    return [(reached.group, _finding(comparison, reached)) for reached in others]


def _finding(comparison: Comparison, reached: Reached) -> str:
    axis, baseline, group = SPOKEN[comparison.axis], comparison.baseline, reached.group
    score, found = told(reached.score, comparison), reached.speedup
    if found.ratio is None:
        return _without_ratio(comparison, reached)
    bound = f"{found.bound} ".lstrip()
    inverse = {"at least ": "at most ", "at most ": "at least "}.get(bound, "")
    if found.ratio >= 1:
        said = f"{group} reached {score} with {inverse}{times(1 / found.ratio)} of {baseline}'s {axis.noun}: "
        return f"{said}{bound}{times(found.ratio)}× {axis.less} ({_interval(found, baseline, group)})."
    slower = _interval(found, baseline, group, inverse=True)
    return f"{group} needed {inverse}{times(1 / found.ratio)}× {baseline}'s {axis.noun} to reach {score} ({slower})."


def _interval(found: Speedup, baseline: str, group: str, inverse: bool = False) -> str:
    """The interval of a ratio, or of its inverse, or why there is none."""
    first, second = found.of
    if found.low is None or found.high is None:
        if found.bound:
            return f"no interval: {baseline if found.bound == 'at most' else group} was above it when first scored"
        if found.of == (1, 1):
            return "one seed each: no interval"
        if min(found.of) > 1:
            return "no interval: the seeds do not differ"
        return f"no interval: {_seeds(first)} of {baseline}, {_seeds(second)} of {group}"
    low, high = (found.low, found.high) if not inverse else (_inverse(found.high), _inverse(found.low))
    seeds = f"{_seeds(first)} each" if first == second else f"{_seeds(first)} of {baseline}, {second} of {group}"
    said = f"95 % interval {times(low)} to {times(high)}, {seeds}"
    if low <= 1 <= high:
        said += ": it includes 1, so these seeds do not tell the two apart"
    return said


def _inverse(bound: float) -> float:
    """Of an end of an interval, which may be 0 or infinite where two seeds differ much."""
    return 1 / bound if bound else math.inf


def _without_ratio(comparison: Comparison, reached: Reached) -> str:
    group, baseline, score = reached.group, comparison.baseline, told(reached.score, comparison)
    (first, second), of = reached.speedup.seeds, reached.speedup.of
    if (first, second) == of:
        costs = [cost for other in comparison.reached if other.group in (group, baseline) for cost in other.costs]
        if 0 not in costs:
            return f"{group} and {baseline} were above {score} when first scored, so there is no speed-up to tell."
        return f"{group} or {baseline} had {score} before it cost anything, so there is no speed-up to tell."
    if not first and not second:
        fates = ", ".join(f"{name} {_missed(comparison, name)}" for name in (group, baseline))
        return f"Neither reached {score}: {fates}."
    said = f"{_fate(comparison, group, second, of[1], score)}; {_fate(comparison, baseline, first, of[0], 'it')}."
    if 0 < first < of[0] or 0 < second < of[1]:
        said += " Seeds that reach it are a selection, so there is no speed-up to tell."
    return said


def _fate(comparison: Comparison, group: str, seeds: int, of: int, score: str) -> str:
    if not seeds:
        return f"{group} did not reach {score}: it {_missed(comparison, group)}"
    if seeds < of:
        return f"{seeds} of {_seeds(of)} of {group} reached {score}"
    return f"{group} reached {score} at {_reached_at(comparison, group)}"


def _missed(comparison: Comparison, group: str) -> str:
    runs = by_group(comparison)[group]
    best = max(point.score for run in runs for point in run.scores[comparison.score])
    return f"came to {told(best, comparison)} within {cost_text(max(run.total for run in runs), comparison)}"


def _reached_at(comparison: Comparison, group: str) -> str:
    costs = next(reached.costs for reached in comparison.reached if reached.group == group)
    return cost_text(geometric_mean([cost for cost in costs if cost is not None]), comparison)


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
