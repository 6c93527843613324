"""Runs that replay images: the same bits whatever the workers and wherever they were interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mae_et.curriculum import Plan
from mae_et.data.loader import RequestDataset
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights
from tests.engine.ranks import run_ranks

# Two replayed steps after each fresh one, from two batches of 8 x 3 x 16 x 16 bytes in the last stage.
REPLAY = ["epochs=4", "replay.ratio=2", "replay.gigabytes=12.5e-6"]
SAVED = ["saving.steps=1", "saving.keep=1000"]


def plan_of(run: Path) -> Plan:
    return Plan.from_dict(json.loads((run / "plan.json").read_text()))


def interrupted_at(step: int, whole: Path, run: Path) -> Path:
    """A run folder as a run that ended right after saving `step` leaves it."""
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "backbone.json", "classes.json"):
        if (whole / name).exists():
            shutil.copy(whole / name, run)
    shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
    return run


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory) -> Path:
    """A whole run that keeps a checkpoint of every step."""
    return run_here(photos, tmp_path_factory.mktemp("runs") / "whole", *REPLAY, *SAVED)


def test_the_run_holds_what_is_to_be_tested(uninterrupted):
    plan = plan_of(uninterrupted)
    assert [stage.replay_batches for stage in plan.stages] == [14, 3, 2]
    assert [stage.replay for stage in plan.stages] == [2, 2, 2]
    # Long enough for batches to leave the buffer, but for the first stage.
    assert [stage.fresh_steps for stage in plan.stages] == [12, 6, 3]
    rows = history(uninterrupted)
    assert rows[-1]["train/images_fresh"] == plan.total_fresh < rows[-1]["images_seen"] == plan.total_images


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
def test_workers_change_nothing(photos, uninterrupted, tmp_path):
    run = run_here(photos, tmp_path / "run", *REPLAY, "data.workers=2")
    assert (history(run), weights(run)) == (history(uninterrupted), weights(uninterrupted))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resuming_at_any_step_equals_not_stopping(photos, uninterrupted, tmp_path):
    """At fresh steps, at replayed ones, at both stage boundaries and beside them; now and then with workers."""
    plan = plan_of(uninterrupted)
    beside = [first + offset for first in plan.boundaries[1:] for offset in (-1, 0, 1)]
    steps = sorted({2, 4, *beside, plan.boundaries[1] + 12, plan.total_steps - 1})
    assert {plan.at(step).fresh for step in steps} == {True, False}
    for number, step in enumerate(steps):
        run = interrupted_at(step, uninterrupted, tmp_path / f"from-{step}")
        run_here(photos, run, *REPLAY, f"data.workers={2 if number % 4 == 1 else 0}")
        assert history(run) == history(uninterrupted), f"resumed after step {step}"
        assert weights(run) == weights(uninterrupted), f"resumed after step {step}"


@pytest.mark.parametrize("changes", [("optim.accumulation=2", "tracking.every=4"), ("data.downsample=fourier",)])
def test_resuming_under_accumulation_and_with_images_of_the_final_size(photos, tmp_path, changes):
    whole = run_here(photos, tmp_path / "whole", *REPLAY, "saving.steps=2", "saving.keep=99", *changes)
    if "data.downsample=fourier" in changes:
        assert [stage.replay_batches for stage in plan_of(whole).stages] == [2, 2, 2]
    for step in (10, 12):
        run = interrupted_at(step, whole, tmp_path / f"from-{step}")
        run_here(photos, run, *REPLAY, *changes)
        assert (history(run), weights(run)) == (history(whole), weights(whole))


def test_labelled_runs_with_repeats_and_mixing_resume_too(tmp_path):
    images = write_classes(tmp_path / "images")
    changes = [*TINY_VIT, "replay.ratio=1", "replay.gigabytes=2e-5", "data.repeats=2", "evaluation.every=null"]
    whole = finetune_here(images, tmp_path / "whole", *changes, *SAVED)
    plan = plan_of(whole)
    assert plan.total_fresh < plan.total_images
    for step in (7, 8):
        run = interrupted_at(step, whole, tmp_path / f"from-{step}")
        finetune_here(images, run, *changes)
        assert (history(run), weights(run)) == (history(whole), weights(whole))


def test_the_data_path_works_for_fresh_steps_alone(photos, uninterrupted, tmp_path, monkeypatch):
    loaded: list[int] = []
    make = RequestDataset.__getitems__
    monkeypatch.setattr(
        RequestDataset, "__getitems__", lambda self, asked: loaded.append(len(asked)) or make(self, asked)
    )
    run_here(photos, tmp_path / "run", *REPLAY)
    plan = plan_of(uninterrupted)
    assert sum(loaded) == plan.total_fresh == 21 * 8
    assert 2.7 < plan.total_images / sum(loaded) < 3


def test_two_ranks_replay_as_one(photos, tmp_path):
    changes = [*REPLAY, "epochs=2", "engine.precision=fp32", "optim.accumulation=2", "data.workers=0"]
    alone = run_here(photos, tmp_path / "alone", *changes)
    run_ranks(2, run_here, photos, tmp_path / "together", *changes)
    losses = [[row["train/loss"] for row in history(run)[:20]] for run in (tmp_path / "together", alone)]
    # fp32 sums over ranks in another order, as in test_ranks.py.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
