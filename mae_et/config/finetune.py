"""The configurations of labelled training: fine-tuning, supervised training from scratch, and linear probes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mae_et.config.images import ImageDataConfig, NetworkConfig
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
class LabelledDataConfig(ImageDataConfig):
    """Labelled images: which of them train, choose and test, and how a worker crops them."""

    source: str = "imagenet1k"  # one of SOURCES; `data=cifar100` or `data=/my/folder` is short for source and root
    shots: int | None = None  # train on so many images a class; null takes all
    download: bool = True
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # area of RandomResizedCrop
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # aspect of RandomResizedCrop
    downsample: str = "resize"  # resize, lanczos, fourier, fourier_pixel0, bilinear, nearest
    repeats: int = 1  # repeated augmentation: views of an image within a batch

    CHOICES: ClassVar[Choices] = {
        "source": SOURCES,
        "downsample": ("resize", "lanczos", "fourier", "fourier_pixel0", "bilinear", "nearest"),
    }
    RANGES: ClassVar[Ranges] = {
        **ImageDataConfig.RANGES,
        "shots": (1, math.inf, True),
        "repeats": (1, math.inf, True),
    }
    PAIRS: ClassVar[tuple[str, ...]] = ("scale", "ratio")


@dataclass
class AugmentConfig:
    """What is done to training images and labels beyond the crop. The defaults are MAE's fine-tuning."""

    randaugment: bool = True
    magnitude: list[float] = field(default_factory=lambda: [9.0, 9.0])  # at u = 0 and u = 1 (EfficientTrain++: 0, 9)
    staircase: bool = False  # rounded down; EfficientTrain++'s scripts: true, with magnitude [0, 10]
    magnitude_std: float = 0.5
    erasing: float = 0.25  # probability of random erasing
    mixup: float = 0.8  # alpha; 0 is off
    cutmix: float = 1.0  # alpha; 0 is off
    mix_probability: float = 1.0  # of mixing a step's images at all
    switch_probability: float = 0.5  # of cutmix where both are on
    smoothing: float = 0.1  # of labels

    RANGES: ClassVar[Ranges] = {
        "magnitude_std": (0, math.inf, True),
        "erasing": (0, 1, True),
        "mixup": (0, math.inf, True),
        "cutmix": (0, math.inf, True),
        "mix_probability": (0, 1, True),
        "switch_probability": (0, 1, True),
        "smoothing": (0, 0.999999, True),
    }


@dataclass
class ClassifierConfig(NetworkConfig):
    """A network and its head."""

    pooling: str = "mean"  # of ViTs: mean of the patches, or cls
    drop_path_epochs: float | None = None  # the budget at which drop_path holds; it scales with the run's own
    head_std: float = 2e-5  # of the new head's weights

    CHOICES: ClassVar[Choices] = {"pooling": ("mean", "cls")}
    RANGES: ClassVar[Ranges] = {
        **NetworkConfig.RANGES,
        "drop_path_epochs": (0, math.inf, False),
        "head_std": (0, math.inf, False),
    }


@dataclass
class LabelledOptimConfig:
    """Batch, learning rate and optimizer. The defaults are MAE's fine-tuning of ViT-B."""

    name: str = "adamw"  # adamw, lamb, lars, sgd
    batch: int = 1024  # images per step over all ranks and accumulation steps
    accumulation: int = 1
    base_lr: float = 5e-4  # per 256 images
    lr: float | None = None  # peak learning rate; null is base_lr * batch / 256
    min_lr: float = 1e-6
    warmup: float = 0.05  # fraction of the budget
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adamw, lamb
    momentum: float = 0.9  # lars, sgd
    clip: float | None = None  # largest gradient norm; null does not clip
    layer_decay: float | None = 0.65  # learning rate of each layer over that of the next; null is one rate for all
    ema: float | None = None  # decay of a running average of the weights, which is then what is evaluated

    CHOICES: ClassVar[Choices] = {"name": ("adamw", "lamb", "lars", "sgd")}
    RANGES: ClassVar[Ranges] = {
        "batch": (1, math.inf, True),
        "accumulation": (1, math.inf, True),
        "base_lr": (0, math.inf, False),
        "lr": (0, math.inf, False),
        "min_lr": (0, math.inf, True),
        "warmup": (0, 0.999999, True),
        "weight_decay": (0, math.inf, True),
        "momentum": (0, 0.999999, True),
        "clip": (0, math.inf, False),
        "layer_decay": (0, 1, False),
        "ema": (0, 0.999999999, True),
    }
    PAIRS: ClassVar[tuple[str, ...]] = ("betas",)


@dataclass
class TestingConfig:
    """Accuracy during training on held-out images, and once on test images at the end."""

    every: float | None = 0.2  # fraction of the compute between looks at held-out images; null looks at the end only
    size: Any = None  # px, a number or [height, width]; null is the final B (FixRes: larger)
    crop_fraction: float = 0.875  # share of the resized image that the centre crop keeps
    follow_stage: bool = False  # during training, look at the stage's B in place of `size`
    batch: int = 256

    RANGES: ClassVar[Ranges] = {
        "every": (0, 1, False),
        "crop_fraction": (0, 1, False),
        "batch": (1, math.inf, True),
    }


@dataclass
class FinetuneConfig(RunConfig):
    """Everything that decides a run on labels. The defaults are MAE's end-to-end fine-tuning of ViT-B on ImageNet."""

    task: str = "finetune"
    checkpoint: str | None = None  # a run, a checkpoint of it, .pth, .safetensors, .onnx, timm/<name>; null: scratch
    epochs: float = 100.0  # the budget, in epochs at the final size
    budget: str | None = None  # in place of epochs: 400 epochs, 2e18 flops, 24 gpu_hours, 30 minutes, 1.5 hours, 2 days
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    curriculum: CurriculumConfig = field(default_factory=lambda: CurriculumConfig(preset="baseline"))
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optim: LabelledOptimConfig = field(default_factory=LabelledOptimConfig)
    evaluation: TestingConfig = field(default_factory=TestingConfig)

    PROGRAM: ClassVar[str] = "finetune.py"
    CHOICES: ClassVar[Choices] = {"task": ("finetune",)}
    RANGES: ClassVar[Ranges] = {**RunConfig.RANGES, "epochs": (0, math.inf, False)}
