"""Figures of a comparison as SVG text for a web page: scores, losses and learning rates against cost.

Text stays text, in the page's own font: it can be searched, and weighs little. Places are measured in DejaVu Sans,
which is wider than the fonts that systems show pages in, so nothing comes to overlap. Colours are CSS variables with
Okabe and Ito's as their defaults, so that dark mode and print are the page's business. No text of users gets in here:
names stand in legends, which are HTML.

The same input gives the same text, to the byte.
"""

from __future__ import annotations

import bisect
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mae_et.comparison.runs import ComparedRun, Comparison, StageSpan
from mae_et.comparison.scores import is_share
from mae_et.comparison.table import geometric_mean
from mae_et.comparison.words import SPOKEN, by_group, compact, score_name

# Okabe and Ito, "Color Universal Design" (2008), as in mae_et.tracking.curves; lines differ by marker, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _GRID, _SHADE = "#333333", "#D9DDE2", "#EEF1F5"
_VARIABLES = {
    **{colour: f"--c{number}" for number, colour in enumerate(COLOURS)},
    _INK: "--ink", _GRID: "--grid", _SHADE: "--shade",
}  # fmt: skip
_SHAPES = {
    "o": "M14 1.5a4.5 4.5 0 1 0 .01 0z", "s": "M10 2h8v8h-8z", "^": "M14 1l5 9h-10z",
    "D": "M14 .5l5.5 5.5-5.5 5.5-5.5-5.5z", "v": "M14 11l5-9h-10z",
    "P": "M12.3 1h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
}  # fmt: skip

WIDE, NARROW = 920, 360  # px: of a desktop's column and of a phone's
_POINTS = 120  # of a loss curve, whatever was logged


class Drawn(NamedTuple):
    """A figure, and what its caption has to say about it."""

    svg: str
    note: str = ""


def style_of(number: int) -> tuple[str, str]:
    """Colour and marker of the group of a number; six times six of them are distinct."""
    turn = number // len(COLOURS)
    return COLOURS[number % len(COLOURS)], _MARKERS[(number + turn) % len(_MARKERS)]


def swatch(number: int) -> str:
    """The line and marker of a group, for legends."""
    colour, marker = style_of(number)
    paint = f"var({_VARIABLES[colour]},{colour})"
    return (
        f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><path d="M0 6h28" stroke="{paint}" '
        f'stroke-width="2.4"/><path d="{_SHAPES[marker]}" fill="{paint}"/></svg>'
    )


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over seeds: point by point where they were scored equally often, as they are unless one was cut short.

    Else at the costs of the first of them, each straight between its points, from where the last curve begins to where
    the shortest ends. Costs of the same point differ from seed to seed where they are hours.
    """
    if len({len(curve) for curve in curves}) == 1:
        return [tuple(np.mean(points, axis=0).tolist()) for points in zip(*curves)]
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    costs = [cost for cost, _ in curves[0] if low <= cost <= high]
    values = [np.interp(costs, [cost for cost, _ in curve], [score for _, score in curve]) for curve in curves]
    return list(zip(costs, np.mean(values, axis=0).tolist())) if costs else []


def spans_decades(comparison: Comparison) -> bool:
    """Whether scores lie at costs that differ more than tenfold, which a linear axis crowds at its left."""
    costs = [point.cost for run in comparison.runs for point in run.scores[comparison.score] if point.cost > 0]
    return bool(costs) and max(costs) > 10 * min(costs)


def score_figure(comparison: Comparison, width: int = WIDE, log: bool = False) -> Drawn:
    """Score against cost, a thin line a seed and a bold one a group's mean, above the stages of each group.

    Args:
        comparison: of runs, at least one of which has the score.
        width: WIDE or NARROW.
        log: equal ratios of cost at equal distances; scores that cost nothing are left out.
    """
    groups = by_group(comparison)
    staged = [number for number, runs in enumerate(groups.values()) if _stages(runs)]
    strip = 24 * len(staged) + 8
    figure = _figure(width, (400 if width == WIDE else 270) + (strip if staged else 0) + 44)
    ratios = [400 if width == WIDE else 270, strip] if staged else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    axes, scale = panels[0], 100 if is_share(comparison.runs, comparison.score) else 1
    left_out = 0
    for index, runs in enumerate(groups.values()):
        left_out += _draw_scores(axes, comparison, runs, style_of(index), scale, log)
    _draw_target(axes, comparison, list(groups), scale)
    axes.set_ylabel(score_name(comparison.score) + (", %" if scale == 100 else ""), parse_math=False)
    axes.margins(y=0.08)
    _dress(axes, width)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if width == WIDE else (1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if staged:
        _draw_strip(panels[1], groups, staged, width)
    panels[-1].set_xlabel(_axis_label(comparison))
    kind = f"score-{width}{'-log' if log else ''}"
    note = f"Scores without any cost, which have no place on this axis, are left out: {left_out}." if left_out else ""
    return Drawn(_svg(figure, kind), note)


def loss_figure(comparison: Comparison, group: str) -> Drawn | None:
    """The training loss of a group against cost: a thin line a seed, a bold one their mean, and its stages.

    A point is the mean of what was logged in 1/120 of the run, and never of two stages, as the loss of another B is
    another quantity. Returns None where nothing was logged.
    """
    groups = by_group(comparison)
    index, runs = (
        list(groups).index(group),
        [run for run in groups[group] if run.total and run.curves.get("train/loss")],
    )
    if not runs:
        return None
    stages = _stages(runs)
    figure = _figure(NARROW, 230)
    axes = figure.subplots()
    colour = style_of(index)[0]
    total = max(run.total for run in runs)
    every = math.ceil(max(len(run.curves["train/loss"]) for run in runs) / _POINTS)
    seeds = [_in_bins(run.curves["train/loss"], run.stages, every) for run in runs]
    common = [key for key in seeds[0] if all(key in seed for seed in seeds)]
    mean = {key: tuple(np.mean([seed[key] for seed in seeds], axis=0)) for key in common}
    if len(seeds) > 1:
        for seed in seeds:
            _draw_by_stage(axes, seed, color=colour, linewidth=1, alpha=0.4)
    _draw_by_stage(axes, mean, color=colour, linewidth=2.2, marker="." if len(mean) < 30 else None)
    _dress(axes, NARROW)
    note = _trim_start(axes, seeds)
    axes.set_xlim(0, total)
    _shade(axes, stages, total)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_ylabel("training loss")
    axes.set_xlabel(_axis_label(comparison))
    return Drawn(_svg(figure, f"loss-{index}"), note)


def rate_figure(comparison: Comparison, width: int = WIDE) -> str | None:
    """The learning rate of the first run of each group against cost; None where none was logged."""
    figure = _figure(width, 230 if width == WIDE else 210)
    axes = figure.subplots()
    drawn = False
    for index, runs in enumerate(by_group(comparison).values()):
        curve = next((run.curves["train/lr"] for run in runs if run.curves.get("train/lr")), None)
        if curve:
            drawn = True
            colour, marker = style_of(index)
            # Apart along the line, as those of groups with one schedule would cover each other.
            every = max(1, len(curve) // 8)
            at = list(range((index * every) // 3 % every, len(curve), every))
            axes.plot(*zip(*curve), color=colour, linewidth=2, marker=marker, markersize=6, markevery=at)
    if not drawn:
        return None
    _dress(axes, width)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("learning rate")
    axes.set_xlabel(_axis_label(comparison))
    return _svg(figure, f"rate-{width}")


def _draw_scores(
    axes: Axes, comparison: Comparison, runs: Sequence[ComparedRun], style: tuple[str, str], scale: float, log: bool
) -> int:
    """Returns how many points have no place on the axis."""
    colour, marker = style
    everything = [[(point.cost, scale * point.score) for point in run.scores[comparison.score]] for run in runs]
    curves = [[point for point in curve if point[0] > 0] if log else curve for curve in everything]
    left_out = sum(map(len, everything)) - sum(map(len, curves))
    curves = [curve for curve in curves if curve]
    if not curves:
        return left_out
    if len(curves) > 1:
        for curve in curves:
            axes.plot(*zip(*curve), color=colour, linewidth=1, alpha=0.55, marker=marker, markersize=2.5)
    mean = mean_curve(curves)
    if mean:
        every = max(1, len(mean) // 10)
        axes.plot(*zip(*mean), color=colour, lw=2.6, marker=marker, markersize=7, markevery=every, clip_on=False)
    return left_out


def _draw_target(axes: Axes, comparison: Comparison, groups: Sequence[str], scale: float) -> None:
    """A dashed line at the score to be reached, and an outlined marker where a group reaches it."""
    axes.axhline(scale * comparison.reached[0].score, color=_INK, linewidth=1.2, dashes=(5, 3), zorder=1)
    for reached in comparison.reached:
        costs = [cost for cost in reached.costs if cost is not None]
        if costs:
            colour, marker = style_of(groups.index(reached.group))
            at = (geometric_mean(costs), scale * reached.score)
            axes.plot(*at, marker=marker, markersize=13, color=colour, fillstyle="none", markeredgewidth=1.8, zorder=4)


def _draw_strip(axes: Axes, groups: dict[str, list[ComparedRun]], staged: Sequence[int], width: int) -> None:
    """A row of bars a group, lighter and darker in turn, with the B of each stage in it where there is room."""
    low, high = axes.get_xlim()
    log = axes.get_xscale() == "log"
    place = (lambda x: math.log(x / low) / math.log(high / low)) if log else (lambda x: (x - low) / (high - low))
    for row, index in enumerate(staged):
        colour, marker = style_of(index)
        for number, stage in enumerate(_stages(list(groups.values())[index])):
            begin, end = max(stage.begin, low), min(stage.end, high)
            if end <= begin:
                continue
            axes.barh(row, end - begin, 0.8, begin, color=colour, alpha=(0.22, 0.42)[number % 2], linewidth=0)
            if (place(end) - place(begin)) * width > 9 * len(stage.label) + 8:
                middle = math.sqrt(begin * end) if log else (begin + end) / 2
                axes.text(middle, row, stage.label, ha="center", va="center_baseline", color=_INK, parse_math=False)
        axes.plot(
            -0.015, row, marker=marker, color=colour, markersize=6, transform=axes.get_yaxis_transform(), clip_on=False
        )
    axes.set_xlim(low, high)
    axes.set_ylim(len(staged) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.set_ylabel("B", rotation=0, ha="right", va="center", labelpad=16)


def _in_bins(
    curve: Sequence[tuple[float, float]], stages: Sequence[StageSpan], every: int
) -> dict[tuple[int, int], tuple[float, float]]:
    """Means of (cost, value) by (stage, bin) of so many rows, which are of the same steps in every seed."""
    ends = [stage.end * (1 - 1e-9) for stage in stages[:-1]]  # a row at the very end of a stage is that stage's
    bins: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row, (cost, value) in enumerate(curve):
        key = (bisect.bisect_left(ends, cost * (1 - 2e-9)), row // every)
        bins.setdefault(key, []).append((cost, value))
    return {key: tuple(np.mean(points, axis=0).tolist()) for key, points in sorted(bins.items())}


def _draw_by_stage(axes: Axes, points: dict[tuple[int, int], tuple[float, ...]], **style: Any) -> None:
    for stage in dict.fromkeys(stage for stage, _ in points):
        axes.plot(*zip(*(point for (of, _), point in points.items() if of == stage)), **style)


def _trim_start(axes: Axes, seeds: Sequence[dict[tuple[int, int], tuple[float, float]]]) -> str:
    """Where the first tenth of the losses (fresh weights) towers over the rest, scale the axis to the rest."""
    first, rest = [], []
    for seed in seeds:
        losses = [loss for _, loss in seed.values()]
        cut = math.ceil(len(losses) / 10)
        first, rest = first + losses[:cut], rest + losses[cut:]
    if not first or not rest or not max(first) - max(rest) > max(rest) - min(rest) > 0:
        return ""
    low, high = min(rest), max(rest)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    return f"The first losses, up to {max(first):.3g}, lie above."


def _shade(axes: Axes, stages: Sequence[StageSpan], total: float) -> None:
    for number, stage in enumerate(stages):
        begin, end = stage.begin, min(stage.end, total)
        if end <= begin:
            continue
        if number % 2 == 0:
            axes.axvspan(begin, end, color=_SHADE, zorder=0, linewidth=0)
        if number:
            axes.axvline(begin, color=_INK, linewidth=0.8, alpha=0.5, zorder=1)
        if (end - begin) * NARROW > total * 8 * len(stage.label):
            axes.annotate(
                f"B {stage.label}" if (end - begin) * NARROW > total * 8 * (len(stage.label) + 3) else stage.label,
                ((begin + end) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=_INK,
                parse_math=False,
            )


def _stages(runs: Sequence[ComparedRun]) -> tuple[StageSpan, ...]:
    return next((run.stages for run in runs if run.stages), ())


def _axis_label(comparison: Comparison) -> str:
    return SPOKEN[comparison.axis].label + (f", {comparison.unit}" if comparison.axis in ("compute", "hours") else "")


def _figure(width: int, height: int) -> Figure:
    # 72 dots an inch: a point is a pixel of the view box.
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))
    FigureCanvasSVG(figure)
    return figure


def _dress(axes: Axes, width: int) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6 if width == WIDE else 5))


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for HTML: ids of its own, colours as variables, no size, no metadata."""
    size = 13 if figure.get_figwidth() * 72 > NARROW + 1 else 12
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_fontsize(size)
    for axes in figure.axes:
        axes.tick_params(colors=_INK, labelsize=size)
        axes.spines[:].set_color(_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    width, height = (72 * side for side in figure.get_size_inches())
    # What matplotlib says of all lines in a style sheet, which would be the whole page's, and the font, once.
    style = "font-family:var(--font,sans-serif);stroke-linejoin:round;stroke-linecap:butt"
    root = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" aria-hidden="true">'
    text = re.sub(r"<svg[^>]*>", root, text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)  # before matplotlib 3.10
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour.lower(), f"var({variable},{colour})")
    return re.sub(r"\s*\n\s*", "\n", text)
