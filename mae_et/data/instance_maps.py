"""Sets of one class whose objects are told apart by numbers in an image.

The images are root/<split>/images/*, the maps root/<split>/instances/*.png. A map has the name of its image and ends in
.png; its values are 0 for background and a number of its own for each object, in 8 or 16 bits of grey or as the numbers
of a palette. Boxes are those of the objects' pixels, and known when a map is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from mae_et.data.decode import DEFAULT_MAX_PIXELS, ImageError
from mae_et.data.files import IMAGE_EXTENSIONS, SPLITS, FileSource, listed, read_image
from mae_et.data.index_masks import decode_indices
from mae_et.data.instances import Instances, check_masks
from mae_et.data.orientation import upright_size


class InstanceMapSource(FileSource):
    """Images with the objects that a map of numbers tells apart.

    Args:
        name: what it is called in messages and logs.
        folder: holds `images` and `instances`.
        channels: 3 (RGB) or 1 (luma).
        max_pixels: images and maps with more pixels are refused.
        class_name: of all objects.

    Attributes:
        classes: the one name.
        image_ids, category_ids: int64, counted from 1, for files of results.
        has_masks: true.
        remarks: one line each on what was left out, for whoever opens it to show.

    Raises:
        ValueError: a folder is missing or empty, or an image has no map.
    """

    has_masks = True

    def __init__(
        self,
        name: str,
        folder: Path,
        channels: int = 3,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        class_name: str = "object",
    ) -> None:
        images, maps = _names(folder / "images", IMAGE_EXTENSIONS), set(_names(folder / "instances", (".png",)))
        lacking = [image for image in images if _map_of(image) not in maps]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of the {len(images)} images in {folder / 'images'} have no map in "
                f"{folder / 'instances'}, which would be named {listed([_map_of(image) for image in lacking])}; add "
                f"them (all 0 where there is no object) or remove the images"
            )
        super().__init__(name, folder / "images", images, None, (class_name,), channels, max_pixels)
        self.folder = folder
        self.image_ids = np.arange(1, len(images) + 1)
        self.category_ids = np.ones(1, np.int64)
        unused = sorted(maps - {_map_of(image) for image in images})
        self.remarks = (
            (f"{len(unused)} maps in {folder / 'instances'} have no image: {listed(unused)}",) if unused else ()
        )

    def instances(self, i: int, masks: bool = True) -> Instances:
        """Return the objects of image `i` in order of their numbers.

        Raises:
            ImageError: the map cannot be used, or has another size than the image; both are named.
        """
        path = self.map_path(i)
        numbers = self._read(path)
        try:
            size = upright_size(self.path(i))
        except Exception as error:  # PIL raises many kinds; the image is read for its pixels elsewhere
            raise ImageError(f"{self.describe(i)}: cannot be read: {error}") from error
        if numbers.shape != size:
            raise ImageError(
                f"{self.describe(i)} is {size[1]} x {size[0]} px, and its map {path} {numbers.shape[1]} x "
                f"{numbers.shape[0]} px; make both the same"
            )
        places = ndimage.find_objects(numbers)
        found = [number for number, place in enumerate(places, 1) if place is not None]
        boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in filter(None, places)]
        areas = np.bincount(numbers.ravel(), minlength=len(places) + 1)[found]
        bitmaps = None
        if masks:
            check_masks(len(found), size, path)
            bitmaps = torch.from_numpy((numbers == np.array(found, np.int32)[:, None, None]).astype(np.uint8))
        return Instances(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.zeros(len(found), dtype=torch.int64),
            areas=torch.from_numpy(areas.astype(np.float32)),
            crowd=torch.zeros(len(found), dtype=torch.bool),
            masks=bitmaps,
        )

    def map_path(self, i: int) -> str:
        """Return the path of image `i`'s map."""
        return str(self.folder / "instances" / _map_of(self.paths[i]))

    def _read(self, path: str) -> np.ndarray:
        """Read a map, int32 [H, W]."""
        values = decode_indices(read_image(path, path), path, self.max_pixels)
        return values.astype(np.int32)


def _names(folder: Path, extensions: Sequence[str]) -> list[str]:
    """The names of the images in a folder, sorted."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; a set of instance maps has images in <root>/<split>/images and "
                         f"one PNG for each in <root>/<split>/instances")  # fmt: skip
    endings = tuple(extensions)
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(endings) and name[0] != ".")  # noqa: PTH208
    if not names:
        raise ValueError(f"{folder} is empty: no name in it ends in {', '.join(extensions)}")
    return names


def _map_of(image: str) -> str:
    return Path(image).stem + ".png"


def instance_map_splits(root: Path) -> tuple[str, ...]:
    """Return which of train, val and test have maps below root."""
    return tuple(split for split in SPLITS if (root / split / "instances").is_dir())


def open_instance_maps(
    root: Path,
    split: str,
    channels: int = 3,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    classes: Sequence[str] = (),
) -> InstanceMapSource:
    """Open a split; `classes` may give the one class its name.

    Raises:
        ValueError: it is not there, or more than one class is named; or as `InstanceMapSource`.
    """
    there = instance_map_splits(root)
    if split not in there:
        has = f"it has {', '.join(there)}" if there else "check data.root"
        raise ValueError(f"{root} has no instance maps of the split '{split}' (no {root / split / 'instances'}); {has}")
    if len(classes) > 1:
        raise ValueError(f"instance maps have one class, not {len(classes)} ({listed(classes)}); name one")
    return InstanceMapSource(f"instances {split}", root / split, channels, max_pixels, *(classes or ("object",)))
