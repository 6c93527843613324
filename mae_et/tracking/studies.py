"""Pictures of studies: accuracy by frequency, by compute and frequency, similarity of runs, and filtered images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# Okabe and Ito, "Color Universal Design" (2008), as in mae_et.tracking.curves; lines differ by marker, too.
_STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
)  # fmt: skip
_GRID, _INK = "#D9DDE2", "#333333"
_PASS = {"low": "low-pass: what is coarser than the radius", "high": "high-pass: what is finer than the radius"}
_RADIUS = "radius of the filter in cycles per image"
_NAMES = {"top1": "top-1 accuracy", "probe": "logistic probe"}


class SpectrumPoint(NamedTuple):
    """One score of one checkpoint under one filter.

    Attributes:
        run: its name.
        step: of the checkpoint.
        compute: fraction of the run's compute spent by then.
        score: "top1", "probe", "knn20", ...
        filter: "none", "low" or "high".
        radius: of the filter in cycles over the image's shorter side; None without one.
        value: accuracy in [0, 1].
        images: how many were scored.
    """

    run: str
    step: int
    compute: float
    score: str
    filter: str
    radius: float | None
    value: float
    images: int


def spectrum_picture(points: Sequence[SpectrumPoint], path: Path | str, note: str = "") -> None:
    """Draw accuracy against the radius, low-pass on the left and high-pass on the right; a line a run, a row a score.

    Points are of one checkpoint a run. Dashed lines are of unfiltered images.

    Args:
        points: in any order.
        path: of the picture, 1200 px wide; its folder is made.
        note: a line at the foot.
    """
    scores = list(dict.fromkeys(point.score for point in points))
    runs = list(dict.fromkeys(point.run for point in points))
    figure, axes = _panels(len(scores), 2, 4.2)
    for row, score in enumerate(scores):
        for column, kind in enumerate(_PASS):
            panel = axes[row, column]
            for number, run in enumerate(runs):
                of_run = [p for p in points if p.run == run and p.score == score]
                colour, marker = _STYLES[number % len(_STYLES)]
                curve = sorted((p.radius, p.value) for p in of_run if p.filter == kind and p.radius is not None)
                if curve:
                    panel.plot(*_percent(curve), color=colour, marker=marker, linewidth=2.2, markersize=7, label=run)
                for whole in (p for p in of_run if p.filter == "none"):
                    panel.axhline(100 * whole.value, color=colour, linewidth=1.5, linestyle=(0, (5, 3)))
            _radius_axis(panel, [p.radius for p in points if p.radius is not None])
            _dress(panel, row == 0, row == len(scores) - 1, _PASS[kind], _RADIUS)
        axes[row, 0].set_ylabel(f"{_score_name(score)}, %", fontsize=14)
    handles, labels = _legend_entries(axes)
    handles.append(Line2D([], [], color=_INK, linewidth=1.5, linestyle=(0, (5, 3))))
    _finish(figure, path, handles, [*labels, "unfiltered"], note)


def spectrum_by_compute_picture(points: Sequence[SpectrumPoint], path: Path | str, note: str = "") -> None:
    """Draw one run's accuracy against the compute spent, a line a radius; a row a score.

    Args, as for `spectrum_picture`: the points are of one run and of several checkpoints.
    """
    scores = list(dict.fromkeys(point.score for point in points))
    radii = sorted({point.radius for point in points if point.radius is not None})
    figure, axes = _panels(len(scores), 2, 4.4)
    for row, score in enumerate(scores):
        for column, kind in enumerate(_PASS):
            panel = axes[row, column]
            for number, radius in enumerate(radii):
                chosen = [p for p in points if p.score == score and p.filter == kind and p.radius == radius]
                curve = sorted((p.compute, p.value) for p in chosen)
                # The yellow end of the map is too light for lines on white.
                colour = matplotlib.colormaps["viridis"](0.9 * number / max(len(radii) - 1, 1))
                marker = _STYLES[number % len(_STYLES)][1]
                panel.plot(
                    *_percent(curve), color=colour, marker=marker, linewidth=2, markersize=6, label=f"{radius:g}"
                )
            whole = sorted((p.compute, p.value) for p in points if p.score == score and p.filter == "none")
            panel.plot(*_percent(whole), color="black", linewidth=2, linestyle=(0, (5, 3)), label="unfiltered")
            _compute_axis(panel, [p.compute for p in points])
            title = _PASS[kind]
            _dress(panel, row == 0, row == len(scores) - 1, title, "u, the fraction of the compute budget")
        axes[row, 0].set_ylabel(f"{_score_name(score)}, %", fontsize=14)
    figure.suptitle(points[0].run, x=0.01, ha="left", fontsize=15)
    handles, labels = _legend_entries(axes)
    _finish(figure, path, handles, labels, note, _RADIUS)


class SimilarityMap(NamedTuple):
    """CKA of every checkpoint of one run with every one of another.

    Attributes:
        first, second: names of the runs: rows and columns.
        first_compute, second_compute: fractions of their compute at the checkpoints, rising.
        block: "last", or what the features are of.
        values: [rows, columns] in [0, 1].
    """

    first: str
    second: str
    first_compute: Sequence[float]
    second_compute: Sequence[float]
    block: str
    values: np.ndarray


def similarity_picture(maps: Sequence[SimilarityMap], path: Path | str, note: str = "") -> None:
    """Draw heat maps on one scale, a panel a map; a cell is a pair of checkpoints, whatever the compute between them.

    Args:
        maps: of pairs of runs, or of one pair by block.
        path: of the picture; its folder is made.
        note: a line at the foot.
    """
    columns = min(len(maps), 3)
    rows = math.ceil(len(maps) / columns)
    figure, axes = _panels(rows, columns, 10.6 / columns if columns > 1 else 8.5, sharex=False, sharey=False)
    low = min(float(m.values.min()) for m in maps)
    low = math.floor(20 * low) / 20 if low < 0.99 else 0.95
    mesh = None
    for panel, drawn in zip(axes.ravel(), maps):
        mesh = panel.imshow(drawn.values, origin="lower", cmap="cividis", vmin=low, vmax=1, aspect="auto")
        for axis, computes in ((panel.xaxis, drawn.second_compute), (panel.yaxis, drawn.first_compute)):
            _cell_ticks(axis, computes, 8 if columns > 1 else 14)
        panel.set_xlabel(f"{drawn.second}, u", fontsize=14)
        panel.set_ylabel(f"{drawn.first}, u", fontsize=14)
        if len(maps) > 1:
            panel.set_title(drawn.block, fontsize=14)
        if max(drawn.values.shape) * columns <= 14:
            _write_values(panel, drawn.values, low)
        panel.tick_params(labelsize=12)
    for panel in axes.ravel()[len(maps) :]:
        panel.set_axis_off()
    assert mesh is not None, "a picture of no map"
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8)
    bar.set_label("linear CKA", fontsize=14)
    bar.ax.tick_params(labelsize=12)
    _finish(figure, path, [], [], note or "u: fraction of the compute budget at each checkpoint kept")


def filter_picture(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str], path: Path | str) -> None:
    """Draw what the network is shown: a row a kind of filter and image, a column a radius.

    Args:
        rows: (label, images), each image float on 0..1 [H, W, 1 or 3]; what lies outside is clipped.
        columns: titles.
        path: of the picture; its folder is made.
    """
    count = len(columns)
    figure, axes = _panels(len(rows), count, 12 / count, sharex=False, sharey=False)
    for (label, images), line in zip(rows, axes):
        for panel, image in zip(line, images):
            shown = np.clip(image, 0, 1)
            panel.imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(label, fontsize=13)
    for panel, title in zip(axes[0], columns):
        panel.set_title(title, fontsize=13)
    _finish(figure, path, [], [], _RADIUS[:1].upper() + _RADIUS[1:] + "; high-pass on the mean of the normalisation")


def _panels(rows: int, columns: int, height: float, sharex: bool = True, sharey: bool | str = "row") -> Any:
    figure = Figure(figsize=(12, 1.2 + height * rows), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)  # pyright: ignore


def _percent(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [100 * value for _, value in curve]


def _score_name(score: str) -> str:
    return _NAMES.get(score, f"{score.removeprefix('knn')}-nearest neighbours" if score.startswith("knn") else score)


def _radius_axis(axes: Axes, radii: Sequence[float]) -> None:
    """Equal ratios at equal distances, every radius written where there is room."""
    axes.set_xscale("log")
    distinct = sorted(set(radii))
    shown = [distinct[-1]] if distinct else []
    for radius in reversed(distinct[:-1]):
        if shown[-1] / radius > 1.12 * (distinct[-1] / distinct[0]) ** 0.02:
            shown.append(radius)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _compute_axis(axes: Axes, computes: Sequence[float]) -> None:
    """From 0, unless all checkpoints lie close together."""
    if min(computes) < 0.8:
        axes.set_xlim(0, 1.02 * max(computes))


def _dress(axes: Axes, top: bool, bottom: bool, title: str, label: str) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(labelsize=12, labelleft=True)
    if top:
        axes.set_title(title, fontsize=14)
    if bottom:
        axes.set_xlabel(label, fontsize=14)


def _cell_ticks(axis: Any, computes: Sequence[float], most: int) -> None:
    """The compute fraction under every cell, or under every second, third, ... and the last."""
    step = math.ceil(len(computes) / most)
    shown = list(range(len(computes) - 1, -1, -step))
    digits = 2 if len({f"{u:.2f}" for u in computes}) == len(computes) else 3
    axis.set_ticks(shown, [f"{computes[i]:.{digits}f}" for i in shown])


def _write_values(axes: Axes, values: np.ndarray, low: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        dark = value < (1 + low) / 2
        colour = "white" if dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=13)


def _legend_entries(axes: np.ndarray) -> tuple[list[Any], list[str]]:
    """One entry a label, over all panels."""
    found: dict[str, Any] = {}
    for panel in axes.ravel():
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _finish(
    figure: Figure, path: Path | str, handles: Sequence[Any], labels: Sequence[str], note: str, title: str = ""
) -> None:
    if handles:
        # About 110 letters fit, and a handle takes the room of 6; columns are of one width where there are rows.
        one_row = sum(len(label) + 6 for label in labels) <= 110
        columns = len(labels) if one_row else max(1, 110 // (max(map(len, labels)) + 6))
        legend = figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=13, title=title or None
        )
        legend.get_title().set_fontsize(13)
    if note:
        figure.supxlabel(note, fontsize=11, color=_INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
