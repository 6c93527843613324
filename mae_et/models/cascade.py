"""Cascade R-CNN's heads on proposals: each stage refines the boxes of the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes

# IoU from which a box is an object, and the scales of the regression targets, by stage (Cascade R-CNN, arXiv
# 1906.09756, section 5; the scales are detectron2's and mmdet's, one over the paper's deviations of targets).
STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)
Sizes = list[tuple[int, int]]
# For each image: boxes [R, 4], index of the matched object [R], label [R] (0: background).
Matched = tuple[list[Tensor], list[Tensor], list[Tensor]]


class CascadePredictor(nn.Module):
    """Class logits, and one box for all classes; float32 under autocast, too.

    Drawn as detectron2 draws them, so that at first no stage moves a box.

    Args:
        width: of the features.
        classes: without background.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, classes + 1] and offsets [R, 4] of features [R, width]."""
        return self.cls_score(features).float(), self.bbox_pred(features).float()


class CascadeHeads(RoIHeads):
    """Three stages of box heads with IoU 0.5, 0.6 and 0.7, and one mask head, in the place of torchvision's `RoIHeads`.

    Published versions differ in what the paper leaves open. This one follows detectron2 (`CascadeROIHeads`), with
    which ViTDet's numbers were made:

    - objects join the proposals before the first stage only, and proposals are sampled there only. A later stage has
      all of its predecessor's boxes, matched anew. (mmdet adds the objects and samples at each stage.)
    - losses of the stages are added up as they are, and the gradient of each with respect to the maps is divided by
      their number. (mmdet weighs them 1, 0.5, 0.25.)
    - the one mask head is trained on the first stage's positives and used on the last stage's boxes. (mmdet has three.)

    In evaluation a proposal's class probabilities are the mean of all stages', and its box the last stage's.

    The box loss is torchvision's smooth L1 with beta 1/9; detectron2's is L1.

    Args:
        box_roi_pool: RoIAlign, for all stages.
        box_head: makes the layers of a stage: of regions [R, channels, 7, 7], to [R, width].
        width: of their output.
        classes: without background; labels in targets and results begin at 1.
        arguments: of `RoIHeads`, for masks and for what is kept in evaluation.
    """

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    def __init__(
        self,
        box_roi_pool: MultiScaleRoIAlign,
        box_head: Callable[[], nn.Module],
        width: int,
        classes: int,
        **arguments: Any,
    ):
        iou, scales = STAGES[0]
        super().__init__(
            box_roi_pool,
            nn.ModuleList(box_head() for _ in STAGES),
            nn.ModuleList(CascadePredictor(width, classes) for _ in STAGES),
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=0,  # the sampler is replaced by one with seeds
            positive_fraction=0.0,
            bbox_reg_weights=scales,
            **arguments,
        )
        self.matchers = [Matcher(iou, iou) for iou, _ in STAGES]
        self.coders = [BoxCoder(scales) for _, scales in STAGES]

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes, targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What is found (empty in training) and losses (empty in evaluation).

        Args:
            features: float32 maps [N, channels, h, w] by name.
            proposals: for each image, float32 [R, 4] in px.
            image_shapes: (height, width) of each image inside its padding.
            targets: in training, for each image, boxes, labels from 1, and masks where there is a mask head.
        """
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        proposals, objects, labels, _ = self.select_training_samples(proposals, targets)
        first: Matched = (proposals, objects, labels)
        losses = self._box_losses(features, first, image_shapes, targets)
        if self.has_mask():
            losses["masks"] = self._mask_loss(features, first, image_shapes, targets)
        return [], losses

    def _box_losses(
        self, features: dict[str, Tensor], matched: Matched, image_shapes: Sizes, targets: Any
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage, coder in enumerate(self.coders):
            proposals, objects, labels = matched
            logits, offsets = self._run(stage, features, proposals, image_shapes)
            aims = coder.encode([_pick(t["boxes"], which) for t, which in zip(targets, objects)], proposals)
            of_classes, of_boxes = stage_losses(logits, offsets, torch.cat(labels), torch.cat(aims))
            losses |= {f"classes_{stage + 1}": of_classes, f"boxes_{stage + 1}": of_boxes}
            if stage + 1 < len(self.coders):
                refined = self._refine(coder, offsets, proposals, image_shapes)
                refined = [boxes[remove_small_boxes(boxes, min_size=1e-2)] for boxes in refined]
                matched = (refined, *self._match(stage + 1, refined, targets))
        return losses

    def _run(
        self, stage: int, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        regions = self.box_roi_pool(features, proposals, image_shapes)
        if regions.requires_grad:
            regions.register_hook(lambda gradient: gradient / len(self.coders))
        return self.box_predictor[stage](self.box_head[stage](regions))

    @staticmethod
    def _refine(coder: BoxCoder, offsets: Tensor, proposals: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
        """Boxes of a stage, for each image, clipped; no gradient goes through them."""
        decoded = coder.decode_single(offsets.detach(), torch.cat(proposals)).split([len(p) for p in proposals])
        return [clip_boxes_to_image(boxes, size) for boxes, size in zip(decoded, image_shapes)]

    def _match(self, stage: int, boxes: list[Tensor], targets: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Objects and labels of a stage's boxes, for each image."""
        objects, labels = [], []
        for of_image, target in zip(boxes, targets):
            if len(of_image) == 0 or len(target["boxes"]) == 0:
                found = torch.full((len(of_image),), Matcher.BELOW_LOW_THRESHOLD, device=of_image.device)
            else:
                found = self.matchers[stage](self.box_similarity(target["boxes"], of_image))
            objects.append(found.clamp(min=0))
            labels.append(_pick(target["labels"], objects[-1]).where(found >= 0, 0))
        return objects, labels

    def _mask_loss(self, features: dict[str, Tensor], matched: Matched, image_shapes: Sizes, targets: Any) -> Tensor:
        positives = [torch.where(labels > 0)[0] for labels in matched[2]]
        boxes, objects = ([of[which] for of, which in zip(part, positives)] for part in matched[:2])
        logits = self._masks(features, boxes, image_shapes)
        return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], objects)

    def _masks(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes) -> Tensor:
        assert self.mask_roi_pool is not None
        assert self.mask_head is not None
        assert self.mask_predictor is not None
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: Sizes
    ) -> list[dict[str, Tensor]]:
        probabilities, refined = [], proposals
        for stage, coder in enumerate(self.coders):
            # Boxes without area stay until the end: row i of every stage is one proposal.
            logits, offsets = self._run(stage, features, refined, image_shapes)
            probabilities.append(logits.softmax(-1))
            refined = self._refine(coder, offsets, refined, image_shapes)
        # What torchvision makes of logits, box offsets and proposals: of the logarithm of the mean, a softmax gives
        # the mean; offsets of 0 leave the last stage's boxes, for every class.
        mean = torch.stack(probabilities).mean(0)
        still = mean.new_zeros(len(mean), 4 * mean.shape[1])
        results = self.postprocess_detections(mean.log(), still, refined, image_shapes)
        found = [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in zip(*results)]
        if self.has_mask():
            logits = self._masks(features, [of_image["boxes"] for of_image in found], image_shapes)
            for of_image, masks in zip(found, maskrcnn_inference(logits, [of_image["labels"] for of_image in found])):
                of_image["masks"] = masks
        return found


def stage_losses(logits: Tensor, offsets: Tensor, labels: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
    """Means over a stage's R boxes: cross entropy, and smooth L1 of the boxes of objects.

    Finite for no boxes at all: those of an untrained stage may all leave the image.

    Args:
        logits: [R, classes + 1].
        offsets: [R, 4].
        labels: int64 [R], 0 for background.
        aims: [R, 4]; not read where the label is 0.
    """
    count = max(1, len(labels))
    of_object = (labels > 0)[:, None]
    # What is not read may be infinite: where an image has no objects, boxes are encoded as one without area.
    distance = F.smooth_l1_loss(offsets * of_object, aims.where(of_object, 0.0), beta=1 / 9, reduction="sum")
    return F.cross_entropy(logits, labels, reduction="sum") / count, distance / count


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """Rows of an image's objects; zeros where it has none."""
    return values[which] if len(values) else values.new_zeros(len(which), *values.shape[1:])
