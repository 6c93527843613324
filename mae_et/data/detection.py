"""Images with objects: one interface over the kinds of detection sets, and parts of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mae_et.data.coco import coco_splits, open_coco
from mae_et.data.decode import DEFAULT_MAX_PIXELS
from mae_et.data.instance_maps import instance_map_splits, open_instance_maps
from mae_et.data.instances import Instances
from mae_et.data.splits import Chosen, draw_held_out

_OPENERS = {"coco": open_coco, "instances": open_instance_maps}
_SPLITS = {"coco": coco_splits, "instances": instance_map_splits}
DETECTION_KINDS = tuple(_OPENERS)

# Second word of a Philox key, the first being the seed.
_HOLD_OUT = int.from_bytes(b"hold img", "big")


class DetectionSource(Protocol):
    """A numbered set of images with the objects on them.

    Attributes:
        name: what it is called in messages and logs.
        channels: 1 or 3, of every image.
        classes: the classes' names, by class number.
        has_masks: whether objects have masks.
        image_ids: int64 [N], the numbers that the set itself has for its images, for files of results.
        category_ids: int64 [C], and those for its classes; -1 for none.
        remarks: one line each on what was left out, for whoever opens it to show.
    """

    name: str
    channels: int
    classes: tuple[str, ...]
    has_masks: bool
    image_ids: np.ndarray
    category_ids: np.ndarray
    remarks: tuple[str, ...]

    def __len__(self) -> int: ...

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        ...

    def instances(self, i: int, masks: bool = True) -> Instances:
        """Return the objects of image `i`, with masks if the set has them and they are asked for; or ImageError."""
        ...

    def describe(self, i: int) -> str:
        """Return what tells a reader which image this is, such as its path."""
        ...


def open_detection(
    kind: str,
    root: str | Path,
    split: str,
    channels: int = 3,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    classes: Sequence[str] = (),
) -> DetectionSource:
    """Open a set of images with objects.

    - `"coco"`: annotations in COCO's JSON, with or without outlines; where they are looked for and what becomes of
      what is odd in them is said in mae_et/data/coco.py.
    - `"instances"`: maps of numbered objects of one class, see mae_et/data/instance_maps.py.

    Args:
        kind: one of `DETECTION_KINDS`.
        root: the folder with the data.
        split: "train", "val" or "test".
        channels: 3 for RGB, 1 for luma.
        max_pixels: larger images raise ImageError when they are read.
        classes: of "coco" the names to number the classes by, so that a second split has the first one's numbers, by
            default the file's own in order of their ids; of "instances" the name of the one class.

    Raises:
        ValueError: if the kind, the split or the folder is not there, or annotations cannot be used; saying which.
    """
    _check(kind)
    place = Path(root).expanduser()
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; set data.root=... to the folder with the images and annotations")
    return _OPENERS[kind](place, split, channels, max_pixels, classes)


def detection_splits(kind: str, root: str | Path) -> tuple[str, ...]:
    """Return which of train, val and test a set has; opens no file. Raises ValueError for an unknown kind."""
    _check(kind)
    return _SPLITS[kind](Path(root).expanduser())


def _check(kind: str) -> None:
    if kind not in DETECTION_KINDS:
        close = difflib.get_close_matches(str(kind), DETECTION_KINDS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"data.source={kind} is unknown; {hint}There are {', '.join(DETECTION_KINDS)}")


class DetectionSubset(Chosen[DetectionSource]):
    """Chosen images of a source, numbered anew, with the source's classes."""

    def __init__(self, source: DetectionSource, indices: np.ndarray, name: str | None = None) -> None:
        super().__init__(source, indices, name)
        self.has_masks = source.has_masks
        self.image_ids, self.category_ids = source.image_ids[self.indices], source.category_ids
        self.remarks = source.remarks

    def instances(self, i: int, masks: bool = True) -> Instances:
        """Return the objects of image `i`; raise ImageError if they cannot be used."""
        return self.source.instances(self._index(i), masks)


def hold_out_images(source: DetectionSource, share: float, seed: int) -> tuple[DetectionSubset, DetectionSubset]:
    """Split a set into (kept, held out), for choosing what test data must not choose; see `draw_held_out`.

    Both parts are in the source's order.
    """
    held = draw_held_out(source, share, seed, _HOLD_OUT)
    return (
        DetectionSubset(source, np.flatnonzero(~held), f"{source.name}, {1 - share:.3g} kept"),
        DetectionSubset(source, np.flatnonzero(held), f"{source.name}, {share:.3g} held out"),
    )
