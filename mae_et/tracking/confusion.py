"""A confusion matrix as a picture that stays readable from 2 to 1000 classes."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.figure import Figure

NUMBERED = 20  # most classes whose cells have numbers
NAMED = 40  # most classes that are all drawn with their names

# Blue for right and vermilion for wrong (Okabe and Ito, "Color Universal Design", 2008) stay apart for colour-blind
# readers; lightness alone tells the share, and the diagonal tells right from wrong without any colour.
_RIGHT = LinearSegmentedColormap.from_list("right", ["#FFFFFF", "#9CCBE8", "#0072B2", "#00304B"])
_WRONG = LinearSegmentedColormap.from_list("wrong", ["#FFFFFF", "#F5B98F", "#D55E00", "#5A2700"])
_SHARES = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # the square root: 2 % of a row must not look like none
_NOTHING = "#D9DDE2"
_FAINT_INK = "#696969"

_CELL = 0.5  # inches of a cell with a number, at 100 px an inch
_OVERVIEW = 550  # most px of the matrix of all classes beside that of the most confused
_CANVAS = 10  # inches, a mere unit: pictures are cut out of the endless plane around it
_NAME_SIZE = 11  # points


def confusion_picture(path: Path | str, matrix: np.ndarray, names: Sequence[str], title: str = "") -> None:
    """Write a PNG of at most about 2000 px a side: of each true class (row) the share that is predicted as each class.

    Up to 20 classes have the share in per cent in each cell, up to 40 their names. Of more classes the left side
    shows all without names (many of them merged to blocks, each of which has the largest share within), and the right
    side the 20 of which most images are confused with each other. Rows without images are grey.

    Args:
        path: of the PNG; its folder is made.
        matrix: [K, K] numbers of images by (class, predicted class), K >= 2.
        names: of the classes, in order.
        title: goes before the picture's own.

    Raises:
        ValueError: the matrix is not square, or has other than K names.
    """
    classes = len(matrix)
    if matrix.shape != (classes, classes) or classes < 2 or len(names) != classes:
        raise ValueError(
            f"a confusion matrix of shape {matrix.shape} with {len(names)} names: needs [K, K] for K >= 2 classes, "
            "and a name for each"
        )
    images = int(matrix.sum())
    own = f"{classes} classes, {images} images, {100 * np.trace(matrix) / max(images, 1):.1f} % on the diagonal"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure = _new_figure(f"{title}: {own}" if title else own)
        draw = _draw_all if classes <= NAMED else _draw_most_confused
        draw(figure, matrix, [_shorten(name) for name in names])
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def most_confused(matrix: np.ndarray, count: int) -> list[int]:
    """Up to `count` classes, taken in pairs by the images confused between the two, so that pairs stand together.

    Pairs of equally many images go by their class numbers. Classes without any confusion are left out.
    """
    errors = matrix + matrix.T
    first, second = np.triu_indices(len(matrix), k=1)
    between = errors[first, second]
    chosen: dict[int, None] = {}
    for pair in np.argsort(-between, kind="stable"):
        new = [int(c) for c in (first[pair], second[pair]) if int(c) not in chosen]
        if between[pair] == 0 or len(chosen) >= count:
            break
        if len(chosen) + len(new) <= count:
            chosen.update(dict.fromkeys(new))
    return list(chosen)


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its sum, float64; NaN where a row has no images."""
    totals = matrix.sum(axis=1, keepdims=True).astype(np.float64)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)


def merge_blocks(shares: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring shares [K, K] down to at most `cells` a side: the largest off the diagonal, and the mean along it.

    Returns ([k, k] shares of wrong classes, [k] mean shares of the right one); NaN where no row has images.
    """
    wrong = shares.copy()
    np.fill_diagonal(wrong, np.where(np.isnan(np.diag(shares)), np.nan, 0.0))
    starts = np.arange(0, len(shares), math.ceil(len(shares) / cells))
    wrong = np.fmax.reduceat(np.fmax.reduceat(wrong, starts, axis=0), starts, axis=1)
    present = ~np.isnan(np.diag(shares))
    sums = np.add.reduceat(np.nan_to_num(np.diag(shares)), starts)
    counts = np.add.reduceat(present.astype(np.float64), starts)
    return wrong, np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _new_figure(title: str) -> Figure:
    """A plane on which things are placed in inches from the title's lower left corner."""
    figure = Figure(figsize=(_CANVAS, _CANVAS), dpi=100)
    FigureCanvasAgg(figure)
    wrapped = textwrap.fill(title, 90)
    figure.text(0, 0.6 / _CANVAS, wrapped, fontsize=14, va="bottom", parse_math=False)
    return figure


def _place(figure: Figure, x: float, width: float, height: float) -> Axes:
    """Axes `x` inches from the left, under the title."""
    return figure.add_axes((x / _CANVAS, -height / _CANVAS, width / _CANVAS, height / _CANVAS))


def _draw_all(figure: Figure, matrix: np.ndarray, names: Sequence[str]) -> None:
    classes = len(matrix)
    numbered = classes <= NUMBERED
    side = max(3.0, (_CELL if numbered else 0.34) * classes)
    x = 0.4 + _widest(figure, names)
    _draw_shares(_place(figure, x, side, side), row_shares(matrix), names, names, numbered)
    _add_scales(figure, x + side + 0.2, side)


def _draw_most_confused(figure: Figure, matrix: np.ndarray, names: Sequence[str]) -> None:
    overview = _OVERVIEW / 100
    _draw_overview(figure, row_shares(matrix), x=0.8)
    chosen = most_confused(matrix, NUMBERED)
    if not chosen:
        _add_scales(figure, 0.8 + overview + 0.2, overview)
        return
    part = matrix[np.ix_(chosen, chosen)]
    others = matrix[chosen].sum(axis=1, keepdims=True) - part.sum(axis=1, keepdims=True)
    rows = [names[i] for i in chosen]
    x = 0.8 + overview + 0.6 + _widest(figure, rows)
    cell = 0.42
    height = cell * len(chosen)
    axes = _place(figure, x, height + cell, height)
    _draw_shares(axes, row_shares(np.concatenate([part, others], axis=1)), rows, [*rows, "(all others)"], numbers=True)
    axes.set_title(f"The {len(chosen)} classes most confused with each other", fontsize=12, loc="left")
    axes.axvline(len(chosen) - 0.5, color=_FAINT_INK, linewidth=1.2)
    _add_scales(figure, x + height + cell + 0.2, overview)


def _widest(figure: Figure, names: Sequence[str]) -> float:
    """Inches that the longest of the names takes beside a matrix."""
    widths = []
    for name in names:
        text = figure.text(0, 0, name, fontsize=_NAME_SIZE, parse_math=False)
        widths.append(text.get_window_extent().width / figure.dpi)
        text.remove()
    return max(widths)


def _draw_overview(figure: Figure, shares: np.ndarray, x: float) -> None:
    """All classes without names, two or more whole pixels a cell."""
    wrong, right = merge_blocks(shares, _OVERVIEW // 2)
    classes, cells = len(shares), len(right)
    side = cells * (_OVERVIEW // cells) / 100
    axes = _place(figure, x, side, side)
    colours, on_diagonal = _WRONG(_SHARES(np.nan_to_num(wrong))), _RIGHT(_SHARES(np.nan_to_num(right)))
    colours[np.isnan(wrong)] = on_diagonal[np.isnan(right)] = to_rgba(_NOTHING)
    colours[np.diag_indices(cells)] = on_diagonal
    axes.imshow(colours, interpolation="nearest", extent=(-0.5, classes - 0.5, classes - 0.5, -0.5), aspect="auto")
    merged = math.ceil(classes / cells)
    note = f"; blocks of {merged} x {merged} show their largest share" if merged > 1 else ""
    axes.set_title(f"All {classes} classes by number{note}", fontsize=12, loc="left")
    axes.set_xlabel("predicted class", fontsize=12)
    axes.set_ylabel("true class", fontsize=12)


def _draw_shares(axes: Axes, shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], numbers: bool) -> None:
    """Coloured cells with names; the diagonal, which may be shorter than the columns, is what is right."""
    on_diagonal = np.eye(*shares.shape, dtype=bool)
    axes.set_facecolor(_NOTHING)
    for colours, hidden in ((_RIGHT, ~on_diagonal), (_WRONG, on_diagonal)):
        axes.imshow(np.ma.masked_where(hidden | np.isnan(shares), shares), cmap=colours, norm=_SHARES)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=_NAME_SIZE, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize=_NAME_SIZE, parse_math=False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#E3E6EA", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted class", fontsize=12)
    axes.set_ylabel("true class", fontsize=12)
    if numbers:
        for row, column in zip(*np.nonzero(np.nan_to_num(shares) > 0)):
            share = float(shares[row, column])
            ink = "white" if share > 0.3 else "black"
            axes.text(column, row, _percent(share), ha="center", va="center", fontsize=10, color=ink)


def _add_scales(figure: Figure, x: float, height: float) -> None:
    """Colours of right and wrong predictions, `x` inches from the left."""
    for number, (colours, label) in enumerate(((_RIGHT, "right"), (_WRONG, "wrong"))):
        axes = _place(figure, x + 0.9 * number, 0.16, min(height, 5.0))
        bar = figure.colorbar(ScalarMappable(_SHARES, colours), cax=axes)
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1", "5", "10", "25", "50", "100"])
        bar.set_label(f"{label}, % of the true class", fontsize=11)


def _percent(share: float) -> str:
    """A share in per cent in at most three characters: what is not quite 0 or 100 does not look so."""
    percent = 100 * share
    if percent < 1:
        return "<1"
    return ">99" if 99 < percent < 100 else f"{percent:.0f}"


def _shorten(name: str, limit: int = 24) -> str:
    """Cut the middle: names of classes differ at either end."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2]}…{name[-(limit - limit // 2 - 1) :]}"
