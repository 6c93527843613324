"""Compiled blocks train as plain ones, through all stages of one process, and nothing is compiled in training."""

from __future__ import annotations

import shutil

import pytest
from torch._dynamo.utils import counters

from mae_et import running
from tests.end_to_end.tiny import history, run_here


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own affairs
def test_compiled_blocks_train_as_plain_ones(photos, tmp_path, monkeypatch):
    compiled: list[int] = []
    train = running.train

    def counted(*arguments, **named):
        compiled.append(counters["stats"]["unique_graphs"])
        ended = train(*arguments, **named)
        compiled.append(counters["stats"]["unique_graphs"])
        return ended

    monkeypatch.setattr(running, "train", counted)
    runs = [
        run_here(photos, tmp_path / choice, "engine.precision=fp32", f"engine.compile={choice}")
        for choice in ("never", "always")
    ]
    losses = [[row["train/loss"] for row in history(run)] for run in runs]
    # fp32 in another order of operations, whose differences training amplifies over the steps.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    before_plain, after_plain, before, after = compiled
    assert before_plain == after_plain < before == after
