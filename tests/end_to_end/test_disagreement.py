"""Ranks that do not agree: on images, clocks, or being alive; and running statistics of a step that is left out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_et.config import ConfigError, FinetuneConfig, load_config
from mae_et.engine.faults import TrainingError
from mae_et.engine.loop import LoopConfig
from mae_et.engine.tasks import Classification, Reconstruction
from mae_et.finetuning import finetune
from mae_et.pretraining import pretrain
from tests.end_to_end.labelled import TINY_FINETUNE, write_classes
from tests.end_to_end.test_numbers import spoiled_run
from tests.end_to_end.tiny import arguments, history
from tests.engine.ranks import run_ranks

RESNET = ["model.name=timm/resnet10t", "data.size=32", "model.drop_path=0", "optim.layer_decay=null", "epochs=2"]


def tuned_with_a_bad_step(images: Path, run: Path) -> None:
    """One image of the third step is NaN."""
    prepare = Classification.prepare

    def spoiled(self, batch, now, device):
        inputs = prepare(self, batch, now, device)
        if now.step == 2:
            inputs.images[0] = torch.nan
        return inputs

    Classification.prepare = spoiled
    settings = [*TINY_FINETUNE, *RESNET, f"data={images}", f"run={run}", "saving.steps=1", "saving.keep=100"]
    finetune(load_config(None, settings, FinetuneConfig), say=lambda _line: None)


def test_a_step_left_out_leaves_no_trace_in_statistics(tmp_path):
    run_ranks(1, tuned_with_a_bad_step, write_classes(tmp_path / "images"), tmp_path / "run")
    saved = [load_file(path / "model.safetensors") for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    names = [name for name in saved[0] if "running_" in name or "num_batches" in name]
    assert len(names) > 10
    assert all(torch.equal(saved[1][name], saved[2][name]) for name in names)  # before and after the step
    assert any(not torch.equal(saved[2][name], saved[3][name]) for name in names)
    assert [row for row in history(tmp_path / "run") if "train/loss" in row][-1]["train/skipped_steps"] == 1


def each_its_own(photos: Path, other: Path, run: Path) -> None:
    root = photos if os.environ["RANK"] == "0" else other
    with pytest.raises(ConfigError, match=r"rank 1 sees other images than rank 0: 44 images .* in place of 45"):
        spoiled_run(root, run, "loss_nan", range(0), None)


def test_ranks_that_see_other_images_are_refused(photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(photos.iterdir())[:-1]:
        (other / path.name).write_bytes(path.read_bytes())
    run_ranks(2, each_its_own, photos, other, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def one_fails(photos: Path, run: Path) -> None:
    prepare = Reconstruction.prepare

    def broken(self, batch, now, device):
        if now.step == 3 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("of this rank")
        return prepare(self, batch, now, device)

    Reconstruction.prepare = broken
    expected = (TrainingError, "another rank ended") if os.environ["RANK"] == "0" else (ZeroDivisionError, "this rank")
    with pytest.raises(expected[0], match=expected[1]):
        pretrain(load_config(None, arguments(photos, run, "engine.timeout_minutes=0.2")), say=lambda _line: None)


def test_the_others_say_that_a_rank_is_gone(photos, tmp_path):
    run_ranks(2, one_fails, photos, tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"][:18]) == ("failed", "another rank ended")


def clocks_apart(photos: Path, run: Path) -> None:
    """Ranks whose clocks differ end a race together."""
    config = load_config(None, arguments(photos, run, "protocol.wall_hours=1", "epochs=1"))
    rank = int(os.environ["RANK"])
    time_is_up = LoopConfig.time_is_up
    LoopConfig.time_is_up = lambda self, state: time_is_up(self, state) or (rank == 1 and state.step >= 4)
    assert pretrain(config, say=lambda _line: None) == 0


def test_a_race_ends_on_all_ranks(photos, tmp_path):
    run_ranks(2, clocks_apart, photos, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "time is up"
