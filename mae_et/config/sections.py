"""Sections that every kind of run has, each with what it allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

# key: (lowest, highest, lowest itself allowed); every number must be finite besides. null is never checked.
Ranges = dict[str, tuple[float, float, bool]]
Choices = dict[str, tuple[str, ...]]

SOURCES = (
    *("folder", "list", "fashion_mnist", "cifar10", "cifar100", "flowers102"),
    *("stanford_dogs", "food101", "nabirds", "imagenet1k", "imagenet22k"),
)


@dataclass
class StageConfig:
    """One stage of a curriculum of your own."""

    end: float = 1.0
    bandwidth: Any = 224  # px, a number or [height, width]
    mask_ratio: float | None = None


@dataclass
class CurriculumConfig:
    """A published schedule by name, or stages of your own."""

    preset: str | None = "efficienttrain_pp"  # baseline, efficienttrain, efficienttrain_pp, efficienttrain_pp_deit
    stages: list[StageConfig] | None = None  # takes the place of the preset
    axis: str = "compute"  # of `stages`: compute or epoch
    floor: int | None = None  # first B of a preset at a final size of 224 px; null is the preset's own
    cost: str = "flops"  # flops, area, measured
    seconds: dict[str, float] = field(default_factory=dict)  # {"96": seconds per image} for cost: measured
    drop_last: bool = True  # leave out each pass's last partial batch

    CHOICES: ClassVar[Choices] = {"axis": ("compute", "epoch"), "cost": ("flops", "area", "measured")}
    RANGES: ClassVar[Ranges] = {"floor": (1, math.inf, True)}
    FREE_FORM: ClassVar[tuple[str, ...]] = ("seconds",)


@dataclass
class EngineConfig:
    """How steps are executed; none of it changes what is learned beyond rounding."""

    device: str = "auto"  # auto, cpu, cuda, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32
    compile: str = "auto"  # auto (on GPUs), always, never: torch.compile of each transformer block
    threads: int | None = None  # CPU threads of a rank; null leaves torch's choice
    max_skipped: int = 10  # steps in a row with non-finite gradients before the run stops

    CHOICES: ClassVar[Choices] = {
        "device": ("auto", "cpu", "cuda", "mps"),
        "precision": ("auto", "bf16", "fp16", "fp32"),
        "compile": ("auto", "always", "never"),
    }
    RANGES: ClassVar[Ranges] = {"threads": (1, math.inf, True), "max_skipped": (1, math.inf, True)}


@dataclass
class SavingConfig:
    """When to save a checkpoint, and how many to keep."""

    minutes: float | None = 15.0
    steps: int | None = None
    keep: int = 3

    RANGES: ClassVar[Ranges] = {
        "minutes": (0, math.inf, False),
        "steps": (1, math.inf, True),
        "keep": (1, math.inf, True),
    }


@dataclass
class TrackingConfig:
    """metrics.jsonl is always written; the rest is up to you."""

    every: int = 20  # steps between rows
    console: bool = True
    wandb: str = "disabled"  # online, offline, disabled
    project: str = "mae_et"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    pictures: bool = True
    picture_samples: int = 6

    CHOICES: ClassVar[Choices] = {"wandb": ("online", "offline", "disabled")}
    RANGES: ClassVar[Ranges] = {"every": (1, math.inf, True), "picture_samples": (1, 64, True)}


@dataclass
class RunConfig:
    """What every run has."""

    task: str = ""
    run: str = ""  # the run's folder; empty is runs/<name of the config file>
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    RANGES: ClassVar[Ranges] = {"seed": (0, 2**63 - 1, True)}
