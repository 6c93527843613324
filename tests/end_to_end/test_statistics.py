"""Running statistics of BatchNorm in a step that is left out, and ranks that do not see the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_et.config import ConfigError, FinetuneConfig, load_config
from mae_et.engine.tasks import Classification
from mae_et.finetuning import finetune
from tests.end_to_end.labelled import TINY_FINETUNE, write_classes
from tests.end_to_end.test_numbers import spoiled_run
from tests.end_to_end.tiny import history
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
