"""The configuration of a pretraining run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mae_et.config.sections import (
    SOURCES,
    CalibrationConfig,
    Choices,
    CurriculumConfig,
    ProtocolConfig,
    Ranges,
    ReplayConfig,
    RunConfig,
    SelectionConfig,
)


@dataclass
class DataConfig:
    """Where images come from and how a worker crops them."""

    source: str = "imagenet1k"  # one of SOURCES
    root: str | None = None  # folder, list file, or URL of a packed store; null takes the source's usual place
    split: str = "train"
    images: int | None = None  # number of images, for `plan` without the data; null counts them
    download: bool = True
    size: Any = 224  # final B in px, a number or [height, width]
    channels: int = 3
    mean: list[float] | None = None  # per channel, of pixels in [0, 1]; null takes ImageNet's for 3 channels
    std: list[float] | None = None
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area of RandomResizedCrop
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # aspect of RandomResizedCrop
    flip: bool = True
    downsample: str = "resize"  # resize, lanczos, fourier, fourier_pixel0, bilinear, nearest
    decoder: str = "torchvision"  # torchvision; turbojpeg: the crop alone; turbojpeg_scaled: at 1/2 to 1/8 where it can
    max_pixels: int = 100_000_000  # larger images are refused from their header
    max_bad: float = 0.01  # share of the images that may be unreadable; they are replaced, and listed in the run folder
    workers: int | None = None  # processes per rank; null chooses by device and cores
    timeout_minutes: float = 15.0  # that a worker may take for a batch before the run stops

    CHOICES: ClassVar[Choices] = {
        "source": SOURCES,
        "downsample": ("resize", "lanczos", "fourier", "fourier_pixel0", "bilinear", "nearest"),
        "decoder": ("torchvision", "turbojpeg", "turbojpeg_scaled"),
    }
    RANGES: ClassVar[Ranges] = {
        "images": (1, math.inf, True),
        "channels": (1, 3, True),
        "workers": (0, math.inf, True),
        "max_pixels": (1, math.inf, True),
        "max_bad": (0, 1, True),
        "timeout_minutes": (0, math.inf, False),
    }
    PAIRS: ClassVar[tuple[str, ...]] = ("scale", "ratio")


@dataclass
class ModelConfig:
    """The encoder by name, any of its numbers changed, and the decoder."""

    name: str = "vit_base"  # vit_tiny, vit_small, vit_base, vit_large, vit_huge
    patch_size: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    decoder: str = "mae"  # mae, crossmae: masked patches attend to encoded ones alone (arXiv 2401.14391)
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    inter_block: bool = True  # of crossmae: decoder blocks attend to mixtures of what all encoder blocks give
    prediction_ratio: float | None = None  # of crossmae: share of all patches that is predicted; null: all masked ones
    positions: str = "from_final"  # from_final, native, interp
    locality: bool = False  # of supervised training alone: true is refused here, with the reason

    CHOICES: ClassVar[Choices] = {
        "name": ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"),
        "decoder": ("mae", "crossmae"),
        "positions": ("from_final", "native", "interp"),
    }
    RANGES: ClassVar[Ranges] = {
        "patch_size": (1, math.inf, True),
        "width": (4, math.inf, True),
        "depth": (1, math.inf, True),
        "heads": (1, math.inf, True),
        "mlp_ratio": (0, math.inf, False),
        "decoder_width": (4, math.inf, True),
        "decoder_depth": (1, math.inf, True),
        "decoder_heads": (1, math.inf, True),
        "prediction_ratio": (0, 1, False),
    }


@dataclass
class TargetConfig:
    """What masked patches are asked for."""

    kind: str = "hog"  # hog, pixel, norm_pixel
    cell: int | None = None  # px; null is half a patch
    bins: int = 9

    CHOICES: ClassVar[Choices] = {"kind": ("hog", "pixel", "norm_pixel")}
    RANGES: ClassVar[Ranges] = {"cell": (1, math.inf, True), "bins": (1, math.inf, True)}


@dataclass
class OptimConfig:
    """Batch, learning rate and AdamW."""

    batch: int = 4096  # images per step over all ranks and accumulation steps
    accumulation: int = 1
    base_lr: float = 1.5e-4  # per 256 images
    lr: float | None = None  # peak learning rate; null is base_lr * batch / 256
    min_lr: float = 0.0
    warmup: float = 0.1  # fraction of the budget
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = None  # largest gradient norm; null does not clip

    RANGES: ClassVar[Ranges] = {
        "batch": (1, math.inf, True),
        "accumulation": (1, math.inf, True),
        "base_lr": (0, math.inf, False),
        "lr": (0, math.inf, False),
        "min_lr": (0, math.inf, True),
        "warmup": (0, 0.999999, True),
        "weight_decay": (0, math.inf, True),
        "clip": (0, math.inf, False),
    }
    PAIRS: ClassVar[tuple[str, ...]] = ("betas",)


@dataclass
class EvaluationConfig:
    """Scores of the frozen encoder on a labelled set, during pretraining and by `python -m mae_et evaluate`."""

    every: float | None = None  # fraction of the compute between scores; null does not score during pretraining
    source: str | None = None  # null takes data.source
    root: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    holdout: float | None = None  # share of train_split to score on in place of test_split: for choices between runs
    train_images: int | None = 10_000  # null takes all
    test_images: int | None = 2_000
    knn: list[int] = field(default_factory=lambda: [20])
    probe: bool = True
    pooling: str = "mean"  # mean or cls
    crop_fraction: float = 0.875  # share of the resized image that the centre crop keeps
    follow_stage: bool = False  # during pretraining, score at the stage's B in place of the final size

    CHOICES: ClassVar[Choices] = {"pooling": ("mean", "cls")}
    RANGES: ClassVar[Ranges] = {
        "every": (0, 1, False),
        "crop_fraction": (0, 1, False),
        "holdout": (0, 0.999999, False),
        "train_images": (2, math.inf, True),
        "test_images": (1, math.inf, True),
    }


@dataclass
class PretrainConfig(RunConfig):
    """Everything that decides a pretraining run. The defaults are the paper's ViT-B run."""

    task: str = "pretrain"
    epochs: float = 400.0  # the budget, in epochs at the final size
    budget: str | None = None  # in place of epochs: 400 epochs, 2e18 flops, 24 gpu_hours, 30 minutes, 1.5 hours, 2 days
    mask_ratio: float = 0.75
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    PROGRAM: ClassVar[str] = "pretrain.py"
    CHOICES: ClassVar[Choices] = {"task": ("pretrain",)}
    RANGES: ClassVar[Ranges] = {
        **RunConfig.RANGES,
        "epochs": (0, math.inf, False),
        "mask_ratio": (0, 0.999999, True),
    }
