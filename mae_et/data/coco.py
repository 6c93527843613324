"""Detection sets in COCO's format: a JSON file of images, categories and annotations for each split.

What is done with what other tools write:

- Refused, naming the file and what is wrong in it: damaged JSON, missing keys, ids that occur twice or are no integers,
  annotations of unknown images or categories, run lengths of another size than their image, two categories of one
  name, a split without images or objects, images that are all missing.
- Categories are numbered without gaps, in order of their ids.
- Boxes that reach beyond their image are clipped to it. Those without area inside it, or with a value that is no finite
  number, are left out, with a remark. Images without objects stay.
- Where some objects have outlines and one has none that can be used, nobody knows its pixels: when masks are asked for
  it counts as a crowd over its box, neither for nor against a detector. A remark says how many.
- An area that is missing or not above 0 is that of the clipped box.
- Images that are missing are remarked upon, and are unreadable images when their turn comes.
- The JSON's width and height say which pixels were annotated. Where they are the upright image's, as viewers show it,
  that is taken. Where only the image as it is stored has them, EXIF's turn is undone. (A photo on its head has one size
  either way and is taken upright, and so is a square one.) If neither fits, the image cannot be used.

Reading takes nine times the file once, about 4 GB for the 450 MB of instances_train2017.json.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mae_et.data.coco_file import read_coco
from mae_et.data.decode import DEFAULT_MAX_PIXELS, ImageError
from mae_et.data.files import SPLITS, FileSource, PathTable, listed
from mae_et.data.instances import Instances, check_masks
from mae_et.data.orientation import as_stored, orientation
from mae_et.data.outlines import mask_tools

# Annotations, and the folders that their images may be in; the first that is there counts. Roboflow says valid for val.
_LAYOUTS = (
    ("{split}.json", ("{split}",)),
    ("annotations/instances_{split}2017.json", ("{split}2017", "images/{split}2017")),
    ("annotations/instances_{split}.json", ("{split}", "images/{split}", "images")),
    ("annotations/{split}.json", ("{split}", "images/{split}", "images")),
    ("{split}/_annotations.coco.json", ("{split}",)),
    ("{valid}/_annotations.coco.json", ("{valid}",)),
)


class CocoSource(FileSource):
    """Images with the objects that a COCO file lists.

    Args:
        name: what it is called in messages and logs.
        file: the JSON.
        folder: the folder that its file names are relative to.
        channels: 3 (RGB) or 1 (luma).
        max_pixels: images with more pixels are refused.
        classes: names to number the classes by, those of the train split; by default the file's own, in order of their
            ids. A name that the file lacks keeps its number.

    Attributes:
        classes: the classes' names, by number.
        category_ids: int64 [C], the file's id of each class; -1 of one that it lacks.
        image_ids: int64 [N], the file's id of each image.
        sizes: int64 [N, 2], the images' (height, width) in px as the file states them.
        has_masks: whether any object has an outline.
        remarks: one line each on what was left out, for whoever opens it to show.

    Raises:
        ValueError: naming the file and what in it cannot be used, see the module.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        folder: Path,
        channels: int = 3,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        classes: Sequence[str] = (),
    ) -> None:
        self._content = content = read_coco(file, classes)
        super().__init__(name, folder, content.paths, None, content.classes, channels, max_pixels)
        self.file = file
        self.image_ids, self.category_ids, self.sizes = content.image_ids, content.category_ids, content.sizes
        self._ends = np.searchsorted(content.images, np.arange(len(self) + 1))
        self.has_masks = bool(content.outlines.present(content.outline_of).any())
        missing = _missing(folder, content.paths)
        if len(missing) == len(self):
            raise ValueError(
                f"none of the {len(self)} images that {file} lists is in {folder}, such as {listed(missing)}; put them "
                f"there, or write each file_name relative to that folder"
            )
        lacking = f"{len(missing)} of the {len(self)} images of {file} are not in {folder}: {listed(missing)}"
        self.remarks = (*content.remarks, *([lacking] if missing else []))

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W], as it was annotated; ImageError also if it has another size."""
        image = super().image(i)
        height, width = self.sizes[i].tolist()
        if image.shape[1:] == (height, width):
            return image
        if image.shape[1:] == (width, height):
            stored = as_stored(image, orientation(self.path(i)))
            if stored.shape[1:] == (height, width):
                return stored
        raise ImageError(
            f"{self.describe(i)}: it is {image.shape[2]} x {image.shape[1]} px, but {self.file} says {width} x "
            f"{height} px: its boxes are of other pixels"
        )

    def instances(self, i: int, masks: bool = True) -> Instances:
        """Return the objects of image `i`, with masks if the file has outlines and they are asked for.

        Raises:
            ImageError: a mask is damaged, or its image is too large.
            ValueError: masks are asked for and faster-coco-eval is not installed.
        """
        content = self._content
        which = slice(self._ends[i], self._ends[i + 1])
        crowd, bitmaps = content.crowd[which].copy(), None
        if masks and self.has_masks:
            present = content.outlines.present(content.outline_of[which])
            bitmaps = torch.from_numpy(self._masks(i, which, present))
            crowd |= ~present
        return Instances(
            boxes=torch.from_numpy(content.boxes[which].copy()),
            labels=torch.from_numpy(content.labels[which].copy()),
            areas=torch.from_numpy(content.areas[which].copy()),
            crowd=torch.from_numpy(crowd),
            masks=bitmaps,
        )

    def _masks(self, i: int, which: slice, present: np.ndarray) -> np.ndarray:
        """The masks of an image's objects, uint8 [K, H, W]; of one without outline, its box."""
        mask_tools()  # where it is missing, that is no fault of the image
        height, width = self.sizes[i].tolist()
        if height * width > self.max_pixels:
            size = f"{width} x {height} px by {self.file}"
            raise ImageError(f"{self.describe(i)}: too many pixels: {size}, above data.max_pixels={self.max_pixels}")
        check_masks(len(present), (height, width), self.describe(i))
        masks = np.zeros((len(present), height, width), np.uint8)
        for k, mask in enumerate(masks):
            if not present[k]:
                left, top, right, bottom = self._content.boxes[which][k].tolist()
                mask[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = 1
                continue
            try:
                mask[:] = self._content.outlines.mask(int(self._content.outline_of[which][k]), height, width)
            except ValueError as error:
                raise ImageError(f"{self.describe(i)}: a mask in {self.file} is damaged: {error}") from error
        return masks


def _missing(root: Path, paths: PathTable) -> list[str]:
    """The paths without a file: one listing a folder, and not one question a file."""
    held: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(os.path.join(root, path))  # noqa: PTH118
        if folder not in held:
            held[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()  # noqa: PTH112, PTH208
        if name not in held[folder]:
            missing.append(path)
    return missing


def coco_splits(root: Path) -> tuple[str, ...]:
    """Return which of train, val and test have annotations below root."""
    return tuple(split for split in SPLITS if _find(root, split))


def open_coco(
    root: Path,
    split: str,
    channels: int = 3,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    classes: Sequence[str] = (),
) -> CocoSource:
    """Open a split; the annotations are looked for as `_LAYOUTS` says, and the first that are there are taken.

    Raises:
        ValueError: it is not there, saying what was looked for; or as `CocoSource`.
    """
    found = _find(root, split)
    if found is None:
        looked_for = ", ".join(dict.fromkeys(_filled(file, split) for file, _ in _LAYOUTS))
        there = coco_splits(root)
        splits = f"there are annotations of {', '.join(there)}" if there else "check data.root"
        raise ValueError(f"{root} has no COCO annotations of the split '{split}'; looked for {looked_for}; {splits}")
    file, folders = found
    for folder in folders:
        if (root / folder).is_dir():
            return CocoSource(f"coco {split}", root / file, root / folder, channels, max_pixels, classes)
    raise ValueError(
        f"{root / file} is there, but not the folder with its images; looked for {', '.join(folders)} in {root}"
    )


def _find(root: Path, split: str) -> tuple[str, list[str]] | None:
    """The path of a split's annotations and those of the folders that may hold its images; None without annotations."""
    for file, folders in _LAYOUTS:
        if (root / _filled(file, split)).is_file():
            return _filled(file, split), [_filled(folder, split) for folder in folders]
    return None


def _filled(path: str, split: str) -> str:
    return path.format(split=split, valid="valid" if split == "val" else split)
