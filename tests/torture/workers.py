"""Data workers that are killed, raise, or hang: a clear end, no orphans, and the same bits when started again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.utils.data

from mae_et.data.loader import RequestDataset
from tests.torture.kills import newest_step
from tests.torture.runs import (
    PLAIN,
    Started,
    Whole,
    chance_of,
    check_loads,
    check_same,
    children_of,
    rows_written,
    wait_until,
    whole_run,
)


def breaks_at(call: int, what: Callable[[], Any]) -> Callable[[], None]:
    """For a process that is about to start: `what` happens with the `call`-th batch that one of its workers makes."""

    def install() -> None:
        real, made = RequestDataset.__getitems__, 0

        def make(self: RequestDataset, requests: Any) -> Any:
            nonlocal made
            made += 1
            if made == call and torch.utils.data.get_worker_info() is not None:
                what()
            return real(self, requests)

        RequestDataset.__getitems__ = make

    return install


def ended_clearly(started: Started, code: int, *words: str) -> None:
    """It failed, said why in a line, and left no worker."""
    assert code == 1, f"exit code {code}: {started.said()}"
    assert "error: " in started.err, started.said()
    assert "Traceback" not in started.err, started.said()
    for word in words:
        assert word in started.err, f"does not say {word!r}: {started.said()}"


def goes_on(folder: Path, run: Path, whole: Whole, workers: int) -> None:
    saved = newest_step(run)
    check_loads(run, saved)
    again = PLAIN.start(folder, run, "saving.steps=2", f"data.workers={workers}")
    assert again.wait() == 0, again.said()
    assert not saved or f"at step {saved}" in again.out, again.said()
    check_same(run, whole)


def prepare(kind: str, folder: Path, seed: int) -> tuple[random.Random, Whole, Path, int]:
    chance = chance_of(kind, seed)
    return chance, whole_run(PLAIN, folder), folder / "run", chance.choice((1, 2))


def worker_killed(folder: Path, seed: int) -> None:
    """`kill -9` of a data worker"""
    chance, whole, run, workers = prepare("worker_killed", folder, seed)
    started = PLAIN.start(folder, run, "saving.steps=2", f"data.workers={workers}", "epochs=300")
    row = chance.randint(1, whole.steps - 4)
    wait_until(lambda: rows_written(run) >= row or started.poll() is not None, 60, f"row {row} did not come")
    assert started.poll() is None, started.said()
    time.sleep(chance.uniform(0, 0.05))
    pids = children_of(started.pid)
    assert pids, "no worker"
    os.kill(chance.choice(pids), signal.SIGKILL)
    ended_clearly(started, started.wait(60), "worker")
    check_loads(run, (row - 1) // 2 * 2)


def worker_killed_and_resumed(folder: Path, seed: int) -> None:
    """A data worker killed by its own batch (as for its memory), and the run started again"""
    chance, whole, run, workers = prepare("worker_killed_and_resumed", folder, seed)
    kill = breaks_at(chance.randint(1, whole.steps // workers - 2), lambda: os.kill(os.getpid(), signal.SIGKILL))
    started = PLAIN.start(folder, run, "saving.steps=2", f"data.workers={workers}", before=kill)
    ended_clearly(started, started.wait(60), "worker")
    goes_on(folder, run, whole, workers)


def worker_raises(folder: Path, seed: int) -> None:
    """A data worker raises an error that nobody foresaw"""
    chance, whole, run, workers = prepare("worker_raises", folder, seed)

    def fail() -> None:
        raise ZeroDivisionError("the moon is in the seventh house")

    broken = breaks_at(chance.randint(1, whole.steps // workers - 2), fail)
    started = PLAIN.start(folder, run, "saving.steps=2", f"data.workers={workers}", before=broken)
    code = started.wait(60)
    assert code == 1, f"exit code {code}: {started.said()}"
    assert "the moon is in the seventh house" in started.err, started.said()  # with its traceback, or without
    goes_on(folder, run, whole, workers)


def worker_hangs(folder: Path, seed: int) -> None:
    """A data worker hangs for longer than `data.timeout_minutes`"""
    chance, whole, run, workers = prepare("worker_hangs", folder, seed)
    hang = breaks_at(chance.randint(1, whole.steps // workers - 2), lambda: time.sleep(600))
    options = ("saving.steps=2", f"data.workers={workers}", "data.timeout_minutes=0.05")
    started = PLAIN.start(folder, run, *options, before=hang)
    ended_clearly(started, started.wait(60), "data.timeout_minutes")
    goes_on(folder, run, whole, workers)


def worker_hangs_and_run_killed(folder: Path, seed: int) -> None:
    """`kill -9` of a run whose data worker hangs"""
    chance, whole, run, workers = prepare("worker_hangs_and_run_killed", folder, seed)
    hung = folder / "hung"
    hang = breaks_at(chance.randint(1, whole.steps // workers - 2), lambda: (hung.touch(), time.sleep(600)))
    started = PLAIN.start(folder, run, "saving.steps=2", f"data.workers={workers}", before=hang)
    wait_until(lambda: hung.exists() or started.poll() is not None, 60, "no worker hangs")
    assert started.poll() is None, started.said()
    started.send(signal.SIGKILL)
    started.wait()
    goes_on(folder, run, whole, workers)  # and the runner sees to it that nothing is left


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "worker_killed": worker_killed,
    "worker_killed_and_resumed": worker_killed_and_resumed,
    "worker_raises": worker_raises,
    "worker_hangs": worker_hangs,
    "worker_hangs_and_run_killed": worker_hangs_and_run_killed,
}
