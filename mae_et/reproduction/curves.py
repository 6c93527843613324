"""Scores of complete runs against what they cost, from budget to budget: tables, speed-ups at equal score, a picture.

A point of a curve is a run of its own, with a learning rate that ends with its budget; scores on the way of one long
run would flatter nobody, and compare nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mae_et.comparison.speedup import Curve, Speedup, speedup, with_bounds
from mae_et.comparison.table import SIGNS
from mae_et.reproduction.cells import Run, Spent, runs_of, score, spent
from mae_et.reproduction.experiments import Curves, Scale

if TYPE_CHECKING:  # drawing takes a second to import, and few commands draw
    from matplotlib.axes import Axes

AXES = {"flops": ("TFLOPs", 1e12), "core_minutes": ("core minutes", 1.0)}


# Okabe and Ito's colours, as of all our pictures, each with a marker of its own.
_STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#8C564B", "*"),
)  # fmt: skip


class Point(NamedTuple):
    """One run: a level of what is compared and of the budget, its seed, its cost and its score."""

    level: str
    budget: str
    seed: int
    cost: Spent
    score: float


def points_of(scale: Scale, curves: Curves, places: Mapping[str, str]) -> list[Point]:
    """The points that there are, in the order of the file."""
    made = {cell.name: runs_of(scale, cell, places) for cell in scale.cells.values()}
    found = []
    for cell in scale.cells.values():
        if cell.pattern != curves.cells:
            continue
        for run in made[cell.name]:
            value, cost = score(run, curves.score), _cost(run, made)
            if value is not None and cost is not None:
                found.append(Point(cell.levels[curves.of], cell.levels[curves.over], run.seed, cost, value))
    return found


def _cost(run: Run, made: Mapping[str, list[Run]]) -> Spent | None:
    """Of pretraining: the run's own, or that of the run of the same seed that it uses."""
    used = [other for name in run.cell.uses if name in made for other in made[name]]
    return spent(next((other for other in used if other.seed == run.seed), used[0]) if used else run)


def curves_of(points: Sequence[Point], level: str, axis: str) -> list[Curve]:
    """(cost, score) of a level, one curve a seed, in order of cost; runs without that cost are left out."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        cost = getattr(point.cost, axis)
        if point.level == level and cost is not None:
            by_seed.setdefault(point.seed, []).append((cost, point.score))
    return [sorted(curve) for curve in by_seed.values()]


def curves_text(scale: Scale, curves: Curves, places: Mapping[str, str]) -> str:
    """Scores by level and budget, and what each level saves of the baseline's cost, in Markdown."""
    points = points_of(scale, curves, places)
    parts = [f"### {curves.title}", score_table(scale, curves, points)]
    parts += [text for axis in AXES if (text := saving_table(scale, curves, points, axis))]
    return "\n\n".join(parts)


def score_table(scale: Scale, curves: Curves, points: Sequence[Point]) -> str:
    """Mean and deviation over seeds, and the mean core minutes of training, by level and budget."""
    budgets = {point.budget: scale.grid[curves.over][point.budget]["title"] for point in points}
    ordered = [budget for budget in scale.grid[curves.over] if budget in budgets]
    lines = [["", *(budgets[budget] for budget in ordered)], ["---"] * (len(ordered) + 1)]
    for level, texts in scale.grid[curves.of].items():
        cells = [[point for point in points if (point.level, point.budget) == (level, budget)] for budget in ordered]
        if any(cells):
            lines.append([texts["title"], *map(_cell_text, cells)])
    return _markdown(lines)


def _cell_text(points: Sequence[Point]) -> str:
    if not points:
        return ""
    scores, minutes = [point.score for point in points], [point.cost.core_minutes for point in points]
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    known = [value for value in minutes if value is not None]
    took = f", {statistics.fmean(known):.1f} core min" if known else ""
    return f"{100 * statistics.fmean(scores):.1f}{spread} ({len(scores)}{took})"


class Saving(NamedTuple):
    """What a level saves where it reaches what every seed of the baseline reaches with a budget."""

    level: str
    budget: str
    score: float
    speedup: Speedup


def savings(scale: Scale, curves: Curves, points: Sequence[Point], axis: str) -> list[Saving]:
    """Of every other level at every budget of the baseline, by interpolation in the logarithm of the cost."""
    baseline = curves_of(points, curves.baseline, axis)
    found = []
    for level in scale.grid[curves.of]:
        others = curves_of(points, level, axis)
        if level == curves.baseline or not others or not baseline:
            continue
        for budget in scale.grid[curves.over]:
            reached = [p.score for p in points if (p.level, p.budget) == (curves.baseline, budget)]
            if reached:
                target = min(reached)
                gain = with_bounds(speedup(baseline, others, target, log=True), baseline, others, target)
                found.append(Saving(level, budget, target, gain))
    return found


def saving_table(scale: Scale, curves: Curves, points: Sequence[Point], axis: str) -> str:
    """`savings` in Markdown; "" where there are none."""
    grid, found = scale.grid, savings(scale, curves, points, axis)
    if not found:
        return ""
    baseline = grid[curves.of][curves.baseline]["title"]
    lines = [[f"speed-up against {baseline}, in {AXES[axis][0]}", "at", "ratio", "95 % interval", "seeds"], ["---"] * 5]
    for saving in found:
        result = saving.speedup
        lost = "not by all seeds" if result.seeds != result.of else "with the least budgets"
        ratio = lost if result.ratio is None else f"{SIGNS[result.bound]}{result.ratio:.2f}x"
        interval = "" if result.low is None or result.high is None else f"{result.low:.2f} to {result.high:.2f}"
        seeds = " and ".join(f"{some} of {all_}" for some, all_ in zip(result.seeds, result.of))
        at = f"{100 * saving.score:.1f} % ({grid[curves.over][saving.budget]['title']})"
        lines.append([grid[curves.of][saving.level]["title"], at, ratio, interval, seeds])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_curves(scale: Scale, curves: Curves, places: Mapping[str, str], path: Path) -> bool:
    """Draw means over seeds as lines and runs as points, against compute and against core minutes.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    points = points_of(scale, curves, places)
    if not points:
        return False
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, (unit, scale_of)) in zip(panels, AXES.items()):
        for (level, texts), (color, marker) in zip(scale.grid[curves.of].items(), _STYLES):
            _draw_level(axes, points, level, texts["title"], axis, scale_of, color, marker)
        axes.set_xscale("log")
        axes.set_xlabel(f"pretraining, {unit}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("accuracy, %")
    # Below both panels: within them it would hide points, wherever it is.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(curves.title)
    figure.savefig(path)
    return True


def _draw_level(
    axes: Axes, points: Sequence[Point], level: str, title: str, axis: str, unit: float, color: str, marker: str
) -> None:
    of_level = [point for point in points if point.level == level and getattr(point.cost, axis) is not None]
    if not of_level:
        return
    costs = [getattr(point.cost, axis) / unit for point in of_level]
    axes.plot(costs, [100 * point.score for point in of_level], marker, color=color, alpha=0.35, markersize=4)
    means = []
    for budget in dict.fromkeys(point.budget for point in of_level):
        same = [(cost, point.score) for cost, point in zip(costs, of_level) if point.budget == budget]
        means.append([statistics.fmean(values) for values in zip(*same)])
    means.sort()
    axes.plot([m[0] for m in means], [100 * m[1] for m in means], f"-{marker}", color=color, label=title, markersize=6)
