"""Reads a file of detection annotations in COCO's format (cocodataset.org/#format-data) into flat arrays.

All of the JSON is in memory once, while it is read. What is kept is flat, see mae_et/data/files.py.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.config.plain import read_bytes
from mae_et.data.files import PathTable, listed
from mae_et.data.outlines import OutlineBuilder, OutlineTable

_FAR = 1e15  # px or px²; NaN, infinities and integers that no float holds are on the other side of it


@dataclass(frozen=True)
class CocoFile:
    """N images, C classes, K objects.

    Attributes:
        paths: of the images, as the file gives them.
        image_ids: int64 [N].
        sizes: int64 [N, 2], (height, width) in px.
        classes: the names, by class number.
        category_ids: int64 [C]; -1 of a class that the file lacks.
        images: int64 [K], ascending: the number of each object's image.
        boxes: float32 [K, 4], within their images.
        labels: int64 [K].
        areas: float32 [K].
        crowd: bool [K].
        outlines: of the objects, in the file's order.
        outline_of: int64 [K], each object's number in them.
        remarks: one line each on what was left out, for a person to read.
    """

    paths: PathTable
    image_ids: np.ndarray
    sizes: np.ndarray
    classes: tuple[str, ...]
    category_ids: np.ndarray
    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    outlines: OutlineTable
    outline_of: np.ndarray
    remarks: tuple[str, ...]


def read_coco(path: Path, classes: Sequence[str] = ()) -> CocoFile:
    """Read a file; what is refused and what is left out is said in mae_et/data/coco.py.

    Args:
        path: of the JSON.
        classes: names to number the classes by; by default the file's, in order of their ids.

    Raises:
        ValueError: naming the file and what in it cannot be used.
        OSError: it cannot be read.
    """
    content = _parse(path)
    names, numbers = _read_categories(path, content["categories"], classes)
    rows, paths, sizes = _read_images(path, content["images"])
    reader = _AnnotationReader(path, rows, numbers, sizes)
    for place, annotation in enumerate(content["annotations"]):
        reader.add(place, annotation)
    category_ids = np.full(len(names), -1, np.int64)
    category_ids[list(numbers.values())] = list(numbers)
    return reader.build(paths, names, category_ids)


def _parse(path: Path) -> dict[str, Any]:
    data = read_bytes(path, os.stat(path).st_size)  # noqa: PTH116
    try:
        # Python's NaN and Infinity are let in: such boxes are told one by one.
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no COCO file: it must hold the keys images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path} is no COCO file of objects: it has no list '{key}'")
        if not content[key]:
            raise ValueError(f"{path} lists no {key}; a split needs images, categories and at least one object")
    return content


def _integer(value: Any) -> int | None:
    """An id or a size; 3.0, as some tools write it, is one."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def _field(path: Path, entry: Any, who: str, key: str, kind: type) -> Any:
    """Return a field of an entry of the file; raises ValueError, naming both, if it is not there or of another kind."""
    value = entry.get(key) if isinstance(entry, dict) else None
    value = _integer(value) if kind is int else value
    if not isinstance(value, kind):
        found = entry.get(key, "missing") if isinstance(entry, dict) else repr(entry)[:50]
        what = "an integer" if kind is int else "a text"
        raise ValueError(f"{path}: {who}: '{key}' should be {what}, and is {found!r}")
    return value


def _read_categories(path: Path, entries: list[Any], classes: Sequence[str]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Return the classes' names and the number of each id."""
    found: dict[int, str] = {}
    for place, entry in enumerate(entries):
        identity = _field(path, entry, f"category {place + 1} of the list", "id", int)
        name = _field(path, entry, f"category {identity}", "name", str)
        if identity in found:
            raise ValueError(f"{path}: two categories have the id {identity}; give each its own")
        if name in found.values():
            raise ValueError(f"{path}: two categories are named '{name}'; give each its own name")
        found[identity] = name
    names = tuple(classes) or tuple(found[identity] for identity in sorted(found))
    number = {name: i for i, name in enumerate(names)}
    unknown = [name for name in found.values() if name not in number]
    if unknown:
        raise ValueError(
            f"{path}: its categories {listed(unknown)} are not among the {len(names)} classes of the train split "
            f"({listed(names)}); give all splits the same categories"
        )
    return names, {identity: number[found[identity]] for identity in sorted(found)}


def _read_images(path: Path, entries: list[Any]) -> tuple[dict[int, int], PathTable, np.ndarray]:
    """Return the place of each image id, the paths, and the sizes."""
    rows: dict[int, int] = {}
    sizes = array("q")
    for place, entry in enumerate(entries):
        identity = _field(path, entry, f"image {place + 1} of the list", "id", int)
        if identity in rows:
            raise ValueError(f"{path}: two images have the id {identity}; give each its own")
        rows[identity] = place
        who = f"image {identity}"
        _field(path, entry, who, "file_name", str)
        height, width = (_field(path, entry, who, key, int) for key in ("height", "width"))
        if height < 1 or width < 1:
            raise ValueError(f"{path}: {who} has a width of {width} and a height of {height} px; both must be above 0")
        sizes.extend((height, width))
    return rows, PathTable(entry["file_name"] for entry in entries), np.array(sizes, np.int64).reshape(-1, 2)


@dataclass
class _Left:
    """How many annotations something is wrong with, and the first of them."""

    count: int = 0
    first: str = ""

    def add(self, what: str) -> None:
        self.first = self.first or what
        self.count += 1


class _AnnotationReader:
    """Checks annotations one by one and packs those that can be used.

    Args:
        path: of the file.
        rows: the place of each image id.
        numbers: the class number of each category id.
        sizes: int64 [N, 2], (height, width) of the images.
    """

    def __init__(self, path: Path, rows: dict[int, int], numbers: dict[int, int], sizes: np.ndarray) -> None:
        self._path, self._rows, self._numbers, self._sizes = path, rows, numbers, sizes
        self._images, self._labels, self._crowd = array("q"), array("q"), array("b")
        self._boxes, self._areas = array("d"), array("d")
        self._outlines = OutlineBuilder()
        self._count = 0
        self._boxless, self._unoutlined = _Left(), _Left()

    def add(self, place: int, entry: Any) -> None:
        """Take the annotation at a place of the list; raises ValueError if the file cannot be trusted."""
        path = self._path
        identity = entry.get("id") if isinstance(entry, dict) else None
        who = f"annotation {place + 1} of the list" if identity is None else f"annotation {identity}"
        image = self._rows.get(image_id := _field(path, entry, who, "image_id", int))
        if image is None:
            raise ValueError(f"{path}: {who} is of image {image_id}, which the file does not list; add or remove it")
        label = self._numbers.get(category := _field(path, entry, who, "category_id", int))
        if label is None:
            raise ValueError(f"{path}: {who} has category {category}, which the file does not list; it has "
                             f"{listed([str(known) for known in self._numbers])}")  # fmt: skip
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
            raise ValueError(f"{path}: {who}: 'bbox' should be [left, top, width, height] in px, and is {box!r}")
        self._count += 1
        height, width = self._sizes[image].tolist()
        clipped = _clipped(box, height, width)
        if clipped is None:
            self._boxless.add(f"{who} of image {image_id}, {box}")
            return
        try:
            outlined = self._outlines.add(entry.get("segmentation"), height, width)
        except ValueError as error:
            raise ValueError(f"{path}: {who} of image {image_id}: {error}") from None
        if not outlined:
            self._unoutlined.add(f"{who} of image {image_id}")
        self._images.append(image)
        self._labels.append(label)
        self._boxes.extend(clipped)
        self._areas.append(_area(entry.get("area"), clipped))
        self._crowd.append(entry.get("iscrowd") == 1)

    def build(self, paths: PathTable, names: tuple[str, ...], category_ids: np.ndarray) -> CocoFile:
        """Return all that was taken, sorted by image."""
        if not self._images:
            raise ValueError(f"{self._path}: none of its {self._count} annotations has a box with area in its image, "
                             f"such as {self._boxless.first}; there is nothing to detect")  # fmt: skip
        images = np.array(self._images, np.int64)
        order = np.argsort(images, kind="stable")
        return CocoFile(
            paths=paths,
            image_ids=np.fromiter(self._rows, np.int64, len(self._rows)),
            sizes=self._sizes,
            classes=names,
            category_ids=category_ids,
            images=images[order],
            boxes=np.array(self._boxes, np.float32).reshape(-1, 4)[order],
            labels=np.array(self._labels, np.int64)[order],
            areas=np.array(self._areas, np.float32)[order],
            crowd=np.array(self._crowd, bool)[order],
            outlines=self._outlines.build(),
            outline_of=order,
            remarks=tuple(self._remarks()),
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self._boxless.count:
            remarks.append(
                f"{self._path}: {self._boxless.count} of {self._count} annotations are left out, having a box without "
                f"area in its image; the first is {self._boxless.first}"
            )
        if 0 < self._unoutlined.count < len(self._images):
            remarks.append(
                f"{self._path}: {self._unoutlined.count} of {self._count} annotations have no usable outline and count "
                f"as crowds where masks are learned; the first is {self._unoutlined.first}"
            )
        return remarks


def _clipped(box: list[float], height: int, width: int) -> list[float] | None:
    """[left, top, width, height] -> [left, top, right, bottom] within the image; None if no area is left."""
    if not all(-_FAR < value < _FAR for value in box):
        return None
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], width), min(box[1] + box[3], height)
    # In float32, as the boxes are kept, a sliver may vanish.
    if not (np.float32(left) < np.float32(right) and np.float32(top) < np.float32(bottom)):
        return None
    return [left, top, right, bottom]


def _area(area: Any, box: list[float]) -> float:
    if type(area) in (int, float) and 0 < area < _FAR:
        return float(area)
    return (box[2] - box[0]) * (box[3] - box[1])
