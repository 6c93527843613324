"""The configurations of detection and of semantic segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mae_et.config.finetune import LabelledOptimConfig
from mae_et.config.images import ImageDataConfig, NetworkConfig
from mae_et.config.sections import Choices, Ranges, RunConfig

DETECTORS = ("retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn")


@dataclass
class TrunkConfig(NetworkConfig):
    """A network that gives maps of features."""

    channels: int = 256  # of every map of the pyramid
    window: int | None = None  # of plain ViTs, in patches: blocks attend within windows; null attends to all patches
    global_blocks: int = 4  # of plain ViTs with windows: so many blocks attend to all patches
    taps: str = "last"  # of plain ViTs: the pyramid is made of the last block's map, or of maps spread over the depth
    checkpointing: bool = False  # compute blocks again in the backward pass, for less memory
    frozen_norm: bool = True  # of timm's networks: BatchNorm keeps its statistics and weights

    CHOICES: ClassVar[Choices] = {"taps": ("last", "spread")}
    RANGES: ClassVar[Ranges] = {
        **NetworkConfig.RANGES,
        "channels": (8, math.inf, True),
        "window": (1, math.inf, True),
        "global_blocks": (1, math.inf, True),
    }


@dataclass
class DenseOptimConfig(LabelledOptimConfig):
    """Batch, learning rate and optimizer; published recipes give the learning rate as it is: `lr`."""

    batch: int = 16
    base_lr: float = 1.6e-3  # per 256 images: 1e-4 at 16
    min_lr: float = 0.0
    warmup: float = 0.01
    layer_decay: float | None = 0.7
    decay: str = "cosine"  # after the warm-up: cosine, linear, steps (a tenth at each of `drops`)
    drops: list[float] = field(default_factory=lambda: [8 / 12, 11 / 12])  # fractions of the budget

    CHOICES: ClassVar[Choices] = {**LabelledOptimConfig.CHOICES, "decay": ("cosine", "linear", "steps")}


@dataclass
class DetectionDataConfig(ImageDataConfig):
    """Images with boxes, maybe with masks."""

    source: str = "coco"  # coco (a JSON per split), instances (a folder of instance masks); `data=/folder` is its root
    names: list[str] = field(
        default_factory=list
    )  # of the class of `instances`; of coco, how its categories are numbered
    size: Any = 1024  # px of the square (or [height, width]) that images are padded to
    scale: list[float] = field(default_factory=lambda: [0.1, 2.0])  # large-scale jitter: of the scale that just fits

    CHOICES: ClassVar[Choices] = {"source": ("coco", "instances")}
    PAIRS: ClassVar[tuple[str, ...]] = ("scale",)


@dataclass
class DetectorConfig(TrunkConfig):
    """A network and a detector's head on it. The defaults are ViTDet's where there is a choice."""

    head: str = "mask_rcnn"  # retinanet, faster_rcnn, mask_rcnn, cascade_rcnn, cascade_mask_rcnn
    box_head: str = "mlp"  # of R-CNNs: mlp (2 layers), conv (4 convolutions and a layer)
    representation: int = 1024  # width of the box head
    mask_channels: int = 256  # width of the mask head
    anchor_scale: float = 1.0  # of anchors over the published ones, which begin at 32 px
    samples: int = 512  # of R-CNNs: proposals that training takes of an image

    CHOICES: ClassVar[Choices] = {**TrunkConfig.CHOICES, "head": DETECTORS, "box_head": ("mlp", "conv")}
    RANGES: ClassVar[Ranges] = {
        **TrunkConfig.RANGES,
        "representation": (1, math.inf, True),
        "mask_channels": (1, math.inf, True),
        "anchor_scale": (0, math.inf, False),
        "samples": (4, math.inf, True),
    }


@dataclass
class DetectionTestingConfig:
    """AP during training on held-out images, and once on test images at the end."""

    every: float | None = 0.25  # fraction of the compute between looks at held-out images; null looks at the end only
    size: Any = None  # px, a number or [height, width] that images are fitted into; null is the training size
    batch: int = 4
    score: float = 0.05  # least score of a detection
    overlap: float = 0.5  # IoU above which the lower of two detections of a class goes
    most: int = 100  # detections of an image
    shown: float = 0.5  # least score of a detection on pictures
    drawn: int = 4  # images on a picture

    RANGES: ClassVar[Ranges] = {
        "every": (0, 1, False),
        "batch": (1, math.inf, True),
        "score": (0, 1, True),
        "overlap": (0, 1, True),
        "most": (1, math.inf, True),
        "shown": (0, 1, True),
        "drawn": (1, 64, True),
    }


@dataclass
class DetectConfig(RunConfig):
    """Everything that decides a detector's run."""

    task: str = "detect"
    checkpoint: str | None = None  # a run, a checkpoint of it, .pth, .safetensors, .onnx, timm/<name>; null: scratch
    epochs: float = 12.0  # the budget
    steps: int | None = None  # in place of epochs
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)
    optim: DenseOptimConfig = field(default_factory=DenseOptimConfig)
    evaluation: DetectionTestingConfig = field(default_factory=DetectionTestingConfig)

    PROGRAM: ClassVar[str] = "-m mae_et detect"
    CHOICES: ClassVar[Choices] = {"task": ("detect",)}
    RANGES: ClassVar[Ranges] = {**RunConfig.RANGES, "epochs": (0, math.inf, False), "steps": (1, math.inf, True)}


@dataclass
class SegmentationDataConfig(ImageDataConfig):
    """Images with a class for every pixel."""

    source: str = "pairs"  # pairs (folders of images and of index masks), ade20k, coco_panoptic
    masks: str = "masks"  # of pairs: name of the folder of masks
    binary: bool = False  # of pairs: every value above 0 is class 1
    ignore: int = 255  # of pairs: the value of pixels without a class
    names: list[str] = field(default_factory=list)  # of the classes of pairs; else classes.txt in the root
    size: Any = 512  # px of the crop, a number or [height, width]
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])  # of the short side, over that of the crop
    category_share: float = 0.75  # of a crop that one class may take; 1 takes any crop
    photometric: bool = True  # brightness, contrast, saturation and hue

    CHOICES: ClassVar[Choices] = {"source": ("pairs", "ade20k", "coco_panoptic")}
    RANGES: ClassVar[Ranges] = {
        **ImageDataConfig.RANGES,
        "ignore": (0, 65535, True),
        "category_share": (0, 1, False),
    }
    PAIRS: ClassVar[tuple[str, ...]] = ("scale",)


@dataclass
class SegmenterConfig(TrunkConfig):
    """A network and a segmentation head on it."""

    head: str = "upernet"  # upernet, linear (on the network's plain map)
    taps: str = "spread"
    head_channels: int = 512  # width of UperNet
    norm: str = "group"  # of the head: group; batch, as published recipes have it, synchronised over GPUs
    auxiliary: float = 0.0  # weight of the loss of a second head at stride 16; 0.4 in published recipes
    dropout: float = 0.1

    CHOICES: ClassVar[Choices] = {**TrunkConfig.CHOICES, "head": ("upernet", "linear"), "norm": ("group", "batch")}
    RANGES: ClassVar[Ranges] = {
        **TrunkConfig.RANGES,
        "head_channels": (1, math.inf, True),
        "auxiliary": (0, math.inf, True),
        "dropout": (0, 0.999999, True),
    }


@dataclass
class SegmentationTestingConfig:
    """mIoU during training on held-out images, and once on test images at the end."""

    every: float | None = 0.25  # as of detection
    short_side: int | None = None  # px that an image's short side is resized to; null is that of the crop
    longest_side: int | None = None  # px that its long side may have at most; null is any
    window: Any = None  # px of a sliding window; null is the crop, "whole" shows images whole
    stride: float = 0.667  # of the window, as a share of its sides
    scales: list[float] = field(default_factory=lambda: [1.0])  # of the multi-scale test at the end
    flip: bool = False  # of that test, too
    drawn: int = 4  # images on a picture

    RANGES: ClassVar[Ranges] = {
        "every": (0, 1, False),
        "short_side": (1, math.inf, True),
        "longest_side": (1, math.inf, True),
        "stride": (0, 1, False),
        "drawn": (1, 64, True),
    }


@dataclass
class SegmentConfig(RunConfig):
    """Everything that decides a segmentation's run."""

    task: str = "segment"
    checkpoint: str | None = None  # as of detection
    epochs: float = 100.0  # the budget
    steps: int | None = None  # in place of epochs
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    optim: DenseOptimConfig = field(default_factory=lambda: DenseOptimConfig(decay="linear"))
    evaluation: SegmentationTestingConfig = field(default_factory=SegmentationTestingConfig)

    PROGRAM: ClassVar[str] = "-m mae_et segment"
    CHOICES: ClassVar[Choices] = {"task": ("segment",)}
    RANGES: ClassVar[Ranges] = DetectConfig.RANGES
