"""The objects of one image: boxes, classes, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mae_et.data.decode import ImageError

MASK_BYTES = 1 << 30  # of all masks of one image


def check_masks(count: int, size: tuple[int, int], name: str) -> None:
    """Refuse more masks than memory should be asked for: a photo taken for a map of objects has hundreds.

    Args:
        count: of masks.
        size: (height, width) in px of each.
        name: of the file that they are of.

    Raises:
        ImageError: they would take more than a gigabyte.
    """
    size_in_bytes = count * size[0] * size[1]
    if size_in_bytes > MASK_BYTES:
        raise ImageError(
            f"{name}: masks of {count:,} objects on {size[1]} x {size[0]} px would take {size_in_bytes / 1e9:.1f} GB: "
            "is it no photo, and are edges not smoothed? Make the images smaller, or the objects fewer"
        )


@dataclass(frozen=True)
class Instances:
    """K objects of an image of H x W px.

    Attributes:
        boxes: float32 [K, 4], (left, top, right, bottom) in px; right and bottom are exclusive.
        labels: int64 [K], class numbers from 0.
        areas: float32 [K], in px, as the data set states them; COCO's sizes (small, medium, large) go by them.
        crowd: bool [K]; a crowd is a region of many objects: it is never trained on, and what is found inside counts
            neither for nor against a detector.
        masks: uint8 [K, H, W], 1 inside the object; None where the set has no masks.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowd: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def keep(self, which: Tensor) -> Instances:
        """The objects at a bool [K] or int64 index."""
        places = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        # Ten times as fast as indexing, where a mask has half a million px.
        masks = None if self.masks is None else self.masks.index_select(0, places)
        return Instances(self.boxes[which], self.labels[which], self.areas[which], self.crowd[which], masks)

    @classmethod
    def none(cls, masks: tuple[int, int] | None = None) -> Instances:
        """No objects; with masks of (height, width) where that is given."""
        empty = torch.zeros(0)
        return cls(
            boxes=torch.zeros(0, 4),
            labels=empty.long(),
            areas=empty,
            crowd=empty.bool(),
            masks=None if masks is None else torch.zeros(0, *masks, dtype=torch.uint8),
        )
