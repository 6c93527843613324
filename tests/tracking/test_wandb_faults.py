"""What W&B may cost a run: no step waits for it, its start and its end have limits, and it leaves no process.

Faults of whole runs, with real servers, are in tests/torture/wandb_faults.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_et.tracking import WandbTracker
from mae_et.tracking import wandb as mirror

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("wandb_home")


def helper_processes() -> list[int]:
    """Living processes of W&B that this one has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and b"wandb-" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits in tenths of a second, so that a test of one can wait for it."""
    monkeypatch.setattr(mirror, "START_GRACE", 0.3)
    monkeypatch.setattr(mirror, "FINISH_GRACE", 0.5)


def test_the_random_streams_are_left_alone(tmp_path, picture):
    def streams() -> tuple:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = streams()
    tracker = WandbTracker("offline", tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.images({"panel": picture}, 1)
    tracker.finish(0)
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/panel*"))) == 1
    assert streams() == before


def test_no_process_is_left_after_the_end(tmp_path):
    tracker = WandbTracker("offline", tmp_path)
    assert helper_processes()
    tracker.finish(0)
    assert not helper_processes()
    assert "wandb" not in "".join(thread.name for thread in threading.enumerate())
    tracker.log({"late": 1}, 1)
    tracker.images({}, 1)
    tracker.finish(0)


def test_a_stopped_helper_delays_no_step_and_is_killed(tmp_path, capfd, brief, monkeypatch):
    monkeypatch.setattr(mirror, "MAX_WAITING", 200)
    tracker = WandbTracker("offline", tmp_path, init_timeout=10)
    (helper,) = helper_processes()
    os.kill(helper, signal.SIGSTOP)
    longest, begin = 0.0, time.perf_counter()
    # wandb 0.31 blocks after some 300 rows; then the queue fills, and the mirror gives up.
    for step in range(5000):
        before = time.perf_counter()
        tracker.log({f"train/{name}": step / 7 for name in range(10)}, step)
        longest = max(longest, time.perf_counter() - before)
        if step % 100 == 0:
            time.sleep(0.01)
    assert longest < 0.5
    tracker.finish(0)
    assert time.perf_counter() - begin < 10
    assert capfd.readouterr().err.count("is 200 rows behind) and is off for the rest of this run") == 1
    assert not helper_processes()


def test_a_stopped_helper_holds_the_end_for_its_limit_only(tmp_path, capfd, brief):
    tracker = WandbTracker("offline", tmp_path, init_timeout=10, finish_timeout=0.5)
    os.kill(helper_processes()[0], signal.SIGSTOP)
    tracker.log({"train/loss": 1.0}, 1)
    begin = time.perf_counter()
    tracker.finish(0)
    # 0.5 s and three times 0.5 s, and what a busy machine adds.
    assert time.perf_counter() - begin < 2 + 1
    assert capfd.readouterr().err.count("W&B failed to finish (TimeoutError: no answer within 1 s)") == 1
    assert not helper_processes()


@pytest.mark.parametrize("call", ["setup", "init"])
def test_a_start_without_end_is_given_up(call, tmp_path, capfd, brief, monkeypatch):
    forever = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(wandb, call, lambda **_options: forever.wait())
        begin = time.perf_counter()
        tracker = WandbTracker("offline", tmp_path, init_timeout=0.3)
        assert time.perf_counter() - begin < 0.6 + 1
        tracker.log({"train/loss": 1.0}, 1)
        tracker.finish(0)
        assert capfd.readouterr().err.count("W&B failed to start (TimeoutError: no answer within 0.6 s)") == 1
        assert not helper_processes()
    forever.set()
    tracker._thread.join(5)
    assert not tracker._thread.is_alive()


@pytest.mark.parametrize("error", [ConnectionResetError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["setup", "init", "define_metric", "log", "Image", "finish"])
def test_whatever_a_call_raises_is_reported_once(call, error, tmp_path, capfd, monkeypatch, picture):
    def fail(*_arguments, **_options):
        raise error("broken")

    owner = wandb.Run if call in ("define_metric", "log", "finish") else wandb
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        tracker = WandbTracker("offline", tmp_path)
        for step in (1, 2):
            tracker.log({"train/loss": 1.0}, step)
            tracker.images({"panel": picture}, step)
        tracker.finish(0)
    said = capfd.readouterr().err
    assert said.count("warning:") == said.count(f"({error.__name__}: broken) and is off for the rest") == 1
    assert not helper_processes()


def test_what_is_no_metric_switches_the_mirror_off(tmp_path, capfd):
    tracker = WandbTracker("offline", tmp_path)
    tracker.log({"train/loss": object()}, 1)  # pyright: ignore[reportArgumentType]
    tracker.finish(0)
    assert capfd.readouterr().err.count("W&B failed to log (TypeError: metric 'train/loss'") == 1
    assert not helper_processes()


@pytest.mark.parametrize("rows_before", [None, 3])
def test_a_disk_without_room_switches_the_mirror_off(rows_before, tmp_path, capfd, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = [mirror.MIN_FREE_BYTES - 1] if rows_before is None else [2**30] * (1 + rows_before)
    answers = iter(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(2**31, 2**30, next(answers, 4096)))
    tracker = WandbTracker("offline", tmp_path)
    for step in range(10):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(0)
    assert capfd.readouterr().err.count("MiB are left on the disk of") == 1
    assert bool(list((tmp_path / "wandb").glob("offline-run-*"))) == (rows_before is not None)


def test_a_file_system_without_a_size_is_not_full(tmp_path, capfd, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(0, 0, 0))
    tracker = WandbTracker("offline", tmp_path)
    tracker.finish(0)
    assert "warning:" not in capfd.readouterr().err
