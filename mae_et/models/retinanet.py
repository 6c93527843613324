"""RetinaNet's head on the maps of a trunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from mae_et.models.anchors import AnchorSizes, LevelAnchors

LEAST_STRIDE = 6  # px; of the maps that RetinaNet uses
RETINA_SIZES = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))  # of anchors, in strides (section 4)


def retina_levels(strides: Sequence[int]) -> list[int]:
    """px per cell of each level, for maps of these strides: those coarse enough, and two more."""
    used = [stride for stride in strides if stride >= LEAST_STRIDE]
    return [*used, 2 * used[-1], 4 * used[-1]]


class RetinaHead(nn.Module):
    """RetinaNet (arXiv 1708.02002): every anchor of every level is a sigmoid classifier under the focal loss.

    Numbers are the paper's section 4 and 4.1, through torchvision: IoU 0.5 and 0.4 with a match for every object,
    prior 0.01, levels from stride 8 on with two more by convolutions, 1000 candidates a level.

    Args:
        channels, strides: of the maps; those finer than stride 6 (8 of patch 14's 7) are not used.
        classes: without background.
        anchor_sizes: for each level, px; see `RETINA_SIZES`.
        detections: kept of an image, at most.
        score_threshold, nms_threshold: what is found scores above the one, and overlaps less than the other.
    """

    candidates = 1000

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        classes: int,
        anchor_sizes: AnchorSizes,
        detections: int,
        score_threshold: float,
        nms_threshold: float,
    ):
        super().__init__()
        levels = retina_levels(strides)
        self.used = len(levels) - 2
        self.anchors = LevelAnchors(levels, anchor_sizes)
        self.extra = LastLevelP6P7(channels, channels)
        self.layers = RetinaNetHead(channels, self.anchors.num_anchors_per_location()[0], classes)
        self._begin_as_at_published_width(channels)
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.detections, self.score_threshold, self.nms_threshold = detections, score_threshold, nms_threshold

    def _begin_as_at_published_width(self, channels: int) -> None:
        """Weights of deviation 0.01 suit 256 channels; in narrower layers, four in a row would leave no signal."""
        for branch in (self.layers.classification_head, self.layers.regression_head):
            for layer in branch.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.data *= (256 / channels) ** 0.5

    def forward(
        self, maps: list[Tensor], images: ImageList, targets: Sequence[Mapping[str, Tensor]] | None, seeds: Any = None
    ) -> Any:
        """See `Detector.forward`; nothing is drawn from the seeds."""
        levels = self._levels(maps)
        outputs = {name: output.float() for name, output in self.layers(levels).items()}
        anchors = self.anchors(images, levels)
        if self.training:
            assert targets is not None
            matches = [self._match(*pair) for pair in zip(targets, anchors, self.anchors.inside)]
            return self.layers.compute_loss([dict(target) for target in targets], outputs, anchors, matches)
        per_location = self.anchors.num_anchors_per_location()
        counts = [level[0, 0].numel() * number for level, number in zip(levels, per_location)]
        scores = outputs["cls_logits"].sigmoid().masked_fill(~self.anchors.inside[..., None], 0)
        each = zip(scores, outputs["bbox_regression"], anchors, images.image_sizes)
        return [self._detect(*of_image, counts) for of_image in each]

    def learned_layers(self, maps: list[Tensor]) -> None:
        """Run what costs multiply-adds."""
        self.layers(self._levels(maps))

    def _levels(self, maps: list[Tensor]) -> list[Tensor]:
        used = maps[-self.used :]
        # In float32: oneDNN's bfloat16 gradient of a strided 3x3 kernel on a map of one cell holds whatever memory held
        # before (torch 2.14.1 on a CPU with AVX-512; shown by tests/models/test_detection.py).
        device = used[-1].device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            extra = self.extra([used[-1].float()], [used[-1].float()], [""])[0]
        return [*used, *extra[1:]]

    def _match(self, target: Mapping[str, Tensor], anchors: Tensor, inside: Tensor) -> Tensor:
        """int64 [A]: the object of each anchor; -1 for background, -2 for those that do not count."""
        if len(target["boxes"]) == 0:
            matches = torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        else:
            matches = self.matcher(box_iou(target["boxes"], anchors))
        return matches.masked_fill(~inside, Matcher.BETWEEN_THRESHOLDS)

    def _detect(
        self, scores: Tensor, offsets: Tensor, anchors: Tensor, size: tuple[int, int], counts: list[int]
    ) -> dict[str, Tensor]:
        """What one image has, of scores [A, classes], offsets and anchors [A, 4]; counts of anchors by level."""
        classes = scores.shape[1]
        chosen, first = [], 0
        for level in scores.flatten().split([count * classes for count in counts]):
            chosen.append(first + level.topk(min(self.candidates, len(level))).indices)
            first += len(level)
        chosen = torch.cat(chosen)
        anchor, labels, scores = chosen // classes, chosen % classes, scores.flatten()[chosen]
        boxes = clip_boxes_to_image(self.coder.decode_single(offsets[anchor], anchors[anchor]), size)
        # torchvision keeps boxes without area, which padding is clipped to, here; not so in its R-CNNs.
        kept = (scores > self.score_threshold) & (boxes[:, 2:] - boxes[:, :2] >= 1e-2).all(1)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        best = batched_nms(boxes, scores, labels, self.nms_threshold)[: self.detections]
        return {"boxes": boxes[best], "scores": scores[best], "labels": labels[best]}
