"""Anchors of a pyramid of maps, and region proposals from them, on images with padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

# height / width (Faster R-CNN, arXiv 1506.01497, section 3.1.1; RetinaNet, arXiv 1708.02002, section 4).
ASPECT_RATIOS = (0.5, 1.0, 2.0)
AnchorSizes = Sequence[Sequence[float]]


def scaled_sizes(strides: Sequence[int], sizes: Sequence[float], scale: float) -> AnchorSizes:
    """Sizes in px of every level, from sizes in strides and a factor for all."""
    return [[scale * size * stride for size in sizes] for stride in strides]


class LevelAnchors(AnchorGenerator):
    """torchvision's anchors at the strides that the levels have, in float32, with a note of those in the padding.

    torchvision divides the image's size by the map's, which is not the stride where a level has a cell that reaches
    beyond the image (224 px at stride 64: 4 cells, and a stride of 56); and it counts in the maps' type, in which
    bfloat16 has no odd pixels above 256.

    Args:
        strides: px per cell, for each level.
        sizes: for each level, square roots of the anchors' areas in px.

    Raises:
        ValueError: not as many sizes for every level.

    Attributes:
        inside: bool [N, anchors] of the last call: the anchor's centre is in the image, not in its padding.
    """

    inside: Tensor

    def __init__(self, strides: Sequence[int], sizes: AnchorSizes):
        if len(sizes) != len(strides) or len(set(map(len, sizes))) != 1:
            raise ValueError(
                f"sizes of anchors {sizes} must be equally many for each of the {len(strides)} levels with strides "
                f"{tuple(strides)} px"
            )
        super().__init__(tuple(map(tuple, sizes)), (ASPECT_RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors float32 [A, 4] of all levels, finest first: the same for each image.

        Args:
            image_list: its sizes are those inside the padding.
            feature_maps: one for each level.
        """
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        # Annotated as tensors; all that torchvision does with a stride is to multiply by it.
        strides = cast(list[list[Tensor]], [[stride, stride] for stride in self.strides])
        anchors = torch.cat(self.grid_anchors(grids, strides))
        x, y = (anchors[:, :2] + anchors[:, 2:]).T / 2
        self.inside = torch.stack([(x < width) & (y < height) for height, width in image_list.image_sizes])
        return [anchors] * len(image_list.image_sizes)


class FloatRPNHead(RPNHead):
    """torchvision's, with float32 outputs under autocast, too: boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness [N, A, H, W] and box offsets [N, 4 A, H, W] of each level."""
        objectness, offsets = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in offsets]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, in which anchors in the padding are neither trained nor proposed.

    Under large-scale jitter most of an image may be padding: there they would be most of the negatives, and take the
    places of proposals before NMS, only to be clipped to nothing. mmdet leaves them out, too (`valid_flags`).
    """

    anchor_generator: LevelAnchors

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (1 object, 0 background, -1 neither) and matched boxes, for each image."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        inside = self.anchor_generator.inside
        return [of_image.masked_fill(~within, -1.0) for of_image, within in zip(labels, inside)], boxes

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The best proposals after NMS, and their scores, for each image."""
        outside = ~self.anchor_generator.inside
        # Last in order; and where there are too few others, boxes without area, which torchvision drops.
        objectness = objectness.view_as(outside).masked_fill(outside, -torch.inf)
        proposals = proposals.masked_fill(outside[..., None], 0.0)
        return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
