"""Detectors: torchvision's dense and region heads on the maps of a trunk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from mae_et.models.anchors import AnchorSizes, FloatRPNHead, LevelAnchors, ProposalNetwork, scaled_sizes
from mae_et.models.cascade import CascadeHeads
from mae_et.models.drop_path import SampleDraws
from mae_et.models.normalised import Normalised
from mae_et.models.pyramid import ChannelNorm
from mae_et.models.retinanet import RETINA_SIZES, RetinaHead, retina_levels
from mae_et.models.sampling import ANCHOR_STREAM, PROPOSAL_STREAM, SeededSampler
from mae_et.models.trunk import Trunk

DetectorKind = Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
Prediction = dict[str, Tensor]

# Of 512 proposals an image, at most these are positive (Fast R-CNN, arXiv 1504.08083, section 2.3).
POSITIVE_SHARE = 0.25
# torchvision's names of losses, as ours.
_LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposals",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
    "loss_mask": "masks",
    "classification": "classes",
    "bbox_regression": "boxes",
}


class Detector(Normalised):
    """A trunk and a head that finds objects in its maps.

    Args:
        trunk: makes the maps; its drop paths henceforth follow the samples' seeds.
        head: `RetinaHead` or `RegionHead`.
        mean, std: per channel, for pixels in [0, 1].
    """

    def __init__(self, trunk: Trunk, head: RetinaHead | RegionHead, mean: Sequence[float], std: Sequence[float]):
        super().__init__(mean, std)
        self.trunk, self.head = trunk, head
        self.draws = SampleDraws(trunk)

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        seeds: Tensor | None = None,
    ) -> dict[str, Tensor] | list[Prediction]:
        """Losses of a batch in training, what is found in evaluation.

        Whatever the padding holds, the trunk sees the mean colour there, as in torchvision and detectron2; anchors in
        it count for nothing, and boxes end where the image does.

        Args:
            images: uint8, or float in [0, 1], [N, C, H, W], padded at the right and the bottom.
            sizes: (height, width) of each image inside its padding.
            targets: in training, for each image, boxes float32 [K, 4] of positive area in px, labels int64 [K] from 0,
                and where the head has masks, masks uint8 [K, H, W]. K may be 0.
            seeds: in training, int64 [N], of the samples: they decide drop path and which anchors and proposals count.

        Returns:
            In training, float32 scalars by name, to be added up. In evaluation, for each image, `boxes` [K, 4],
            `scores` [K], `labels` [K] from 0, best first, and where the head has masks, `masks` [K, 28, 28]:
            probabilities on a grid over the box.
        """
        self.draws.hand_out(seeds if self.training else None)
        pixels = self.normalise(images)
        for image, (height, width) in zip(pixels, sizes):
            image[:, height:] = 0
            image[:, :, width:] = 0
        maps = self.trunk(pixels)
        self.draws.rewind()
        found = self.head(maps, ImageList(pixels, list(sizes)), targets, seeds)
        if self.training:
            losses: dict[str, Tensor] = found
            return {_LOSSES.get(name, name): loss for name, loss in losses.items()}
        return found


class RegionHead(nn.Module):
    """A region proposal network and torchvision's `RoIHeads`, plain or as a cascade.

    Args:
        channels: of the maps.
        rpn: on the maps and one more, by max pooling.
        roi_heads: on the maps. Classes begin at 1 in it.
        samples: proposals that training takes of an image.
    """

    def __init__(self, channels: int, rpn: ProposalNetwork, roi_heads: RoIHeads, samples: int):
        super().__init__()
        self.extra, self.rpn, self.roi_heads = LastLevelMaxPool(), rpn, roi_heads
        self.channels, self.samples = channels, samples
        anchors = SeededSampler(256, 0.5, ANCHOR_STREAM)  # Faster R-CNN, section 3.1.3
        proposals = SeededSampler(samples, POSITIVE_SHARE, PROPOSAL_STREAM)
        self.samplers = (anchors, proposals)
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = anchors, proposals  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        maps: list[Tensor],
        images: ImageList,
        targets: Sequence[Mapping[str, Tensor]] | None,
        seeds: Tensor | None,
    ) -> Any:
        """See `Detector.forward`."""
        for sampler in self.samplers:
            sampler.seeds = seeds
        shifted: Any = targets and [{**target, "labels": target["labels"] + 1} for target in targets]
        levels = self._levels(maps)
        proposals, losses = self.rpn(images, levels, shifted)
        # RoIAlign computes in float32 whatever it is given: better converted once than at every call.
        features = {name: level.float() for name, level in levels.items()}
        found, box_losses = self.roi_heads(features, proposals, images.image_sizes, shifted)
        if self.training:
            return losses | box_losses
        for of_image in found:
            of_image["labels"] = of_image["labels"] - 1
            if "masks" in of_image:
                of_image["masks"] = of_image["masks"].squeeze(1)
        return found

    def learned_layers(self, maps: list[Tensor]) -> None:
        """Run what costs multiply-adds, on as many regions as training takes of one image."""
        self.rpn.head(list(self._levels(maps).values()))
        heads, regions = self.roi_heads, maps[0].new_empty(self.samples, self.channels, 7, 7)
        if isinstance(heads, CascadeHeads):
            for head, predictor in zip(heads.box_head, heads.box_predictor):
                predictor(head(regions))
        else:
            heads.box_predictor(heads.box_head(regions))
        if heads.mask_head is not None and heads.mask_predictor is not None:
            positive = maps[0].new_empty(int(self.samples * POSITIVE_SHARE), self.channels, 14, 14)
            heads.mask_predictor(heads.mask_head(positive))

    def _levels(self, maps: list[Tensor]) -> dict[str, Tensor]:
        levels, names = self.extra(list(maps), maps, [str(level) for level in range(len(maps))])
        return dict(zip(names, levels))


class FloatBoxPredictor(FastRCNNPredictor):
    """torchvision's, with float32 outputs under autocast, too: boxes are decoded from them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, classes + 1] and offsets [R, 4 (classes + 1)]."""
        logits, offsets = super().forward(x)
        return logits.float(), offsets.float()


class FloatMaskPredictor(MaskRCNNPredictor):
    """torchvision's, with float32 outputs under autocast, too."""

    def forward(self, input: Tensor) -> Tensor:
        """Logits [R, classes + 1, 28, 28]."""
        return super().forward(input).float()


def build_detector(
    trunk: Trunk,
    kind: DetectorKind,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    box_head: Literal["mlp", "conv"] = "mlp",
    representation: int = 1024,
    mask_channels: int = 256,
    samples: int = 512,
    anchor_sizes: AnchorSizes | None = None,
    anchor_scale: float = 1.0,
    detections: int = 100,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
) -> Detector:
    """A detector of a published kind, with its published numbers.

    Args:
        trunk: makes the maps.
        kind: RetinaNet (arXiv 1708.02002), Faster R-CNN with a pyramid (1506.01497, 1612.03144), Mask R-CNN
            (1703.06870), or Cascade R-CNN (1712.00726) with or without masks.
        classes: without background.
        mean, std: per channel, for pixels in [0, 1].
        box_head: of R-CNNs: two fully connected layers ("mlp"; FPN, section 4.2), or ViTDet's (arXiv 2203.16527,
            appendix A.2) four convolutions and one such layer, with LayerNorm in it and in the mask head, and one
            more convolution in the proposal network ("conv").
        representation: width of the fully connected layers.
        mask_channels: width of the mask head.
        samples: proposals that training takes of an image; 512 with a pyramid (FPN, section 5.2).
        anchor_sizes: px, for each level. By default 8 strides with R-CNNs (32 to 512 px at strides 4 to 64; FPN,
            section 4.1), and see `RetinaHead`.
        anchor_scale: of the sizes by default; less for objects that are small in images of few px.
        detections, score_threshold, nms_threshold: what evaluation keeps of an image; detectron2's and torchvision's
            numbers for COCO.

    Raises:
        ValueError: an unknown kind; sizes of anchors for another number of levels.
    """
    if kind not in get_args(DetectorKind):
        raise ValueError(f"detector kind {kind!r} is none of {', '.join(get_args(DetectorKind))}")
    channels, strides = trunk.channels, trunk.strides
    kept = {"score_thresh": score_threshold, "nms_thresh": nms_threshold, "detections_per_img": detections}
    if kind == "retinanet":
        anchor_sizes = anchor_sizes or scaled_sizes(retina_levels(strides), RETINA_SIZES, anchor_scale)
        head = RetinaHead(channels, strides, classes, anchor_sizes, detections, score_threshold, nms_threshold)
        return Detector(trunk, head, mean, std)
    anchor_sizes = anchor_sizes or scaled_sizes([*strides, 2 * strides[-1]], (8,), anchor_scale)
    rpn = _proposal_network(channels, strides, anchor_sizes, depth=2 if box_head == "conv" else 1)
    norm = ChannelNorm if box_head == "conv" else None

    def box_layers() -> nn.Module:
        if norm is None:
            return TwoMLPHead(channels * 7 * 7, representation)
        return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [representation], norm_layer=norm)

    masks: dict[str, Any] = {}
    if "mask" in kind:
        masks["mask_roi_pool"] = _pool(strides, 14)
        masks["mask_head"] = MaskRCNNHeads(channels, [mask_channels] * 4, dilation=1, norm_layer=norm)
        masks["mask_predictor"] = FloatMaskPredictor(mask_channels, mask_channels, classes + 1)
    if "cascade" in kind:
        roi_heads = CascadeHeads(_pool(strides, 7), box_layers, representation, classes, **kept, **masks)
    else:
        predictor = FloatBoxPredictor(representation, classes + 1)
        # Foreground from IoU 0.5 on; the sampler is replaced by one with seeds.
        matching = {"fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": 0, "positive_fraction": 0.0}
        roi_heads = RoIHeads(
            _pool(strides, 7), box_layers(), predictor, **matching, bbox_reg_weights=None, **kept, **masks
        )
    return Detector(trunk, RegionHead(channels, rpn, roi_heads, samples), mean, std)


def head_multiply_adds(detector: Detector, size: tuple[int, int]) -> float:
    """Multiply-adds of a detector's head for one training image of a size, forward: an estimate.

    Matrix products and convolutions, as torch counts them, of dense layers on all levels, of box layers on as many
    proposals as training takes, and of the mask layers on the most that may be positive. Fewer are where an image has
    few objects; RoIAlign, matching and NMS are not counted. Nothing is computed: the layers run on shapes alone. The
    trunk's come on top.

    Args:
        detector: of any kind.
        size: (height, width) of the padded image.
    """
    head = copy.deepcopy(detector.head).to("meta")
    grids = [(size[0] // stride, size[1] // stride) for stride in detector.trunk.strides]
    maps = [torch.empty(1, detector.trunk.channels, *grid, device="meta") for grid in grids]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head.learned_layers(maps)
    return counter.get_total_flops() / 2


def _proposal_network(channels: int, strides: Sequence[int], anchor_sizes: AnchorSizes, depth: int) -> ProposalNetwork:
    """Numbers of Faster R-CNN's section 3.1 and 3.3 and FPN's 4.1, as in torchvision."""
    levels = [*strides, 2 * strides[-1]]
    anchors = LevelAnchors(levels, anchor_sizes)
    return ProposalNetwork(
        anchors,
        FloatRPNHead(channels, anchors.num_anchors_per_location()[0], depth),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=0,  # the sampler is replaced by one with seeds
        positive_fraction=0.0,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )


def _pool(strides: Sequence[int], cells: int) -> MultiScaleRoIAlign:
    """RoIAlign to cells x cells from the map that suits each box's size (FPN, equation 1: 224 px at stride 16).

    torchvision's infers strides from the first batch, as powers of 2 of the size inside the padding: not those of
    patch 14, and wrong for good where that batch is mostly padding.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], cells, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(strides) - 1, canonical_scale=14 * strides[0], canonical_level=0)
    return pool
