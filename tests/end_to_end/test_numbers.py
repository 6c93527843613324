"""Losses, gradients and inputs that are not finite: left out by all ranks together, counted, and in the end fatal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mae_et.config import load_config
from mae_et.engine.faults import TrainingError
from mae_et.engine.tasks import Reconstruction
from mae_et.models.mae import MaskedAutoencoder
from mae_et.pretraining import pretrain
from tests.end_to_end.tiny import arguments, history, run_here, weights
from tests.engine.ranks import run_ranks

CHANGES = ("engine.precision=fp32", "tracking.every=1", "saving.steps=1", "saving.keep=1000")
KINDS = ("loss_nan", "loss_inf", "gradient", "input")


def spoil(kind: str, steps: range, rank: int | None) -> None:
    """Make something not finite at these steps, on one rank or on all (None)."""

    def here(step: int) -> bool:
        mine = dist.get_rank() if dist.is_initialized() else 0
        return step in steps and rank in (None, mine)

    loss = Reconstruction.loss
    normalise = MaskedAutoencoder.normalise
    spoiled = {"input": False}

    def spoiled_loss(self, network, inputs, now):
        spoiled["input"] = kind == "input" and here(now.step)
        found = loss(self, network, inputs, now)
        if here(now.step) and kind == "loss_nan":
            return found * torch.nan
        if here(now.step) and kind == "loss_inf":
            return found + torch.inf  # whose gradients are finite
        if here(now.step) and kind == "gradient":
            found.register_hook(lambda gradient: gradient * torch.nan)
        return found

    def spoiled_images(self, images):
        found = normalise(self, images)
        if spoiled["input"]:
            found[0] = torch.nan  # not one pixel: its patch may be masked
        return found

    Reconstruction.loss = spoiled_loss
    MaskedAutoencoder.normalise = spoiled_images


def spoiled_run(photos: Path, run: Path, kind: str, steps: range, rank: int | None, *changes: str) -> None:
    spoil(kind, steps, rank)
    pretrain(load_config(None, arguments(photos, run, *CHANGES, *changes)), say=lambda _line: None)


def stopped_run(photos: Path, run: Path, *more) -> None:
    with pytest.raises(TrainingError, match=r"not finite for \d+ steps in a row \(engine\.max_skipped=4\)"):
        spoiled_run(photos, run, *more)


@pytest.fixture(scope="module", params=KINDS)
def alone(request, photos, tmp_path_factory) -> tuple[str, Path]:
    """A kind, and the run of one process that leaves out a step for it."""
    run = tmp_path_factory.mktemp("numbers") / "one"
    run_ranks(1, spoiled_run, photos, run, request.param, range(6, 7), None, "epochs=1")
    return request.param, run


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_bad_step_on_one_rank_is_left_out_by_all(photos, tmp_path, alone, layout):
    """As in one process that leaves out the same step."""
    kind, run = alone
    run_ranks(2, spoiled_run, photos, tmp_path / "two", kind, range(6, 7), 1, f"engine.parallel={layout}", "epochs=1")
    two, one = history(tmp_path / "two"), history(run)
    assert [row["train/skipped_steps"] for row in two] == [row["train/skipped_steps"] for row in one]
    assert [row["train/skipped_steps"] for row in two][5:8] == [0.0, 1.0, 1.0]
    theirs, ours = ([row["train/loss"] for row in rows] for rows in (one, two))
    assert math.isnan(theirs[6]) == (kind != "gradient")  # no rank had a finite one
    assert math.isfinite(ours[6])  # the other rank had
    assert ours[:6] + ours[7:] == pytest.approx(theirs[:6] + theirs[7:], rel=1e-5)


def test_weights_and_moments_of_a_step_left_out_stay_as_they_were(photos, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, spoiled_run, photos, run, "loss_inf", range(6, 7), 0, "epochs=1")
    folders = {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").iterdir()}
    before, after, later = ((folders[step] / "model.safetensors").read_bytes() for step in (6, 7, 8))
    assert before == after != later
    moments = [(folders[step] / "optimizer.safetensors").read_bytes() for step in (6, 7)]
    assert moments[0] == moments[1]


def test_a_loss_that_is_finite_is_not_touched(photos, tmp_path):
    plain = run_here(photos, tmp_path / "plain", *CHANGES, "epochs=1")
    run_ranks(1, spoiled_run, photos, tmp_path / "unspoiled", "loss_nan", range(0), None, "epochs=1")
    assert weights(plain) == weights(tmp_path / "unspoiled")


def test_many_in_a_row_stop_all_ranks_and_name_the_samples(photos, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, stopped_run, photos, run, "loss_nan", range(5, 100), 1, "engine.max_skipped=4", "tracking.every=2")
    rows = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    assert len(steps) >= 4
    assert steps[0] == 5
    assert all(sum(row["step"] == step for row in rows) == 8 for step in steps)  # the batch, of both ranks
    assert all(Path(row["path"]).exists() and row["seed"] > 0 for row in rows)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite" in status["reason"]
    # What was saved is finite, and a run on sound ground goes on from there.
    again = run_here(photos, run, *CHANGES, "tracking.every=2", "engine.max_skipped=4")
    assert history(again)[-1]["train/skipped_steps"] >= 4


@pytest.mark.parametrize("precision", ["fp16"])
def test_overflow_is_the_scalers_business(photos, tmp_path, precision):
    """fp16 skips while its scale is too high, and that is no fault however small the limit."""
    run = run_here(photos, tmp_path / "run", f"engine.precision={precision}", "engine.max_skipped=1", "epochs=1")
    assert history(run)[-1]["train/loss"] < 2


def test_a_loss_that_is_nan_under_fp16_stops_in_the_end(photos, tmp_path):
    more = ("engine.precision=fp16", "engine.max_skipped=4", "epochs=30")
    run_ranks(1, stopped_run, photos, tmp_path / "run", "loss_nan", range(5, 1000), None, *more)
