"""configs/sweep/: every run that an agent of W&B would start parses, validates and plans."""

from __future__ import annotations

import os
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from mae_et.config import load_config
from mae_et.config.sections import TrackingConfig
from mae_et.planning import build_plan
from mae_et.tracking.best import BestScores

REPOSITORY = Path(__file__).resolve().parents[1]
SWEEPS = sorted((REPOSITORY / "configs" / "sweep").glob("*.yaml"))
IMAGES = 60_000


def runs_of(sweep: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """What a server sends an agent for each run of a grid."""
    names = list(sweep["parameters"])
    values = product(*(sweep["parameters"][name]["values"] for name in names))
    return [{name: {"value": value} for name, value in zip(names, run, strict=True)} for run in values]


def command_of(sweep: dict[str, Any], run: dict[str, dict[str, Any]]) -> list[str]:
    """What an agent starts, by W&B's own functions; `printf` stands for Python, and prints its arguments."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = utils.create_sweep_command_args({"args": run})
    values["interpreter"] = ["printf", r"%s\n"]
    values["program"] = [sweep["program"]]
    words: list[str] = []
    for word in utils.create_sweep_command(list(sweep["command"])):
        words += values[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return words


def started_by(sweep: dict[str, Any], run: dict[str, dict[str, Any]]) -> list[str]:
    """What Python then gets."""
    environment = {**os.environ, "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1"}
    started = subprocess.run(command_of(sweep, run), env=environment, check=True, capture_output=True, text=True)
    return started.stdout.splitlines()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_plans(path):
    sweep = yaml.safe_load(path.read_text())
    runs, seen = runs_of(sweep), []
    groups: dict[str | None, list[Any]] = {}
    for run in runs:
        program, option, config, *overrides = started_by(sweep, run)
        assert (REPOSITORY / program).exists()
        assert option == "--config"
        settings = load_config(REPOSITORY / config, overrides)
        assert settings.run == "runs/sweeps/sweep1/run1"
        assert settings.tracking.wandb == "online"
        assert settings.tracking.project == sweep["project"] == TrackingConfig().project
        assert settings.evaluation.probe
        assert settings.evaluation.every
        what = (build_plan(settings, IMAGES, 1).to_dict(), settings.target.kind)
        assert (settings.seed, what) not in seen
        seen.append((settings.seed, what))
        assert all(what == other for other in groups.setdefault(settings.tracking.group, []))
        groups[settings.tracking.group].append(what)
    seeds = sweep["parameters"].get("seed", {"values": [0]})["values"]
    assert [len(group) for group in groups.values()] == [len(seeds)] * (len(runs) // len(seeds))
    assert f"{len(runs)} runs" in path.read_text(), "its comment says how many runs it is"
    score = sweep["metric"]["name"].removeprefix("best/")
    assert sweep["metric"] == {"name": f"best/{score}", "goal": "maximize"}
    assert f"best/{score}" in BestScores([{score: 0.5}]).summary
    # That runs log a score of this name is in tests/tracking/test_workspace.py.
    assert score == "eval/probe"
