"""The best of every score and what it had cost: by the rows of metrics.jsonl, whatever W&B was sent before."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mae_et.tracking import JsonlTracker, MultiTracker, WandbTracker, truncate_metrics
from mae_et.tracking.best import BestScores


def row(step: int, **scores: float) -> dict[str, float]:
    axes = {"step": step, "compute/fraction": step / 40, "compute/flops": 1e12 * step, "time/hours": step / 8}
    return {**axes, **{name.replace("_", "/"): value for name, value in scores.items()}}


def test_the_best_of_each_score_with_its_costs():
    best = BestScores([row(10, eval_probe=0.5, val_top1=0.2), row(20, eval_probe=0.4, val_top1=0.3)])
    assert best.summary == {
        **{"best/eval/probe": 0.5, "best/eval/probe_at_flops": 1e13},
        **{"best/eval/probe_at_hours": 1.25, "best/eval/probe_at_fraction": 0.25},
        **{"best/val/top1": 0.3, "best/val/top1_at_flops": 2e13},
        **{"best/val/top1_at_hours": 2.5, "best/val/top1_at_fraction": 0.5},
    }
    assert best.add(row(30, eval_probe=0.5)) == {}  # the first of equal ones was the cheaper
    assert best.add(row(40, eval_probe=0.6))["best/eval/probe_at_flops"] == 4e13


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf, "0.9"])
def test_what_is_no_score_is_no_best(value):
    assert BestScores([{"eval/probe": value, "train/loss": 0.1, "test/top1": 0.9}]).summary == {}


def test_a_score_without_axes_has_no_costs():
    assert BestScores([{"eval/probe": 0.5}]).summary == {"best/eval/probe": 0.5}


def test_rows_that_a_resumed_run_takes_back_do_not_count(tmp_path, wandb_server):
    pytest.importorskip("wandb")
    metrics = tmp_path / "metrics.jsonl"

    def start() -> MultiTracker:
        return MultiTracker([JsonlTracker(metrics), WandbTracker("online", tmp_path, metrics=metrics)])

    def summary() -> dict[str, Any]:
        (run,) = wandb_server.runs.values()
        return run["summary"]

    first = start()
    for step, score in ((10, 0.5), (20, 0.4), (30, 0.9)):
        first.log(row(step, eval_probe=score), step)
    first.finish(1)
    assert (summary()["best/eval/probe"], summary()["best/eval/probe_at_hours"]) == (0.9, 3.75)
    assert summary()["eval/probe"] == {"max": 0.9, "last": 0.9}

    truncate_metrics(metrics, 20)
    second = start()
    second.log(row(30, eval_probe=0.45), 30)
    second.finish(0)
    assert (summary()["best/eval/probe"], summary()["best/eval/probe_at_hours"]) == (0.5, 1.25)
    assert summary()["best/eval/probe_at_flops"] == 1e13
    assert summary()["eval/probe"]["last"] == 0.45
