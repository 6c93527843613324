"""Runs of any kind as comparisons see them: what they were told, what they spent, and how they scored on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mae_et.comparison.speedup import Reached

AXES = {"compute": "compute/flops", "hours": "time/hours", "images": "images_seen", "fraction": "compute/fraction"}
"""What runs are compared along, and the name that metrics have for it."""


@dataclass(frozen=True)
class StageSpan:
    """A stage of a curriculum on the axis.

    Attributes:
        label: its B, as plans print it.
        begin, end: on the axis of the comparison.
    """

    label: str
    begin: float
    end: float


@dataclass(frozen=True)
class Point:
    """A score and what had been spent by then, on the axis of the comparison; the more the better."""

    cost: float
    score: float


@dataclass(frozen=True)
class ComparedRun:
    """A run, on the axis of a comparison.

    Attributes:
        name: unique, for people.
        path: of its folder.
        task: pretrain, finetune, probe, knn, detect or segment.
        group: runs of one group differ in their seed alone.
        seed: of the run.
        status: complete, running, interrupted or failed.
        settings: its configuration, flat, under dotted keys; that of the run it began with under "checkpoint.".
        stages: empty where the task has one stage.
        curves: every metric that was logged, by name, as (cost, value) in order of cost; finite values alone.
        scores: those of them that tell how good the run is, accuracies in [0, 1].
        total: spent so far.
        pictures: of stages, by name: "stage 1, B=12" -> PNG, in order of stages.
        parent: id of the run whose network it began with.
        spent: so far, by the name of the axis, without a scale.
    """

    name: str
    path: Path
    task: str
    group: str
    seed: int
    status: str
    settings: dict[str, Any]
    stages: tuple[StageSpan, ...]
    curves: dict[str, list[tuple[float, float]]]
    scores: dict[str, list[Point]]
    total: float
    pictures: dict[str, Path]
    parent: str | None
    spent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Runs on one axis.

    Attributes:
        axis: compute, hours, images or fraction.
        unit: of the axis, already scaled into: "TFLOPs", "hours", "images", or "" of a fraction.
        score: name of the score that is compared.
        runs: in the order given.
        baseline: the group that speed-ups are against.
        differences: (dotted key, value of each run as text), of the keys that differ.
        reached: one a group.
        notes: what a reader must know of it, a sentence each.
    """

    axis: str
    unit: str
    score: str
    runs: tuple[ComparedRun, ...]
    baseline: str
    differences: tuple[tuple[str, tuple[str, ...]], ...]
    reached: tuple[Reached, ...]
    notes: tuple[str, ...] = ()
