"""Following a launcher that dies, and asking SLURM for another start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_et.engine.signals import STOPPING, StopSignal, requeue, slurm_job


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "71"}, "71"),
        ({"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "0"}, "71_0"),
        ({"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "71"}, "73"),
    ],
)
def test_name_of_the_job(environment, job):
    assert slurm_job(environment) == job


def fake_scontrol(folder: Path, script: str) -> None:
    path = folder / "scontrol"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_requeue_calls_scontrol(tmp_path, monkeypatch):
    fake_scontrol(tmp_path, f'echo "$@" >> {tmp_path}/calls')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue("71_3") is None
    assert (tmp_path / "calls").read_text() == "requeue 71_3\n"


def test_requeue_says_what_went_wrong(tmp_path, monkeypatch):
    fake_scontrol(tmp_path, "echo slurm_requeue error: Invalid job id >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue("71") == "scontrol requeue 71: slurm_requeue error: Invalid job id"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    problem = requeue("71")
    assert problem is not None
    assert "scontrol" in problem


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_remembered_and_its_repeats_do_no_harm_afterwards(number):
    before = {kind: signal.getsignal(kind) for kind in STOPPING}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests, too, may run under nohup
    try:
        with StopSignal() as stop:
            assert stop.received is None
            signal.raise_signal(number)
            assert stop.received == number
        signal.raise_signal(number)  # while the run says goodbye
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_handlers_come_back_where_there_was_no_signal():
    before = {kind: signal.getsignal(kind) for kind in STOPPING}
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    assert {kind: signal.getsignal(kind) for kind in STOPPING} == before


def test_a_second_signal_ends_the_process():
    code = (
        "import signal, time\nfrom mae_et.engine import signals\n"
        "signals.REPEATS_SECONDS = 0.5\n"
        "with signals.StopSignal() as stop:\n"
        "    signal.raise_signal(signal.SIGUSR1)\n    signal.raise_signal(signal.SIGTERM)\n"
        "    print('told twice:', stop.received == signal.SIGUSR1, flush=True)\n    time.sleep(0.6)\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('second')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "told twice: True\n")


RANK = """
import os, pathlib, signal, sys, time
from mae_et.engine.signals import StopSignal, follow_launcher
follow_launcher()
with StopSignal() as stop:
    pathlib.Path(sys.argv[1], "ready").write_text(str(os.getpid()))
    for _ in range(600):
        if stop.received is not None:
            pathlib.Path(sys.argv[1], "received").write_text(str(stop.received))
            break
        time.sleep(0.05)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_hears_of_its_launchers_death(tmp_path, launched):
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    if launched:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() or not (tmp_path / "ready").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank = int((tmp_path / "ready").read_text())
    launcher.kill()
    launcher.wait()
    if launched:
        while not (tmp_path / "received").exists() or not (tmp_path / "received").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert int((tmp_path / "received").read_text()) == signal.SIGTERM
    else:
        time.sleep(0.5)
        assert not (tmp_path / "received").exists()
        os.kill(rank, signal.SIGKILL)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
