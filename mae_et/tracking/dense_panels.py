"""Pictures of objects and of segmented scenes: truth beside prediction, for people."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH = 420  # px of each picture of a pair
LONGEST = 1600  # px of a side of a picture of one photo
_TEXT = 11  # px of letters beside boxes
_GAP = 8
_CAPTION = 22  # px above a row, and above the panel for its title
_INK, _FAINT_INK, _GROUND = (34, 34, 34), (105, 105, 105), (255, 255, 255)
BARE = ("background",)  # classes that are not coloured, so that the others stand out
_VEIL = 0.45  # of a class's colour over a scene
# Okabe and Ito's colours ("Color Universal Design", 2008), which colour-blind readers tell apart.
_FEW = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (230, 159, 0), (204, 121, 167), (86, 180, 233), (240, 228, 66))

Colour = tuple[int, int, int]
Named = tuple[str, Colour]
Key = tuple[int, str, Colour]


@dataclass(frozen=True)
class DrawnObjects:
    """Objects on one image of H x W px.

    boxes: float [K, 4], (left, top, right, bottom) in px.
    labels: int [K].
    scores: float [K]; None for truth.
    masks: uint8 [K, H, W]; None without.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class DetectionSample:
    """One image with what is on it and what was found: image uint8 [H, W, 1 or 3], and a caption such as its path."""

    image: np.ndarray
    truth: DrawnObjects
    found: DrawnObjects
    name: str = ""


@dataclass(frozen=True)
class SceneSample:
    """One image with true and predicted classes.

    image: uint8 [H, W, 1 or 3].
    truth, found: uint8 [H, W], class numbers; 255 is drawn as it is, without a colour.
    name: a caption.
    """

    image: np.ndarray
    truth: np.ndarray
    found: np.ndarray
    name: str = ""


def class_colour(number: int) -> tuple[int, int, int]:
    """The colour of a class on every picture: seven that all readers tell apart, then hues in golden steps."""
    if number < len(_FEW):
        return _FEW[number]
    red, green, blue = colorsys.hsv_to_rgb((0.1 + 0.618034 * number) % 1, 0.55 + 0.4 * (number % 2), 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def detection_panel(
    path: Path | str, samples: Sequence[DetectionSample], classes: Sequence[str], title: str = ""
) -> None:
    """Write a picture with a row for each image: what is there at the left, what was found at the right."""
    rows = []
    for sample in samples:
        scale = _WIDTH / sample.image.shape[1]
        pictures = [_objects(sample.image, objects, classes, scale) for objects in (sample.truth, sample.found)]
        rows.append((sample.name, pictures))
    _write(path, rows, ["annotated", "found"], title)


def scene_panel(path: Path | str, samples: Sequence[SceneSample], classes: Sequence[str], title: str = "") -> None:
    """Write a picture with a row for each image: the image, true classes, predicted ones; and a key of the classes.

    The key has those that are seen.
    """
    rows, seen = [], set()
    for sample in samples:
        plain = _rgb(sample.image)
        veiled = (_coloured(plain, labels, classes) for labels in (sample.truth, sample.found))
        pictures = [_sized(pixels, _WIDTH / plain.shape[1]) for pixels in (plain, *veiled)]
        rows.append((sample.name, pictures))
        seen |= set(np.unique(sample.truth)) | set(np.unique(sample.found))
    _write(path, rows, ["image", "annotated", "predicted"], title, _key(seen, classes))


def objects_picture(
    image: np.ndarray, objects: DrawnObjects, classes: Sequence[str], longest: int = LONGEST
) -> Image.Image:
    """An image uint8 [H, W, 1 or 3] with its objects, at its own size but of at most `longest` px a side."""
    pixels, scale = _shrunk(image, longest)
    masks = None if objects.masks is None else _nearest(objects.masks, pixels.shape[:2])
    shrunk = DrawnObjects(objects.boxes * scale, objects.labels, objects.scores, masks)
    return _objects(pixels, shrunk, classes, 1.0, _text_size(pixels))


def scene_picture(image: np.ndarray, labels: np.ndarray, classes: Sequence[str], longest: int = LONGEST) -> Image.Image:
    """An image uint8 [H, W, 1 or 3] in the colours of its classes uint8 [H, W], with a key of those below it.

    At its own size, but of at most `longest` px a side.
    """
    pixels, _ = _shrunk(image, longest)
    picture = Image.fromarray(_coloured(pixels, _nearest(labels, pixels.shape[:2]), classes))
    width = max(picture.width, _WIDTH)  # names are read below small photos, too
    lines = _lines(_key(np.unique(labels), classes), width)
    sheet = Image.new("RGB", (width if lines else picture.width, picture.height + len(lines) * _CAPTION), _GROUND)
    sheet.paste(picture)
    _write_key(sheet, lines, picture.height)
    return sheet


def _shrunk(image: np.ndarray, longest: int) -> tuple[np.ndarray, float]:
    """uint8 [h, w, 3], no side above `longest` px, and its scale."""
    scale = min(1.0, longest / max(image.shape[:2]))
    return np.array(_sized(_rgb(image), scale)), scale


def _nearest(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Maps [..., H, W] at another size, each px that of the nearest centre."""
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, maps.shape[-2:]))
    return maps[..., rows[:, None], columns]


def _text_size(pixels: np.ndarray) -> int:
    """Px of letters that can be read where a picture is shown on a whole screen."""
    return max(_TEXT, max(pixels.shape) // 90)


def _objects(
    image: np.ndarray, objects: DrawnObjects, classes: Sequence[str], scale: float, text_size: int = _TEXT
) -> Image.Image:
    """An image with its objects, the least certain drawn first so that the others lie above."""
    pixels = _rgb(image)
    order = np.arange(len(objects.boxes)) if objects.scores is None else np.argsort(objects.scores)
    if objects.masks is not None:
        for number, k in enumerate(order):
            inside = objects.masks[k].astype(bool)
            # Objects of one class get colours of their own, so that neighbours can be told apart.
            pixels[inside] = (1 - _VEIL) * pixels[inside] + _VEIL * np.array(class_colour(number % len(_FEW)))
    picture = _sized(pixels, scale)
    draw, font = ImageDraw.Draw(picture), _font(text_size)
    for k in order:
        colour = class_colour(int(objects.labels[k]))
        left, top, right, bottom = (float(side) * scale for side in objects.boxes[k])
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=max(2, text_size // 5)
        )
        text = classes[int(objects.labels[k])]
        text += "" if objects.scores is None else f" {100 * float(objects.scores[k]):.0f}"
        box = draw.textbbox((0, 0), text, font=font)
        width, height = box[2] + 4, box[3] + 2
        x = min(max(left, 0), picture.width - width)
        y = top - height if top >= height else top
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 2, y), text, font=font, fill=_readable_on(colour))
    return picture


def _readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever stands out more (luma of ITU-R BT.601)."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 140 else (255, 255, 255)


def _coloured(pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    table = np.array([class_colour(number) for number in range(256)], np.float32)
    veiled = np.rint((1 - _VEIL) * pixels + _VEIL * table[labels]).astype(np.uint8)
    bare = [number for number, name in enumerate(classes) if name in BARE] + [255]
    return np.where(np.isin(labels, bare)[..., None], pixels, veiled)


def _rgb(image: np.ndarray) -> np.ndarray:
    """A copy as uint8 [H, W, 3]."""
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image.copy()


def _sized(pixels: np.ndarray, scale: float) -> Image.Image:
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _write(
    path: Path | str,
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    headings: Sequence[str],
    title: str,
    key: Sequence[Named] = (),
) -> None:
    """Put rows of pictures below each other, with headings, captions and a key of colours."""
    width = len(headings) * (_WIDTH + _GAP) + _GAP
    keys = _lines(key, width)
    height = (2 + len(keys)) * _CAPTION + sum(max(p.height for p in row) + _CAPTION + _GAP for _, row in rows) + _GAP
    sheet = Image.new("RGB", (width, height), _GROUND)
    draw, font = ImageDraw.Draw(sheet), _font(12)
    draw.text((_GAP, 4), title, font=_font(13), fill=_INK)
    y = _CAPTION
    y = _write_key(sheet, keys, y)
    for column, heading in enumerate(headings):
        draw.text((_GAP + column * (_WIDTH + _GAP), y + 4), heading, font=font, fill=_FAINT_INK)
    y += _CAPTION
    for name, row in rows:
        draw.text((_GAP, y + 3), name, font=font, fill=_FAINT_INK)
        y += _CAPTION
        for column, picture in enumerate(row):
            sheet.paste(picture, (_GAP + column * (_WIDTH + _GAP), y))
        y += max(picture.height for picture in row) + _GAP
    sheet.save(path)


def _write_key(sheet: Image.Image, lines: Sequence[Sequence[Key]], y: int) -> int:
    """Draw lines of a key from y on; returns where they end."""
    draw, font = ImageDraw.Draw(sheet), _font(12)
    for line in lines:
        for x, name, colour in line:
            draw.rectangle((x, y + 5, x + 12, y + 17), fill=colour)
            draw.text((x + 17, y + 3), name, font=font, fill=_INK)
        y += _CAPTION
    return y


def _key(numbers: Iterable[int], classes: Sequence[str]) -> list[Named]:
    """Names and colours of those of some classes that are coloured."""
    known = [number for number in sorted(map(int, numbers)) if number < len(classes) and classes[number] not in BARE]
    return [(classes[number], class_colour(number)) for number in known]


def _lines(key: Sequence[Named], width: int) -> list[list[Key]]:
    """The key's entries in lines that fit: (x, name, colour)."""
    lines: list[list[Key]] = []
    x, font = width, _font(12)
    for name, colour in key:
        needed = round(font.getlength(name)) + 35
        if x + needed > width:
            lines.append([])
            x = _GAP
        lines[-1].append((x, name, colour))
        x += needed
    return lines
