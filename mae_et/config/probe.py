"""The configuration of scores of a frozen encoder: linear probes and nearest neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from mae_et.config.finetune import ClassifierConfig, LabelledDataConfig, LabelledOptimConfig, TestingConfig
from mae_et.config.sections import Choices, Ranges, RunConfig


@dataclass
class GridConfig:
    """The `grid` protocol: many heads on cached features, at DINOv2's learning rates."""

    rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    )  # learning rates per 256 images
    layers: int = 4  # heads see the last block, and so many last blocks side by side
    batch: int = 256
    epochs: int = 50
    least_steps: int = 1000  # more epochs where there are fewer steps
    standardise: bool = True  # features to zero mean and unit deviation, as the BatchNorm of MAE's probe; DINOv2: false
    holdout: float = 0.2  # share of train that chooses among heads; the choice is then trained on all of it

    RANGES: ClassVar[Ranges] = {
        "batch": (1, math.inf, True),
        "epochs": (1, math.inf, True),
        "layers": (1, math.inf, True),
        "least_steps": (1, math.inf, True),
        "holdout": (0, 0.9, False),
    }


@dataclass
class NeighboursConfig:
    """Weighted nearest neighbours."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07

    RANGES: ClassVar[Ranges] = {"temperature": (0, math.inf, False)}


@dataclass
class ProbeConfig(RunConfig):
    """Everything that decides a probe. The defaults are MAE's linear probing of ViT-B on ImageNet."""

    task: str = "probe"
    checkpoint: str | None = None  # as of fine-tuning; required
    protocol: str = "mae"  # mae, grid, logistic
    epochs: float = 90.0  # of `mae`
    model: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(pooling="cls", drop_path=0.0))
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    optim: LabelledOptimConfig = field(
        default_factory=lambda: LabelledOptimConfig(
            name="lars", batch=16384, base_lr=0.1, min_lr=0.0, warmup=10 / 90, weight_decay=0.0, layer_decay=None
        )
    )
    evaluation: TestingConfig = field(default_factory=TestingConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)

    PROGRAM: ClassVar[str] = "linear_probe.py"
    CHOICES: ClassVar[Choices] = {
        "task": ("probe",),
        "protocol": ("mae", "grid", "logistic"),
    }
    RANGES: ClassVar[Ranges] = {**RunConfig.RANGES, "epochs": (0, math.inf, False)}
