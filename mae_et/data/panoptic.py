"""COCO's panoptic annotations (things and stuff) as one class a pixel.

Format: https://cocodataset.org/#format-data, "Panoptic Segmentation".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_et.config.plain import parse_json, read_bytes
from mae_et.data.decode import ImageError
from mae_et.data.files import FileSource, PathTable, listed, read_image
from mae_et.data.index_masks import decode_ids, on_shown_grid
from mae_et.data.segmentation_transforms import IGNORE

PANOPTIC_SPLITS = {split: f"annotations/panoptic_{split}2017.json" for split in ("train", "val")}
_LARGEST = 1 << 30  # bytes of an annotation file
_MOST_CLASSES = 255


class PanopticSource:
    """Images with PNGs of segment ids, and the class of each segment in flat arrays (workers are forked).

    Args:
        images: the images.
        masks: paths of their PNGs, in the same order.
        classes: names, by number.
        segments: of each image, (ids int64 [S], classes uint8 [S]), crowds being class 255.
    """

    def __init__(
        self,
        images: FileSource,
        masks: PathTable,
        classes: tuple[str, ...],
        segments: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self.name, self.channels = images.name, images.channels
        self.classes = classes
        self.images, self.masks = images, masks
        self._ids = np.concatenate([ids for ids, _ in segments])
        self._classes = np.concatenate([numbers for _, numbers in segments])
        self._ends = np.cumsum([0, *(len(ids) for ids, _ in segments)])

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        return self.images.image(i)

    def mask(self, i: int) -> torch.Tensor:
        """Return the classes of image `i`, uint8 [H, W]; 255 where there is no segment, or a crowd.

        Raises ImageError if the PNG cannot be read, differs in size, or holds a segment that the annotations lack.
        """
        path, image = self.masks[i], self.images.path(i)
        values = decode_ids(read_image(path, path), path, self.images.max_pixels)
        place = slice(self._ends[i], self._ends[i + 1])
        ids = np.concatenate([[0], self._ids[place]])
        order = np.argsort(ids)
        found = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
        if (ids[found] != values).any():
            stranger = values[ids[found] != values][0]
            raise ImageError(f"{path}: segment {stranger} is not in the annotations ({self.name}); is the PNG of them?")
        classes = np.concatenate([[IGNORE], self._classes[place]]).astype(np.uint8)[found]
        return torch.from_numpy(on_shown_grid(classes, path, read_image(image, image), image))

    def describe(self, i: int) -> str:
        """Return the path of image `i`."""
        return self.images.describe(i)


def open_panoptic(root: Path, split: str, channels: int, max_pixels: int) -> PanopticSource:
    """Open COCO panoptic: images in root/SPLIT2017, PNGs in root/annotations/panoptic_SPLIT2017 or beside the images.

    Categories, things and stuff, are numbered from 0 in the order of their ids. Pixels without a segment (id 0) and
    crowds are ignored.

    Raises:
        ValueError: the annotations are damaged, empty, or do not fit each other, naming file and entry.
    """
    file = root / PANOPTIC_SPLITS[split]
    try:
        content = parse_json(read_bytes(file, _LARGEST))
        names, numbers = _categories(content["categories"])
        images = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        annotations = {entry["image_id"]: entry for entry in content["annotations"]}
        segments = [_segments(entry, numbers) for entry in annotations.values()]
        paths = [str(entry["file_name"]) for entry in annotations.values()]
    except KeyError as error:
        raise ValueError(f"{file}: an entry lacks {error}; these are no panoptic annotations of COCO") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file}: these are no panoptic annotations of COCO: {error}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    if not annotations:
        raise ValueError(f"{file} has no annotations: the split is empty")
    alone = [name for number, name in images.items() if number not in annotations]
    extra = [entry["file_name"] for number, entry in annotations.items() if number not in images]
    if alone or extra or len(annotations) < len(content["annotations"]):
        fault = f"images {listed(alone)} have no annotation" if alone else "an image has two annotations"
        fault = f"annotations {listed(extra)} belong to no image" if extra else fault
        raise ValueError(f"{file}: {fault}; restore the file")
    beside = root / f"panoptic_{split}2017"
    folder = beside if beside.is_dir() else root / "annotations" / beside.name
    if not folder.is_dir():
        raise ValueError(f"neither {beside} nor {folder} is a folder: unpack the PNGs of {file.name} there")
    source = FileSource(
        f"coco_panoptic {split}",
        root / f"{split}2017",
        (images[number] for number in annotations),
        channels=channels,
        max_pixels=max_pixels,
    )
    return PanopticSource(source, PathTable(str(folder / path) for path in paths), names, segments)


def _categories(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], dict[int, int]]:
    """Names by number from 0, and the number of each category id."""
    by_id = {entry["id"]: str(entry["name"]) for entry in entries}
    if len(by_id) != len(entries) or not 2 <= len(by_id) <= _MOST_CLASSES:
        raise ValueError(
            f"{len(entries)} categories with {len(by_id)} ids: there can be 2 to {_MOST_CLASSES}, each once"
        )
    order = sorted(by_id)
    return tuple(by_id[category] for category in order), {category: i for i, category in enumerate(order)}


def _segments(entry: Mapping[str, Any], numbers: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    found = entry["segments_info"]
    for segment in found:
        if segment["category_id"] not in numbers:
            raise ValueError(f"segment {segment['id']} of {entry['file_name']} has category {segment['category_id']}, "
                             f"which is not among the categories")  # fmt: skip
    classes = [IGNORE if segment.get("iscrowd") else numbers[segment["category_id"]] for segment in found]
    return np.array([segment["id"] for segment in found], np.int64), np.array(classes, np.uint8)
