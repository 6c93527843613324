"""The objects of one image: boxes, classes, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
