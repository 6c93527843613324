"""Selected samples: the same bits whatever the workers and wherever a run is interrupted, and the same on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mae_et.config import ConfigError
from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import history, run_here, weights
from tests.engine.ranks import run_ranks

INFOBATCH = ["selection.method=infobatch", "saving.steps=1", "saving.keep=1000", "epochs=6"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes") / "images")


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def runner(request, photos, classes):
    """Starts, or continues, a tiny run of either task in a folder."""
    if request.param == "pretrain":
        return lambda run, *changes: run_here(photos, run, *INFOBATCH, *changes)
    tiny = [*TINY_VIT, *INFOBATCH, "epochs=8", "curriculum=efficienttrain_pp", "data.holdout=0"]
    return lambda run, *changes: finetune_here(classes, run, *tiny, *changes)


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory) -> Path:
    """A run that was not interrupted, with a checkpoint of every step."""
    return runner(tmp_path_factory.mktemp("runs") / "whole")


def interrupted_at(step: int, whole: Path, run: Path) -> Path:
    """A run folder as a run that ended right after saving `step` leaves it, with rows of lost steps behind."""
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-*", "report*"))
    shutil.copytree(whole / "checkpoints" / f"step-{step:08}", run / "checkpoints" / f"step-{step:08}")
    return run


def rows_of(run: Path) -> list[dict[str, float]]:
    return [row for row in history(run) if "train/loss" in row]


def selection_of(run: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(run / "checkpoints" / f"step-{step:08}" / "selection.safetensors")


def pass_starts(run: Path) -> list[int]:
    """Steps with which passes begin, from the rows of all steps."""
    passes = [0.0, *(row["selection/passes"] for row in rows_of(run))]
    return [step for step, made in enumerate(passes[:-1]) if made == int(made)]


def test_the_run_prunes_and_its_passes_are_shorter(whole):
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    pruned = [row["selection/pruned"] for row in rows]
    starts = pass_starts(whole)
    assert len(starts) >= 5
    assert pruned[0] == 0 == pruned[-1]  # the first pass, and the last eighth of the budget
    assert any(0.1 < share < 0.6 for share in pruned)
    lengths = np.diff(starts)
    assert min(lengths) < max(lengths)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_scores_are_the_latest_losses(whole):
    """After every step the scores that changed are those of its batch, and their weighted mean is the step's loss."""
    rows = rows_of(whole)
    for step in range(2, len(rows) + 1):
        before, after = selection_of(whole, step - 1), selection_of(whole, step)
        changed = np.flatnonzero(before["scores"].view(np.int32) != after["scores"].view(np.int32))
        assert len(changed) == 8
        assert np.all(after["weights"][changed] > 0)
        mean = np.mean(after["scores"][changed].astype(np.float64) * after["weights"][changed])
        assert rows[step - 1]["train/loss"] == pytest.approx(mean, rel=1e-6)  # eight fp32 numbers, summed in fp32


def test_a_pass_is_chosen_by_the_scores_at_its_start(whole):
    starts = pass_starts(whole)
    chosen = 0
    for start in starts[1:]:
        scores, kept = selection_of(whole, start)["scores"], selection_of(whole, start + 1)["weights"]
        below = scores < np.nanmean(scores.astype(np.float64))
        if np.any(kept == 0):
            chosen += 1
            assert np.all(below[kept == 0])
            assert np.array_equal(kept != 1, below)
            assert np.all(kept[below & (kept > 0)] == 2)
    assert chosen >= 3


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resuming_anywhere_and_workers_change_nothing(runner, whole, tmp_path):
    """In the middle, before the end and at the end of a pass, at the last step; every other one with workers."""
    starts, total = pass_starts(whole), len(rows_of(whole))
    steps = sorted({2, starts[1] - 1, starts[1], starts[3] + 1, total - 1})
    for count, step in enumerate(steps):
        run = interrupted_at(step, whole, tmp_path / f"from-{step}")
        runner(run, f"data.workers={2 * (count % 2)}", "saving.steps=null")
        assert history(run) == history(whole), f"resumed after step {step}"
        assert weights(run) == weights(whole), f"resumed after step {step}"
        for name, tensor in selection_of(run, total).items():
            np.testing.assert_array_equal(tensor, selection_of(whole, total)[name])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_the_times_of_saving_change_nothing(runner, whole, tmp_path):
    run = runner(tmp_path / "run", "data.workers=2", "saving.steps=null")
    assert history(run) == history(whole)
    assert weights(run) == weights(whole)


def test_a_ratio_of_zero_is_no_selection_but_for_rounding(photos, tmp_path):
    """The same images in the same order, with weights of 1, and the mean of their losses."""
    plain = run_here(photos, tmp_path / "plain", "engine.precision=fp32")
    zero = run_here(photos, tmp_path / "zero", "engine.precision=fp32", "selection=infobatch", "selection.ratio=0")
    losses = [[row["train/loss"] for row in rows_of(run)] for run in (plain, zero)]
    # The mean of means is summed in another order: one ulp at first, grown by training.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "selection/pruned" not in rows_of(plain)[0]
    assert not (max((plain / "checkpoints").iterdir()) / "selection.safetensors").exists()


def test_two_ranks_select_as_one(photos, tmp_path):
    changes = ["selection=infobatch", "saving.steps=20", "engine.precision=fp32", "optim.accumulation=2"]
    run_ranks(2, run_here, photos, tmp_path / "together", *changes)
    alone = run_here(photos, tmp_path / "alone", *changes)
    ours, theirs = rows_of(tmp_path / "together"), rows_of(alone)
    assert max(row["selection/pruned"] for row in ours[:20]) > 0.1
    for key in ("selection/pruned", "selection/passes"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    # fp32 sums over ranks in another order, as without selection.
    losses = [[row["train/loss"] for row in rows[:20]] for rows in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    scores = [selection_of(tmp_path / run, 20)["scores"] for run in ("together", "alone")]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["data.repeats=2"], "data.repeats=2 shows several; set data.repeats=1"),
        (["replay.ratio=1"], "replays images"),
        (["curriculum.drop_last=false"], "set curriculum.drop_last=true"),
        (["optim.batch=64"], "no whole batch of 64"),
        (["selection.ratio=1"], "selection.ratio=1"),
    ],
)
def test_what_does_not_go_together_is_refused(classes, tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        finetune_here(classes, tmp_path / "run", *TINY_VIT, *INFOBATCH, *changes)
    assert not (tmp_path / "run" / "config.yaml").exists()
