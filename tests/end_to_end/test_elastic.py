"""A job that goes on at another number of ranks sees the images, and has the losses, that it would have had."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest

from mae_et.tracking import read_metrics
from tests.end_to_end.launched import command, rows_of, start, start_ranks, torchrun, wait_for_rows
from tests.end_to_end.tiny import run_here

CHANGES = ("engine.precision=fp32", "data.workers=1")
# Passes enough that no rank's start is missed, and that every start makes some steps of its own.
LONG = (*CHANGES, "epochs=8")


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory) -> Path:
    return run_here(photos, tmp_path_factory.mktemp("elastic") / "alone", *LONG)


def test_one_two_four_ranks_and_one_again_are_one_run(photos, alone, tmp_path):
    """SIGTERM ends the first three starts; the two ranks are torchrun's."""
    run, starts = tmp_path / "run", []
    lines = command(photos, run, *LONG)
    for count in (1, 2, 4):
        starts.append(rows_of(run))
        if count == 2:
            job = start([*torchrun(count), *lines], tmp_path / "torchrun.log")
            try:
                wait_for_rows(run, starts[-1] + 8, job)
                job.process.send_signal(signal.SIGTERM)
                job.gone_after()
            finally:
                job.end()
        else:
            ranks = start_ranks(count, lines, tmp_path / "logs")
            wait_for_rows(run, starts[-1] + 8, ranks)
            ranks.signal(signal.SIGTERM)
            assert ranks.codes() == [143] * count, ranks.said
    starts.append(rows_of(run))
    ranks = start_ranks(1, lines, tmp_path / "logs")
    assert ranks.codes() == [0], ranks.said
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, alone))
    assert starts[0] == 0
    assert all(after - before >= 8 for before, after in itertools.pairwise([*starts, len(ours)])), starts
    assert [row["step"] for row in ours] == list(range(1, len(theirs) + 1))
    assert [row["images_seen"] for row in ours] == [row["images_seen"] for row in theirs]
    # fp32 sums over ranks in another order: measured 2e-7 over 116 steps.
    assert [row["train/loss"] for row in ours] == pytest.approx([row["train/loss"] for row in theirs], rel=1e-5)


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_changes(photos, tmp_path):
    """At the start of a run and when it goes on; the message names batch, ranks, and what would do."""
    fresh = start_ranks(3, command(photos, tmp_path / "fresh", *CHANGES), tmp_path / "logs")
    assert fresh.codes() == [2] * 3, fresh.said
    assert not (tmp_path / "fresh" / "config.yaml").exists()
    assert not (tmp_path / "fresh" / "status.json").exists()

    begun = run_here(photos, tmp_path / "begun", *CHANGES)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != ".lock"}
    ranks = start_ranks(3, command(photos, begun, *CHANGES), tmp_path / "logs")
    assert ranks.codes() == [2] * 3, ranks.said
    assert before == {path: path.read_bytes() for path in before}

    for said in (fresh.said, ranks.said):
        message = "".join(said)
        assert "a batch of 8 does not divide into 3 ranks x 1 accumulation steps" in message
        assert "choose a multiple of 3" in message
