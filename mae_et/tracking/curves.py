"""A run's curves as one picture: loss, learning rate and evaluation scores against the fraction of compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

# Okabe and Ito, "Color Universal Design" (2008): apart for colour-blind readers. Scores also differ by marker.
_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
_SCORE_STYLES = (
    (_GREEN, "o"), (_PURPLE, "s"), (_ORANGE, "^"), (_SKY, "D"), (_VERMILION, "v"), (_BLUE, "P"),
)  # fmt: skip
_SHADES = ("#E9EDF2", "#F6F8FA")  # what the run has not reached stays white

SMOOTHING = 0.02


class _StageSpan(NamedTuple):
    stage: int
    begin: float
    end: float
    label: str


def curve_picture(rows: Sequence[Mapping[str, Any]], path: Path | str, title: str = "") -> None:
    """Draw the rows of `read_metrics` to a picture file, 1200 px wide.

    From the top: "train/loss", thin as logged and bold smoothed (see `smooth`; never across a stage boundary, as
    the loss of another B is another quantity), with a cross at the foot for each loss that is not finite; "train/lr";
    then the scores "eval/...", those within 0..1 together and each other one on its own axis. All against
    "compute/fraction", with the stages shaded and labelled by their B.

    Raises: ValueError where no row has both "compute/fraction" and "train/loss".
    """
    train = [row for row in rows if "train/loss" in row and "compute/fraction" in row]
    if not train:
        raise ValueError('there is no row with "compute/fraction" and "train/loss" to draw; has the run logged yet?')
    score_groups = _score_groups(rows)
    heights = [2.6, 1.3] + [1.6] * len(score_groups)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(12, 1.3 + 1.25 * sum(heights)), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    stages = _stage_spans(train)
    _draw_loss(all_axes[0], train, stages)
    _draw_learning_rate(all_axes[1], train)
    for axes, names in zip(all_axes[2:], score_groups):
        _draw_scores(axes, rows, names)
    for axes in all_axes:
        _dress(axes, stages)
    _label_stages(all_axes[0], stages)
    all_axes[-1].set_xlabel("u, the fraction of the compute budget", fontsize=12)
    all_axes[0].set_xlim(0, max(1.0, stages[-1].end))
    figure.align_ylabels(all_axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=15)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Average each value with its neighbours: a centred window of `window` points (odd), cut off at both ends.

    Values that are not finite are left out of the averages; a window without any other gives NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([float(row.get(name, math.nan)) for row in rows])


def _stage_spans(train: Sequence[Mapping[str, Any]]) -> list[_StageSpan]:
    """Group consecutive rows by "stage/index"; a stage ends at its last row, which the loop logs at its last step."""
    spans: list[_StageSpan] = []
    for row in train:
        index, u = int(row.get("stage/index", 0)), float(row["compute/fraction"])
        if not spans or index != spans[-1].stage:
            label = f"B = {row['stage/bandwidth']}" if "stage/bandwidth" in row else f"stage {index + 1}"
            spans.append(_StageSpan(index, spans[-1].end if spans else 0.0, u, label))
        else:
            spans[-1] = spans[-1]._replace(end=u)
    return spans


def _draw_loss(axes: Axes, train: Sequence[Mapping[str, Any]], stages: Sequence[_StageSpan]) -> None:
    u, loss = _column(train, "compute/fraction"), _column(train, "train/loss")
    index = np.array([int(row.get("stage/index", 0)) for row in train])
    window = 2 * round(SMOOTHING * len(train) / 2) + 1
    marker = "." if len(train) < 30 else None
    label = "as logged"
    if window > 1:
        axes.plot(u, np.where(np.isfinite(loss), loss, np.nan), color=_BLUE, alpha=0.35, linewidth=1, label=label)
        label = f"mean of {window} rows"
    for number in dict.fromkeys(index.tolist()):
        chosen = index == number
        axes.plot(u[chosen], smooth(loss[chosen], window), marker=marker, color=_BLUE, lw=2.2, label=label)
        label = None
    broken = ~np.isfinite(loss)
    if broken.any():
        foot = axes.get_xaxis_transform()
        count = f"not finite ({broken.sum()})"
        axes.plot(u[broken], np.full(broken.sum(), 0.04), "x", color=_VERMILION, transform=foot, label=count)
    axes.set_ylabel("training loss", fontsize=12)
    axes.legend(loc="upper right", frameon=False, ncols=3, title=_trim_start(axes, loss), alignment="right")


def _trim_start(axes: Axes, loss: np.ndarray) -> str | None:
    """Where the first twentieth of the losses (fresh weights) towers over the rest, scale the axis to the rest.

    Returns what to tell the reader about it, if anything.
    """
    first, rest = np.split(loss, [len(loss) // 20])
    first, rest = first[np.isfinite(first)], rest[np.isfinite(rest)]
    if not len(first) or not len(rest):
        return None
    low, high = rest.min(), rest.max()
    if not first.max() - high > high - low > 0:
        return None
    axes.set_ylim(low - 0.08 * (high - low), high + 0.3 * (high - low))
    return f"The first losses, up to {first.max():.3g}, lie above."


def _draw_learning_rate(axes: Axes, train: Sequence[Mapping[str, Any]]) -> None:
    u, rate = _column(train, "compute/fraction"), _column(train, "train/lr")
    axes.plot(u, rate, marker="." if len(train) < 30 else None, color=_VERMILION, linewidth=2)
    axes.set_ylabel("learning rate", fontsize=12)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _score_groups(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of numeric scores by axis: those within 0..1 share one, every other has its own."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if "compute/fraction" in row:
            for name, value in row.items():
                if name.startswith("eval/") and isinstance(value, int | float):
                    values.setdefault(name, []).append(value)
    shared = [name for name, scores in values.items() if all(0 <= score <= 1 for score in scores)]
    return ([shared] if shared else []) + [[name] for name in values if name not in shared]


def _draw_scores(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for name, (colour, marker) in zip(names, _SCORE_STYLES * math.ceil(len(names) / len(_SCORE_STYLES))):
        scored = [row for row in rows if isinstance(row.get(name), int | float) and "compute/fraction" in row]
        last = float(scored[-1][name])
        axes.plot(
            _column(scored, "compute/fraction"),
            _column(scored, name),
            color=colour,
            marker=marker,
            linewidth=1.8,
            clip_on=False,
            label=f"{name.removeprefix('eval/')} ({last:.4g} at the end)",
        )
    axes.set_ylabel("score" if len(names) > 1 else names[0].removeprefix("eval/"), fontsize=12)
    axes.margins(y=0.1)
    # Above the axes, where it covers no point whatever the scores do.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=4, borderpad=0, fontsize=11)


def _dress(axes: Axes, stages: Sequence[_StageSpan]) -> None:
    for number, span in enumerate(stages):
        axes.axvspan(span.begin, span.end, color=_SHADES[number % 2], zorder=0, linewidth=0)
        if number:
            axes.axvline(span.begin, color="#9AA3AD", linewidth=0.8, zorder=1)
    axes.grid(axis="y", color="#D9DDE2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(labelsize=11)


def _label_stages(axes: Axes, stages: Sequence[_StageSpan]) -> None:
    """Write each stage's B above its span, on two heights where the spans are narrow, and short where many."""
    width = stages[-1].end - stages[0].begin
    narrow = any(span.end - span.begin < 0.08 * width for span in stages)
    for number, span in enumerate(stages):
        axes.annotate(
            span.label if len(stages) <= 12 else span.label.rpartition(" ")[2],
            ((span.begin + span.end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 18 if narrow and number % 2 else 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=12,
            annotation_clip=False,
        )
