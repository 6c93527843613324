"""The configuration of a search for a curriculum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mae_et.config.sections import Choices, Ranges, RunConfig


@dataclass
class TuningConfig:
    """The short fine-tuning of `score: finetune`."""

    recipe: str | None = None  # a recipe of fine-tuning; its checkpoint and images are the search's
    overrides: list[str] = field(default_factory=list)  # key=value, e.g. epochs=1


@dataclass
class SearchConfig(RunConfig):
    """Everything that decides a search. What is set in `engine`, `saving` and `tracking` holds for its trainings.

    The defaults are EfficientTrain++'s Algorithm 2 with what the paper says of it; it leaves N and the candidates open.
    """

    task: str = "search"
    recipe: str | None = None  # YAML file of the pretraining, fine-tuning or supervised training to find one for
    overrides: list[str] = field(default_factory=list)  # key=value for it: a smaller model, fewer epochs, data.root
    algorithm: str = "sequential"  # sequential (Algorithm 2: fixed compute), greedy (Algorithm 1: accuracy is kept)
    stages: int = 5  # N, of equal shares of the axis; the last is at the final size
    axis: str = "auto"  # compute, epoch, step; auto: compute for sequential, epoch for greedy
    bandwidths: list[Any] = field(default_factory=lambda: [96, 128, 160, 192, 224])  # px; numbers or [height, width]
    mask_ratios: list[float] = field(default_factory=list)  # with each B; empty is the recipe's
    batch_scales: list[int] = field(default_factory=list)  # with each B; empty is 1. Above 1 needs curriculum.lr_cap
    objective: str = "acc"  # acc, loss_time (loss * T^alpha), error_time ((1 - acc) * T^alpha)
    alpha: float = 1.0  # T: planned compute in equivalent epochs, all but constant for sequential on the compute axis
    score: str = "probe"  # probe, knn, finetune, loss of pretraining; top1, loss of training on labels
    tuning: TuningConfig = field(default_factory=TuningConfig)
    settle: float = 0.05  # T_ft / T: share of the axis at the final size before a score (sequential)
    margin: float = 0.0  # by which a score may stay below the final size's (greedy)
    holdout: float = 0.1  # share of train, of each class, that scores and does not train
    images: int | None = None  # train on so many of the rest, drawn once; null takes all
    seeds: list[int] = field(default_factory=lambda: [0])  # of the trainings; a score is the mean over them
    keep_checkpoints: bool = False  # also of trainings that nothing will continue

    PROGRAM: ClassVar[str] = "-m mae_et search"
    CHOICES: ClassVar[Choices] = {
        "task": ("search",),
        "algorithm": ("sequential", "greedy"),
        "axis": ("auto", "compute", "epoch", "step"),
        "objective": ("acc", "loss_time", "error_time"),
        "score": ("probe", "knn", "finetune", "loss", "top1"),
    }
    RANGES: ClassVar[Ranges] = {
        **RunConfig.RANGES,
        "stages": (2, 100, True),
        "alpha": (0, math.inf, True),
        "settle": (0, 1, False),
        "margin": (0, math.inf, True),
        "holdout": (0, 0.9, False),
        "images": (1, math.inf, True),
    }
