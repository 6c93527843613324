"""Copies and shares of a model train as one process, and their checkpoints open under each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_et.config import load_config
from mae_et.engine.distributed import Ranks, join_ranks, leave_ranks
from mae_et.pretraining import build_state, pretrain
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import arguments, history, run_here, weights
from tests.engine.ranks import run_ranks

CHANGES = ("engine.precision=fp32", "optim.clip=1.0", "tracking.every=3")
# Another order of fp32 sums: measured 2.4e-7 over 44 steps of this run.
ROUNDING = 1e-5


def pretrain_quietly(photos: Path, run: Path, *changes: str) -> None:
    pretrain(load_config(None, arguments(photos, run, *CHANGES, *changes)), say=lambda _line: None)


def on_ranks(count: int, photos: Path, run: Path, *changes: str) -> Path:
    run_ranks(count, pretrain_quietly, photos, run, *changes)
    return run


def saved(run: Path, group: str) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / f"{group}.safetensors")


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in history(run) if "train/loss" in row]


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("layouts") / "alone"
    return run_here(photos, run, *CHANGES, "saving.steps=1", "saving.keep=1000")


@pytest.fixture(scope="module")
def sharded(photos, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("layouts") / "sharded"
    pictures = ("tracking.pictures=true", "tracking.picture_samples=2")
    return on_ranks(2, photos, run, "engine.parallel=fsdp", "saving.steps=1", "saving.keep=1000", *pictures)


def left_at(step: int, whole: Path, run: Path) -> Path:
    """A run folder as a run that ended right after saving `step` leaves it."""
    run.mkdir()
    for name in ("config.yaml", "plan.json", "metrics.jsonl"):
        shutil.copy(whole / name, run)
    shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
    return run


def test_shares_train_as_one_process(alone, sharded):
    assert losses(sharded) == pytest.approx(losses(alone), rel=ROUNDING)
    assert len(losses(alone)) > 10


def test_the_files_are_those_of_one_process(alone, sharded):
    for name in ("model", "optimizer"):
        ours, plain = (
            load_file(max((run / "checkpoints").iterdir()) / f"{name}.safetensors") for run in (sharded, alone)
        )
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in plain.items()}
    assert sum(value.numel() for value in ours.values()) > 10_000


def test_pictures_are_drawn_of_the_whole_model(sharded):
    assert len(list((sharded / "pictures").glob("stage-*.png"))) == 3


@pytest.mark.parametrize("step", [10, 17])
def test_shares_resume_to_the_bit(photos, sharded, tmp_path, step):
    run = on_ranks(2, photos, left_at(step, sharded, tmp_path / "again"), "engine.parallel=fsdp")
    assert [row for row in history(run) if "train/loss" in row] == [r for r in history(sharded) if "train/loss" in r]
    assert weights(run) == weights(sharded)


@pytest.mark.parametrize(("ranks", "layout"), [(1, "ddp"), (2, "ddp"), (4, "fsdp")])
def test_a_sharded_checkpoint_opens_under_any_layout(photos, alone, sharded, tmp_path, ranks, layout):
    run = on_ranks(ranks, photos, left_at(10, sharded, tmp_path / "other"), f"engine.parallel={layout}")
    assert losses(run) == pytest.approx(losses(alone), rel=ROUNDING)


@pytest.mark.parametrize(("ranks", "layout", "accumulation"), [(2, "fsdp", 2), (4, "ddp", 1)])
def test_a_plain_checkpoint_opens_under_any_layout(photos, alone, tmp_path, ranks, layout, accumulation):
    more = (f"engine.parallel={layout}", f"optim.accumulation={accumulation}")
    run = on_ranks(ranks, photos, left_at(10, alone, tmp_path / "other"), *more)
    assert losses(run) == pytest.approx(losses(alone), rel=ROUNDING)


def hold_shares(photos: Path, run: Path) -> None:
    """Each of two ranks holds about half of the weights, and of the moments after a step."""
    config = load_config(None, arguments(photos, run, *CHANGES, "engine.parallel=fsdp"))
    ranks = join_ranks("cpu")
    state = build_state(config, ranks)
    held = sum(parameter.to_local().numel() for parameter in state.model.parameters())  # pyright: ignore
    plain = build_state(config, Ranks(0, 1, torch.device("cpu")))
    total = sum(parameter.numel() for parameter in plain.model.parameters())
    assert 0.4 * total < held < 0.6 * total, (held, total)
    leave_ranks()


def test_every_rank_holds_its_share(photos, tmp_path):
    run_ranks(2, hold_shares, photos, tmp_path / "run")


TUNING = (
    *("engine.precision=fp32", "model.drop_path=0", "evaluation.batch=5", "optim.ema=0.9", "epochs=3", *TINY_VIT),
    *("optim.base_lr=0.005", "evaluation.every=0.4", "curriculum.preset=efficienttrain_pp"),
)


def finetune_quietly(images: Path, run: Path, *changes: str) -> None:
    finetune_here(images, run, *TUNING, *changes)


def test_fine_tuning_in_shares_with_an_average(tmp_path):
    """Layer-wise rates, mixing, the running average and accuracy of it, all under shares."""
    images = write_classes(tmp_path / "images")
    alone = finetune_here(images, tmp_path / "alone", *TUNING)
    run_ranks(2, finetune_quietly, images, tmp_path / "shared", "engine.parallel=fsdp")
    rows = [[row for row in history(tmp_path / run) if "train/loss" in row] for run in ("alone", "shared")]
    assert [row["train/loss"] for row in rows[1]] == pytest.approx([row["train/loss"] for row in rows[0]], rel=1e-4)
    averages = [saved(tmp_path / run, "average") for run in ("alone", "shared")]
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "shared" / "report.json").exists()
    assert alone
