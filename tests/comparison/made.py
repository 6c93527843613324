"""Folders of runs with scores to order: the real configuration, plan and metrics, and nothing trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mae_et.config import FinetuneConfig, PretrainConfig, dump_config, load_config
from mae_et.curriculum.plan import Plan
from mae_et.engine.meter import axes
from mae_et.engine.run_folder import RunFolder
from mae_et.exchange.weights import Origin
from mae_et.planning import build_plan, plan_of
from mae_et.recording import lineage_row
from mae_et.tracking import JsonlTracker
from mae_et.tracking.run_id import run_id_of
from tests.end_to_end.tiny import TINY

IMAGES = 40  # five steps a pass


@cache  # reading a configuration takes longer than all the rest
def planned(changes: tuple[str, ...]) -> tuple[Plan, dict[bool, str]]:
    """A plan, and the configurations of pretraining and of fine-tuning (True) that are said to have it."""
    config = load_config(None, [*TINY, "curriculum=baseline", "epochs=8", "run=RUN", *changes], PretrainConfig)
    tuned = load_config(None, ["run=RUN", "seed=3", "data.size=16"], FinetuneConfig)
    return build_plan(config, IMAGES), {False: dump_config(config), True: dump_config(tuned)}


def make_run(
    path: Path,
    scores: Mapping[int, float],
    *changes: str,
    score: str = "eval/probe",
    until: int | None = None,
    state: str | None = "complete",
    seconds: float = 1.0,
    parent: Origin | None = None,
) -> Path:
    """A run of eight passes at one size, or as `changes` have it.

    Args:
        path: of its folder.
        scores: by step.
        changes: of the configuration.
        score: its name.
        until: the last step, in place of the plan's.
        state: as in status.json; None writes none.
        seconds: of a step.
        parent: what it began with: it is one of fine-tuning then.
    """
    tuned = parent is not None or score.startswith("val/")
    seed = next((change for change in changes if change.startswith("seed=")), "seed=3")
    plan, texts = planned(tuple(change for change in changes if change != seed))
    folder = RunFolder(path)
    text = texts[tuned].replace("run: RUN\n", f"run: {path}\n").replace("seed: 3\n", f"seed: {seed[5:]}\n")
    folder.config_path.write_text(text if parent is None else text.replace("point: null\n", f"point: {parent.path}\n"))
    folder.plan_path.write_text(json.dumps(plan.to_dict()))
    run_id_of(path)
    tracker = JsonlTracker(folder.metrics_path)
    if parent is not None:
        tracker.log(lineage_row(parent), 0)
    for step in range(1, (plan.total_steps if until is None else until) + 1):
        row: dict[str, Any] = axes(plan, SimpleNamespace(step=step, seconds=seconds * step))  # pyright: ignore[reportArgumentType]
        stage = plan.at(step - 1).stage.index
        tracker.log({**row, "train/loss": 1 / step, "stage/index": stage}, step)
        if step in scores:
            tracker.log({**row, score: scores[step]}, step)
    tracker.finish(0)
    if state is not None:
        folder.status_path.write_text(json.dumps({"state": state, "saved_step": None, "reason": None}))
    return path


def plan_in(path: Path) -> Plan:
    """The plan of a folder."""
    return plan_of((path / "plan.json").read_text())


def checkpoint_of(path: Path, step: int, **config: Any) -> Origin:
    """What a run that begins with another's checkpoint writes down of it."""
    checkpoint = path / "checkpoints" / f"step-{step:08d}"
    return Origin("run", str(checkpoint), "0" * 64, step, run_id_of(path), {"task": "pretrain", **config})


def flops_before(path: Path, step: int) -> float:
    """What a folder's plan has spent before a step."""
    flops = plan_in(path).flops_before(step)
    assert flops is not None
    return flops
