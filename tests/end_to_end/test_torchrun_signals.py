"""One run under torchrun, interrupted in every way: it saves where it can, leaves nobody behind, and loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mae_et.tracking import read_metrics
from tests.end_to_end.launched import PATIENCE, Job, command, rows_of, start, start_ranks, torchrun, wait_for_rows
from tests.end_to_end.tiny import history, weights

CHANGES = ("engine.precision=fp32", "data.workers=1", "saving.steps=10", "epochs=25")
EVERY_SIGNAL = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass
class Interruption:
    """What was seen of one.

    Attributes:
        seconds: until no process of the job was left.
        code: of torchrun.
        said: by torchrun and the run.
        rows: of metrics when the signal was sent.
        saved: step of the newest checkpoint afterwards.
        status: the run's `status.json`.
    """

    seconds: float
    code: int
    said: str
    rows: int
    saved: int
    status: dict[str, object]


def agent(number: int) -> Callable[[Job], None]:
    return lambda job: job.process.send_signal(number)


def everybody(job: Job) -> None:
    """As systemd, or SLURM's scancel, signal a job: the launcher, its ranks, and their data workers."""
    for pid in job.alive():
        os.kill(pid, signal.SIGTERM)


def ranks_of(job: Job) -> list[int]:
    """Process ids of the ranks: the launcher's children that run pretrain.py, data workers left out."""
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "pretrain.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def lose_a_rank(job: Job, run: Path) -> None:
    """Kill the last rank, and wait until torchrun has brought the run back."""
    starts = job.said.count("resuming from")
    os.kill(ranks_of(job)[-1], signal.SIGKILL)
    end = time.monotonic() + PATIENCE
    while job.said.count("resuming from") == starts:
        assert time.monotonic() < end, f"torchrun did not bring it back: {job.said[-2000:]}"
        time.sleep(0.02)
    wait_for_rows(run, rows_of(run) + 3, job)


def interrupt(photos: Path, run: Path, name: str, send: Callable[[Job], None], *options: str) -> Interruption:
    """Start or continue the run, let it make some steps, and interrupt it."""
    before = rows_of(run)
    line = [*torchrun(2, "--max-restarts=1", *options), *command(photos, run, *CHANGES)]
    job = start(line, run.parent / f"{name}.log")
    try:
        wait_for_rows(run, before + 5, job)
        if name == "SIGINT":
            lose_a_rank(job, run)
        rows = rows_of(run)
        send(job)
        seconds = job.gone_after()
    finally:
        job.end()
    saved = int(max((run / "checkpoints").iterdir()).name.removeprefix("step-"))
    status = json.loads((run / "status.json").read_text())
    return Interruption(seconds, job.process.returncode, job.said, rows, saved, status)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("torchrun")


@pytest.fixture(scope="module")
def interruptions(photos, room) -> dict[str, Interruption]:
    """One run, continued and interrupted again and again."""
    run = room / "run"
    return {
        "SIGTERM": interrupt(photos, run, "SIGTERM", agent(signal.SIGTERM)),
        "SIGINT": interrupt(photos, run, "SIGINT", agent(signal.SIGINT)),
        "SIGUSR1 handled": interrupt(photos, run, "handled", agent(signal.SIGUSR1), EVERY_SIGNAL),
        "everybody": interrupt(photos, run, "everybody", everybody),
        "SIGKILL": interrupt(photos, run, "SIGKILL", agent(signal.SIGKILL)),
    }


NAMES = ["SIGTERM", "SIGINT", "SIGUSR1 handled", "everybody", "SIGKILL"]


@pytest.mark.parametrize("name", NAMES)
def test_the_run_is_saved_and_nobody_is_left(interruptions, name):
    found = interruptions[name]
    assert found.status["state"] == "interrupted", found.said[-3000:]
    assert found.status["saved_step"] == found.saved >= found.rows
    assert found.said.count(": saved at step") == 1
    assert found.seconds < 30, "torchrun kills ranks that take longer"
    # Nobody can tell from torchrun's code that the run is saved: that is what status.json is for.
    assert found.code != 0


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGINT"),
        ("SIGUSR1 handled", "SIGUSR1"),
        ("SIGKILL", "SIGTERM"),  # the launcher died of it, and the ranks followed; so it is with SIGUSR1 unhandled
    ],
)
def test_the_ranks_say_what_ended_them(interruptions, name, received):
    found = interruptions[name]
    assert f"{received}: saved at step {found.saved}" in found.said
    assert found.status["reason"] == received


def test_each_start_goes_on_from_where_the_last_one_ended(interruptions):
    found = [interruptions[name] for name in NAMES]
    assert "starting at step 0" in found[0].said
    for before, after in itertools.pairwise(found):
        assert f"at step {before.saved} of" in after.said


def test_torchrun_brings_a_run_back_that_lost_a_rank(interruptions):
    """SIGINT's job is the one: its second rank was killed first."""
    said = interruptions["SIGINT"].said
    assert said.count("resuming from") == 2
    assert "exitcode: -9" in said


def test_after_all_that_the_run_ends_in_the_same_bits(photos, room, interruptions):
    run, whole = room / "run", room / "whole"
    for path in (run, whole):
        ranks = start_ranks(2, command(photos, path, *CHANGES), room / "ranks")
        assert ranks.codes() == [0, 0], ranks.said
    assert history(run) == history(whole)
    assert weights(run) == weights(whole)
    assert len(read_metrics(run / "metrics.jsonl")) > interruptions["SIGKILL"].saved + 10, "it was over too soon"
