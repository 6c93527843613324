"""Compiled blocks train as plain ones, through all stages of one process."""

from __future__ import annotations

import shutil

import pytest

from tests.end_to_end.tiny import history, run_here


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own affairs
def test_compiled_blocks_train_as_plain_ones(photos, tmp_path):
    runs = [
        run_here(photos, tmp_path / choice, "engine.precision=fp32", f"engine.compile={choice}")
        for choice in ("never", "always")
    ]
    losses = [[row["train/loss"] for row in history(run)] for run in runs]
    # fp32 in another order of operations, whose differences training amplifies over the steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
