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
    *("stanford_dogs", "food101", "nabirds", "imagenet1k", "imagenet22k", "packed"),
)


@dataclass
class StageConfig:
    """One stage of a curriculum of your own."""

    end: float = 1.0
    bandwidth: Any = 224  # px, a number or [height, width]
    mask_ratio: float | None = None  # null is the run's
    visible: int | None = None  # patches that stay visible, in place of a mask ratio
    batch_scale: int = 1  # the batch in multiples of optim.batch
    magnitude: Any = None  # of augmentation, a number or [at the start, at the end]; null follows the run's
    low_pass: float | None = None  # radius in cycles per image of a filter that keeps lower frequencies
    replay: int | None = None  # steps on replayed images after each on fresh ones; null is replay.ratio


@dataclass
class GrowthConfig:
    """B grows by a fixed step every so many epochs, to the final size."""

    first: int | None = None  # px; null leaves the curriculum to the preset or the stages
    step: int = 32  # px
    every: float = 5.0  # epochs

    RANGES: ClassVar[Ranges] = {
        "first": (1, math.inf, True),
        "step": (1, math.inf, True),
        "every": (0, math.inf, False),
    }


@dataclass
class CurriculumConfig:
    """A published schedule by name, or stages of your own."""

    preset: str | None = "efficienttrain_pp"  # see mae_et/curriculum/presets.py
    stages: list[StageConfig] | None = None  # takes the place of the preset
    growth: GrowthConfig = field(default_factory=GrowthConfig)  # likewise, once it has a first B
    axis: str = "compute"  # of `stages`: compute, epoch or step
    size: Any = None  # final B that `stages` are for; a run of another final size takes them in proportion
    floor: int | None = None  # first B of a preset at a final size of 224 px; null is the preset's own
    early_large_batch: bool = False  # batches of 2 or 4 times optim.batch where B is small enough
    lr_cap: float | None = None  # that larger batches may raise the peak learning rate to; they need it
    more_tokens: bool = False  # let larger batches have more patches than a batch at the final size
    cost: str = "flops"  # flops, area, measured
    seconds: dict[str, float] = field(default_factory=dict)  # {"96": seconds per image} for cost: measured
    drop_last: bool = True  # leave out each pass's last partial batch

    CHOICES: ClassVar[Choices] = {"axis": ("compute", "epoch", "step"), "cost": ("flops", "area", "measured")}
    RANGES: ClassVar[Ranges] = {"floor": (1, math.inf, True), "lr_cap": (0, math.inf, False)}
    FREE_FORM: ClassVar[tuple[str, ...]] = ("seconds",)


@dataclass
class ReplayConfig:
    """Steps on images decoded before, where the data path is slower than the model."""

    ratio: Any = 0  # steps on replayed images after each on fresh ones; auto: as many as measured times call for
    gigabytes: float = 4.0  # of memory for the images, over all ranks
    most: int = 3  # that auto may choose

    RANGES: ClassVar[Ranges] = {"gigabytes": (0, math.inf, False), "most": (1, math.inf, True)}


@dataclass
class ProtocolConfig:
    """A race against the clock: the schedule is planned for the whole budget, and stops when time is up."""

    wall_hours: float | None = None  # of training, pauses for scores and checkpoints left out; null is no limit
    gpus: int | None = None  # CUDA devices that the protocol is for, no other will do; null takes any machine

    RANGES: ClassVar[Ranges] = {"wall_hours": (0, math.inf, False), "gpus": (1, math.inf, True)}


@dataclass
class SelectionConfig:
    """Which samples a pass over the data leaves out; the budget stays, so that there are more passes."""

    method: str = "none"  # none, infobatch
    ratio: float = 0.5  # probability of leaving out a sample whose last loss is below the mean
    anneal: float = 0.125  # share of the budget, at its end, in which nothing is left out

    CHOICES: ClassVar[Choices] = {"method": ("none", "infobatch")}
    RANGES: ClassVar[Ranges] = {"ratio": (0, 0.999999, True), "anneal": (0, 1, True)}


@dataclass
class CalibrationConfig:
    """How long a step takes here, for budgets in time and costs that are measured: see `python -m mae_et calibrate`."""

    file: str | None = None  # a saved calibration; null measures where it is needed. `calibration=FILE` is short for it
    seconds: float = 6.0  # of measured training for each stage, eight steps at least
    rounds: int = 5  # turns in which the stages are measured, so that a machine's moods hit all of them alike

    RANGES: ClassVar[Ranges] = {"seconds": (0, math.inf, False), "rounds": (2, math.inf, True)}


@dataclass
class EngineConfig:
    """How steps are executed; none of it changes what is learned beyond rounding."""

    device: str = "auto"  # auto, cpu, cuda, mps
    precision: str = "auto"  # auto, bf16, fp16, fp32
    compile: str = "auto"  # auto (on GPUs), always, never: torch.compile of each transformer block
    threads: int | None = None  # CPU threads of a rank; null leaves torch's choice
    max_skipped: int = 10  # steps in a row with a non-finite loss or gradient before the run stops
    parallel: str = "ddp"  # ddp: a whole model on every rank; fsdp: shares of weights, gradients and moments
    timeout_minutes: float = 30.0  # how long ranks wait for each other; pauses of the main rank for scores included
    requeue: bool = True  # in a SLURM job, SIGUSR1 saves and asks SLURM to start the job again

    CHOICES: ClassVar[Choices] = {
        "device": ("auto", "cpu", "cuda", "mps"),
        "precision": ("auto", "bf16", "fp16", "fp32"),
        "compile": ("auto", "always", "never"),
        "parallel": ("ddp", "fsdp"),
    }
    RANGES: ClassVar[Ranges] = {
        "threads": (1, math.inf, True),
        "max_skipped": (1, math.inf, True),
        "timeout_minutes": (0, 10_000, False),
    }


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
    alerts: bool = True  # of W&B, to people, where an error ends the run or its disk is full
    artifacts: bool = False  # whether W&B also gets the last checkpoint, once the run is over
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
