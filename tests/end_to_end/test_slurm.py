"""Jobs of SLURM: signals save, and one requeue is asked for; with an `scontrol` and an `srun` of our own."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.launched import REPOSITORY, Ranks, command, free_port, rows_of, start_ranks, wait_for_rows
from tests.end_to_end.tiny import history, weights

CHANGES = ("engine.precision=fp32", "epochs=8")
JOB = "4711"

# Writes down each call, and does or says what the file beside it tells it to.
SCONTROL = """#!/bin/sh
room=$(dirname "$0")
if [ "$1" = show ]; then echo 127.0.0.1; echo other-host; exit 0; fi
echo "$SLURM_PROCID: $*" >>"$room/calls"
if [ -e "$room/refuse" ]; then echo "slurm_update error: Job is not requeueable" >&2; exit 1; fi
"""

# srun's part in launch/slurm.sbatch: the command as often as there are tasks, each with its number; SLURM's signals go
# to the tasks, of which it writes down the ids.
SRUN = """#!/usr/bin/env bash
room=$(dirname "$0")
printf '%s\\n' "$@" >"$room/arguments"
while [[ $1 == --* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=("$!")
done
echo "${pids[@]}" >"$room/tasks"
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def slurm(tmp_path) -> Path:
    """A folder for PATH with the command that ranks call."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    executable(folder / "scontrol", SCONTROL)
    return folder


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory) -> Path:
    """The run of two ranks that nothing interrupted."""
    run = tmp_path_factory.mktemp("slurm") / "whole"
    ranks = start_ranks(2, command(photos, run, *CHANGES), run.parent / "logs")
    assert ranks.codes() == [0, 0], ranks.said
    return run


def job(photos: Path, run: Path, count: int, path: str, *changes: str, number: str = JOB, **environment: str) -> Ranks:
    """The ranks of a job as launch/slurm.sbatch starts them; without a number they are no job's."""
    environment = {"SLURM_PROCID": "{rank}", "PATH": path, **environment}
    if number:
        environment["SLURM_JOB_ID"] = number
    return start_ranks(count, command(photos, run, *CHANGES, *changes), run.parent / "logs", **environment)


def with_slurm(folder: Path) -> str:
    return f"{folder}:{os.environ['PATH']}"


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def status_of(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())


def test_sigusr1_saves_and_rank_0_alone_asks_for_one_requeue_and_the_job_goes_on(photos, whole, slurm, tmp_path):
    run = tmp_path / "run"
    ranks = job(photos, run, 2, with_slurm(slurm))
    wait_for_rows(run, 5, ranks)
    ranks.signal(signal.SIGUSR1)
    assert ranks.codes() == [138, 138], ranks.said  # 128 + SIGUSR1, with a requeue and without
    saved = rows_of(run)
    assert calls(slurm) == [f"0: requeue {JOB}"]
    assert status_of(run) == {"saved_step": saved, "state": "interrupted", "reason": "SIGUSR1", "requeued": True}
    assert f"SIGUSR1: saved at step {saved}" in ranks.said[0]
    assert ranks.said[1].count("saved at step") == 0

    again = job(photos, run, 2, with_slurm(slurm), SLURM_RESTART_COUNT="1")
    assert again.codes() == [0, 0], again.said
    assert f"at step {saved} of" in again.said[0]
    assert history(run) == history(whole)
    assert weights(run) == weights(whole)
    assert len(calls(slurm)) == 1


def test_sigterm_saves_and_asks_for_nothing(photos, slurm, tmp_path):
    """Of scancel nobody wants the job back, and of preemption SLURM starts it again by itself (--requeue)."""
    run = tmp_path / "run"
    ranks = job(photos, run, 1, with_slurm(slurm), "epochs=1000")
    wait_for_rows(run, 5, ranks)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [143], ranks.said
    assert calls(slurm) == []
    assert status_of(run)["requeued"] is False
    assert status_of(run)["saved_step"] == rows_of(run)


@pytest.mark.parametrize("case", ["refuses", "is missing"])
def test_an_scontrol_that_does_not_help_is_a_warning_and_the_run_is_saved(photos, slurm, tmp_path, case):
    run = tmp_path / "run"
    (slurm / "refuse").touch()
    ranks = job(photos, run, 1, with_slurm(slurm) if case == "refuses" else str(tmp_path / "nothing"), "epochs=1000")
    wait_for_rows(run, 5, ranks)
    ranks.signal(signal.SIGUSR1)
    assert ranks.codes() == [138], ranks.said
    assert status_of(run) == {
        "saved_step": rows_of(run), "state": "interrupted", "reason": "SIGUSR1", "requeued": False,
    }  # fmt: skip
    expected = "scontrol requeue 4711: slurm_update error: Job is not requeueable" if case == "refuses" else "scontrol"
    assert expected in ranks.said[0]
    assert "did not" in ranks.said[0]


@pytest.mark.parametrize(("changes", "number"), [((), ""), (("engine.requeue=false",), JOB)], ids=["no job", "off"])
def test_nobody_asks_outside_of_slurm_or_against_the_users_will(photos, slurm, tmp_path, changes, number):
    run = tmp_path / "run"
    ranks = job(photos, run, 1, with_slurm(slurm), "epochs=1000", *changes, number=number)
    wait_for_rows(run, 5, ranks)
    ranks.signal(signal.SIGUSR1)
    assert ranks.codes() == [138], ranks.said
    assert calls(slurm) == []


def test_an_array_job_is_requeued_by_its_task(photos, slurm, tmp_path):
    run = tmp_path / "run"
    array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}
    ranks = job(photos, run, 1, with_slurm(slurm), "epochs=1000", **array)
    wait_for_rows(run, 5, ranks)
    ranks.signal(signal.SIGUSR1)
    assert ranks.codes() == [138], ranks.said
    assert calls(slurm) == ["0: requeue 4700_11"]


def test_a_second_signal_ends_a_run_that_is_stuck(photos, slurm, tmp_path):
    """It waits for images that never come, as from a file server that is down: its data worker is stopped."""
    run = tmp_path / "run"
    ranks = job(photos, run, 1, with_slurm(slurm), "epochs=1000", "data.workers=1")
    wait_for_rows(run, 5, ranks)
    (process,) = ranks.processes
    assert process.pid is not None
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGSTOP)
    time.sleep(1)
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(3)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGUSR1)
    process.join(30)
    assert process.exitcode == -signal.SIGUSR1, ranks.said
    assert calls(slurm) == []


def test_the_batch_script_gives_every_task_its_place(photos, whole, slurm, tmp_path):
    """launch/slurm.sbatch as it is, to the end of a run; its tasks get signals with no shell in between."""
    executable(slurm / "srun", SRUN)
    run, (script, *rest) = tmp_path / "run", command(photos, tmp_path / "run", *CHANGES)
    place = {
        "SLURM_JOB_ID": str(free_port(range(10_000, 30_000)) - 10_000),
        "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_CPUS_PER_TASK": "3", "PYTHON": sys.executable, "PATH": with_slurm(slurm),
    }  # fmt: skip
    process = subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / "slurm.sbatch"), script, *rest], cwd=REPOSITORY,
        env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while rows_of(run) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    tasks = [int(pid) for pid in (slurm / "tasks").read_text().split()]
    names = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1] for pid in tasks]
    for pid in tasks:
        os.kill(pid, signal.SIGUSR1)
    said = process.communicate(timeout=90)[0]
    assert names == [b"pretrain.py"] * 2
    assert process.returncode == 138, said
    assert "2 x cpu" in said
    assert "--cpus-per-task=3" in (slurm / "arguments").read_text().splitlines()
    assert calls(slurm) == [f"0: requeue {place['SLURM_JOB_ID']}"]
    saved = rows_of(run)
    assert status_of(run)["saved_step"] == saved
    rows = history(whole)
    assert history(run) == rows[:saved]
