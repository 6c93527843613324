"""Pictures of what the model sees, what it is asked for and what it answers, for people.

Everything here takes NumPy arrays of one image each and draws with Pillow. Image pixels are enlarged by whole factors
without interpolation, so what is on the picture is what the model got.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MASK_GREY = 128

# Bars in (colour, ground). Orange against blue-grey stays apart for colour-blind readers (after Okabe and Ito,
# "Color Universal Design", 2008), and the two grounds tell visible patches from masked ones without any colour.
_TARGET = ((255, 255, 255), (0, 0, 0))
_PREDICTION = ((255, 176, 0), (0, 0, 0))
_VISIBLE = ((135, 150, 165), (44, 49, 56))
_INK = (34, 34, 34)
_FAINT_INK = (105, 105, 105)

_TILE = 280  # least side of a picture on a panel: four of them make the 1200 px that a dashboard shows
_CELL = 12  # least side of a HOG cell whose bars can be told apart


@dataclass(frozen=True)
class HogSample:
    """One image of a stage with HOG targets.

    image: uint8 [H, W, 1 or 3], as the model sees it: at bandwidth B, before normalisation.
    mask: bool [rows, cols], one entry a patch; True is masked. H/rows = W/cols is the patch size.
    target, prediction: float [channels, bins, cell rows, cell cols], see `hog_cells`. H/(cell rows) is the cell size.
    name: a caption, such as the image's path.
    """

    image: np.ndarray
    mask: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    name: str = ""


@dataclass(frozen=True)
class PixelSample:
    """One image of a stage with pixel targets.

    image, mask, name: as in `HogSample`.
    reconstruction: [H, W, 1 or 3], uint8, or float on 0..1 (clipped). Predictions of normalised patches
        (norm_pix) must have got the target's mean and deviation back. Only the masked patches are shown.
    """

    image: np.ndarray
    mask: np.ndarray
    reconstruction: np.ndarray
    name: str = ""


def hog_cells(tokens: np.ndarray, grid: tuple[int, int], channels: int, bins: int = 9) -> np.ndarray:
    """Arrange HOG targets of patches as a picture of cells.

    tokens: [rows * cols, channels * bins * k * k], index (c * bins + b) * k * k + cy * k + cx for a patch of k x k
    cells. Returns [channels, bins, rows * k, cols * k].

    Raises: ValueError where the sizes do not fit.
    """
    rows, cols = grid
    count, depth = tokens.shape
    k = math.isqrt(depth // (channels * bins))
    if count != rows * cols or depth != channels * bins * k * k:
        raise ValueError(
            f"HOG tokens of shape {tokens.shape} do not fit a grid of {rows} x {cols} patches with {channels} "
            f"channels and {bins} bins; pass the grid and the channels that the targets were made with"
        )
    cells = tokens.reshape(rows, cols, channels, bins, k, k)
    return cells.transpose(2, 3, 0, 4, 1, 5).reshape(channels, bins, rows * k, cols * k)


def hog_glyphs(hog: np.ndarray, cell_px: int) -> np.ndarray:
    """Draw oriented bars, one star of them a cell.

    hog: [channels, bins, rows, cols] (drawn as the mean over channels) or [bins, rows, cols], values in 0..1; lower
    ones and non-finite ones draw nothing, higher ones draw as 1. Returns uint8 [rows * cell_px, cols * cell_px], white
    on black.

    Bin b holds gradients whose edge runs at b..b+1 times 180/bins degrees counter-clockwise from the horizontal
    (phi = atan2(gx, gy), SlowFast's HOGLayerC); its bar lies along the edge, at the middle of that range. Brightness
    is the value, and length its square root: bins of a cell have unit norm, and nine equal ones are 1/3 each.
    """
    values = hog.mean(axis=0) if hog.ndim == 4 else hog
    values = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    bins, rows, cols = values.shape
    centres = np.arange(cell_px) + 0.5 - cell_px / 2
    across, along = np.meshgrid(centres, -centres)  # x to the right, y up
    half_width = max(0.7, cell_px / 32)
    picture = np.zeros((rows, cols, cell_px, cell_px))
    for index, value in enumerate(values):
        angle = (index + 0.5) * math.pi / bins
        distance = np.abs(across * math.sin(angle) - along * math.cos(angle))
        position = np.abs(across * math.cos(angle) + along * math.sin(angle))
        strength = value[:, :, None, None]
        # Coverage of a pixel by the bar: an edge of the bar fades over one pixel.
        inside = np.clip((cell_px / 2 - 0.5) * np.sqrt(strength) + 0.5 - position, 0, 1)
        bar = np.clip(half_width + 0.5 - distance, 0, 1) * inside * strength
        np.maximum(picture, bar, out=picture)
    picture = picture.transpose(0, 2, 1, 3).reshape(rows * cell_px, cols * cell_px)
    return np.rint(255 * picture).astype(np.uint8)


def grey_masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Replace the masked patches of a uint8 image [H, W, C] by uniform grey (128); mask is bool [rows, cols]."""
    return np.where(_pixel_mask(mask, image)[..., None], np.uint8(MASK_GREY), image)


def stage_panel(path: Path | str, samples: Sequence[HogSample], title: str = "") -> None:
    """Write a PNG: for each sample a row of input, masked input, HOG target and HOG prediction.

    The last column shows the prediction (orange) on masked patches and the target (dimmed) on visible ones. Each
    row's caption gives the name and the mean squared error over masked patches. The samples share one B and one grid.

    Raises: ValueError for no samples, shapes that do not fit each other, or images that have neither 1 nor 3 channels.
    """
    factor = _enlargement(samples)
    rows = []
    for sample in samples:
        cell_px = _cell_size(sample) * factor
        target, prediction = hog_glyphs(sample.target, cell_px), hog_glyphs(sample.prediction, cell_px)
        masked = _pixel_mask(sample.mask, target)
        answer = np.where(masked[..., None], _tint(prediction, _PREDICTION), _tint(target, _VISIBLE))
        cells = _pixel_mask(sample.mask, sample.target[0, 0])
        error = np.square(sample.prediction - sample.target)[:, :, cells].mean() if cells.any() else math.nan
        tiles = [*_input_tiles(sample, factor), _tint(target, _TARGET), answer]
        rows.append((_caption(sample.name, error), tiles))
    columns = [f"input, {_bandwidth(samples[0].image)}", "masked input", "HOG target", "HOG prediction"]
    note = (
        f"HOG cells of {_cell_size(samples[0])} px. Bars lie along edges; the longer and brighter, the stronger. "
        "Orange: predicted, on masked patches. Grey: target, on visible patches."
    )
    _compose(rows, columns, [title, _summary(samples[0])], note).save(_ready(path))


def pixel_panel(path: Path | str, samples: Sequence[PixelSample], title: str = "") -> None:
    """Write a PNG: for each sample a row of input, masked input, and the reconstruction among the visible patches.

    Each row's caption gives the name and the mean squared error over masked patches on the 0..1 scale. The samples
    share one B and one grid.

    Raises: ValueError for no samples, shapes that do not fit each other, or images that have neither 1 nor 3 channels.
    """
    factor = _enlargement(samples)
    rows = []
    for sample in samples:
        masked = _pixel_mask(sample.mask, sample.image)
        answer = np.where(masked[..., None], _to_uint8(sample.reconstruction), sample.image)
        difference = (answer.astype(np.float64) - sample.image)[masked] / 255
        error = np.square(difference).mean() if masked.any() else math.nan
        tiles = [*_input_tiles(sample, factor), _enlarge(answer, factor)]
        rows.append((_caption(sample.name, error), tiles))
    columns = [f"input, {_bandwidth(samples[0].image)}", "masked input", "reconstruction"]
    note = "Reconstruction: predicted on masked patches, the input on visible ones."
    _compose(rows, columns, [title, _summary(samples[0])], note).save(_ready(path))


def _enlargement(samples: Sequence[HogSample] | Sequence[PixelSample]) -> int:
    """Check that the samples fit on one panel; return the whole factor by which their pixels are enlarged."""
    if not samples:
        raise ValueError("a panel needs at least one sample, got none")
    first = samples[0]
    for sample in samples:
        if sample.image.shape != first.image.shape or sample.mask.shape != first.mask.shape:
            raise ValueError(
                f"a panel shows one stage: {sample.image.shape} and {first.image.shape} with grids "
                f"{sample.mask.shape} and {first.mask.shape} differ; write a panel for each"
            )
        _check(sample)
    factor = math.ceil(_TILE / max(first.image.shape[:2]))
    return factor if isinstance(first, PixelSample) else max(factor, math.ceil(_CELL / _cell_size(first)))


def _check(sample: HogSample | PixelSample) -> None:
    height, width, channels = sample.image.shape
    rows, cols = sample.mask.shape
    if sample.image.dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"a panel needs uint8 images of 1 or 3 channels, got {sample.image.dtype} {sample.image.shape}: "
            "pass the channels to show, before normalisation"
        )
    if height % rows or width % cols or height // rows != width // cols:
        raise ValueError(f"a {height} x {width} image has no {rows} x {cols} square patches; pass the stage's grid")
    if isinstance(sample, PixelSample):
        if sample.reconstruction.shape != sample.image.shape:
            raise ValueError(f"the reconstruction {sample.reconstruction.shape} is no image {sample.image.shape}")
    elif sample.target.shape != sample.prediction.shape or sample.target.ndim != 4:
        raise ValueError(
            f"target {sample.target.shape} and prediction {sample.prediction.shape} must both be "
            "[channels, bins, cell rows, cell cols]; see hog_cells"
        )
    elif sample.target.shape[2] % rows or sample.target.shape[3] * rows != sample.target.shape[2] * cols:
        raise ValueError(f"HOG cells {sample.target.shape[2:]} do not divide the {rows} x {cols} patches evenly")


def _cell_size(sample: HogSample) -> int:
    return sample.image.shape[0] // sample.target.shape[2]


def _pixel_mask(mask: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Enlarge a mask of patches to the height and width of `like`."""
    factor = like.shape[0] // mask.shape[0]
    return _enlarge(mask.astype(bool), factor)


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _input_tiles(sample: HogSample | PixelSample, factor: int) -> list[np.ndarray]:
    return [_enlarge(sample.image, factor), _enlarge(grey_masked(sample.image, sample.mask), factor)]


def _tint(glyphs: np.ndarray, colours: tuple[tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    bars, ground = np.array(colours)
    return np.rint(ground + glyphs[..., None] / 255 * (bars - ground)).astype(np.uint8)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    return np.rint(255 * np.clip(np.nan_to_num(image, nan=0.0), 0, 1)).astype(np.uint8)


def _bandwidth(image: np.ndarray) -> str:
    height, width = image.shape[:2]
    return f"B = {height}" if height == width else f"B = {height} × {width}"


def _summary(sample: HogSample | PixelSample) -> str:
    rows, cols = sample.mask.shape
    return (
        f"{_bandwidth(sample.image)} px: {rows} × {cols} patches of {sample.image.shape[0] // rows} px, "
        f"{100 * sample.mask.mean():.0f} % masked"
    )


def _caption(name: str, error: float) -> tuple[str, str]:
    return name, f"mean squared error where masked: {error:.4f}"


def _compose(
    rows: Sequence[tuple[tuple[str, str], list[np.ndarray]]],
    columns: Sequence[str],
    title: Sequence[str],
    note: str,
) -> Image.Image:
    """Lay out titles, captioned rows of equal tiles, and a note, on white."""
    height, width = rows[0][1][0].shape[:2]
    gap, margin = max(8, width // 28), max(16, width // 14)
    inner = len(columns) * width + (len(columns) - 1) * gap
    # Text keeps its size relative to the panel, which a dashboard shows at about 1200 px whatever its own width.
    unit = max(12, round(inner / 80))
    large, normal, small = (_font(round(unit * size)) for size in (1.5, 1.15, 1.0))
    lines = [line for line in title if line]
    notes = _wrap(note, small, inner)
    top = margin + round(unit * 2.2) * len(lines) + round(unit * 2.6)
    row_height = round(unit * 1.9) + height + gap
    total = top + len(rows) * row_height + round(unit * 1.5) * len(notes) + margin
    canvas = Image.new("RGB", (inner + 2 * margin, total), "white")
    draw = ImageDraw.Draw(canvas)
    y = margin
    for line in lines:
        draw.text((margin, y), _fit(line, large, inner), _INK, large)
        y += round(unit * 2.2)
    y += round(unit * 0.6)
    for index, name in enumerate(columns):
        draw.text((margin + index * (width + gap), y), _fit(name, normal, width), _INK, normal)
    y = top
    for (name, score), tiles in rows:
        score_width = draw.textlength(score, small)
        draw.text((margin, y), _fit(name, small, inner - score_width - 2 * gap), _FAINT_INK, small)
        draw.text((margin + inner - score_width, y), score, _FAINT_INK, small)
        for index, tile in enumerate(tiles):
            picture = Image.fromarray(tile.repeat(3, axis=2) if tile.shape[2] == 1 else tile)
            canvas.paste(picture, (margin + index * (width + gap), y + round(unit * 1.9)))
        y += row_height
    for line in notes:
        draw.text((margin, y), line, _FAINT_INK, small)
        y += round(unit * 1.5)
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu Sans comes with matplotlib: the same letters on every machine.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text to a width in pixels; what is cut is its beginning, as the end of a path says the most."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _ready(path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
