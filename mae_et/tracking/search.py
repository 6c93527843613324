"""A search as a picture: what every candidate of every stage came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

# White to the blue of Okabe and Ito ("Color Universal Design", 2008): lightness alone tells the order.
_SHADES = LinearSegmentedColormap.from_list("score", ["#FFFFFF", "#9CCBE8", "#0072B2"])
_FRAME, _INK, _EDGE, _NOTHING = "#D55E00", "#333333", "#C4CAD2", "#EDEFF2"


class Tried(NamedTuple):
    """One candidate of one stage.

    Attributes:
        stage: from 0.
        candidate: its name.
        score: accuracy in [0, 1], or a loss.
        kept: whether the search kept it there.
    """

    stage: int
    candidate: str
    score: float
    kept: bool


def search_picture(
    tried: Sequence[Tried],
    stages: int,
    path: Path | str,
    title: str,
    score: str,
    axis: str = "compute",
    reference: float | None = None,
) -> None:
    """Draw a row a candidate and a column a stage, each cell with its score and how far it is from its column's best.

    Shades compare within a column, since later stages score higher whatever they do; with a reference, which is for
    scores at the same point of training, they compare all. What was kept is framed.

    Args:
        tried: in any order.
        stages: of the curriculum; those without trials are not drawn.
        path: of the PNG; its folder is made.
        title: above the picture.
        score: kind of score; "loss" is the better the lower.
        axis: that stages have equal shares of.
        reference: score to give differences from, in place of the best of the stage.
    """
    rows = list(dict.fromkeys(t.candidate for t in sorted(tried, key=lambda t: _size(t.candidate))))
    columns = sorted({t.stage for t in tried})
    figure = Figure(
        figsize=(max(7.0, 2.6 + 1.45 * len(columns)), 2.0 + 0.62 * len(rows)),
        dpi=100,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.add_patch(Rectangle((0, 0), len(columns), len(rows), facecolor=_NOTHING, edgecolor="none"))
    sign = -1 if score == "loss" else 1
    for column, stage in enumerate(columns):
        of_stage = [t for t in tried if t.stage == stage]
        values = [sign * t.score for t in (of_stage if reference is None else tried)]
        _draw_column(axes, column, of_stage, rows, sign, values, None if reference is None else sign * reference)
    axes.set_xlim(-0.03, len(columns) + 0.03)
    axes.set_ylim(-0.05, len(rows) + 0.05)
    shares = [f"u {stage / stages:.3g} to {(stage + 1) / stages:.3g}" for stage in columns]
    names = [f"stage {stage + 1}\n{share}" for stage, share in zip(columns, shares)]
    axes.set_xticks([column + 0.5 for column in range(len(columns))], names, fontsize=11)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows, fontsize=12)
    axes.set_ylabel("B in px", fontsize=12)
    better = "lower" if sign < 0 else "higher"
    away = "the stage's best" if reference is None else "the final size throughout"
    note = f"{score}: {better} is better; small: away from {away}; framed: kept\nu: fraction of the {axis} axis"
    axes.set_xlabel(note, fontsize=10, color=_INK, loc="left")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", fontsize=13)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_column(
    axes: Axes,
    column: int,
    of_stage: Sequence[Tried],
    rows: Sequence[str],
    sign: int,
    values: Sequence[float],
    reference: float | None,
) -> None:
    """The candidates of one stage, shaded among `values`; these and `reference` are the better the higher."""
    highest, span, percent = max(values), max(values) - min(values), sign > 0
    best = highest if reference is None else reference
    for tried in of_stage:
        row, value = rows.index(tried.candidate), sign * tried.score
        place = (1 - (highest - value) / span) if span else 0.5
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=_SHADES(place), edgecolor=_EDGE, linewidth=1))
        if tried.kept:
            frame = (column + 0.04, row + 0.06)
            axes.add_patch(Rectangle(frame, 0.92, 0.88, fill=False, edgecolor=_FRAME, linewidth=3, zorder=3))
        ink = "white" if place > 0.75 else "black"
        text = f"{100 * tried.score:.2f} %" if percent else f"{tried.score:.4f}"
        off = (value - best) * (100 if percent else -1)
        word = "best" if reference is None else "as final"
        note = word if value == best else f"{off:+.2f}" if percent else f"{off:+.4f}"
        axes.text(column + 0.5, row + 0.62, text, ha="center", va="center", fontsize=12, color=ink, zorder=4)
        axes.text(column + 0.5, row + 0.28, note, ha="center", va="center", fontsize=10, color=ink, zorder=4)


def _size(name: str) -> tuple[float, ...]:
    """Sorts names of candidates by B, then by mask ratio and batch."""
    size, _, rest = name.replace("k", "m").partition("m")
    return (*(float(side) for side in size.split("x")), *(float(part) for part in rest.split("m") if part))
