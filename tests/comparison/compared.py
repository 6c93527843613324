"""Comparisons made by hand, for tests of what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_et.comparison.comparing import reached
from mae_et.comparison.runs import ComparedRun, Comparison, Point, StageSpan

SCORE = "eval/probe"
STAGES = (StageSpan("12", 0, 1), StageSpan("20", 1, 2), StageSpan("28", 2, 10))


def run(name: str, values: Sequence[float], group: str | None = None, seed: int = 0, **changes: Any) -> ComparedRun:
    """A run of cost 10 that was scored at costs 1, 2, 3, ..."""
    made = ComparedRun(
        name=name,
        path=Path("runs") / name,
        task="pretrain",
        group=group or name,
        seed=seed,
        status="complete",
        settings={},
        stages=(),
        curves={
            "train/loss": [(0.1 * step, 1 / step) for step in range(1, 101)],
            "train/lr": [(0.1 * step, 1e-3 * (1 - step / 100)) for step in range(1, 101)],
        },
        scores={SCORE: [Point(1.0 + index, score) for index, score in enumerate(values)]},
        total=10.0,
        pictures={},
        parent=None,
        spent={"compute": 1e13, "hours": 0.5, "images": 1000.0, "fraction": 1.0},
    )
    return replace(made, **changes)


def compare(*runs: ComparedRun, target: float, baseline: str | None = None, **changes: Any) -> Comparison:
    """Runs on the axis of compute, against the group of the first."""
    first = baseline or runs[0].group
    found = reached(runs, SCORE, first, target)
    return replace(Comparison("compute", "TFLOPs", SCORE, runs, first, (), found), **changes)
