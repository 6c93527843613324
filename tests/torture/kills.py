"""Runs that are killed, or signalled, at random instants, and started again until they are complete."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.torture.runs import (
    PLAIN,
    Kind,
    Started,
    Whole,
    chance_of,
    check_loads,
    check_same,
    complete_checkpoints,
    history,
    last_step,
    rows_written,
    whole_run,
)

KILLS = 3  # of a trial; each is followed by a start that continues
SAVING = "saving.steps=2"

ACCUMULATION = Kind("accumulation", ("optim.accumulation=2",))
REPLAY = Kind("replay", ("epochs=4", "replay.ratio=1", "replay.gigabytes=12.5e-6"))
LARGE_BATCH = Kind("early_large_batch", ("curriculum.early_large_batch=true", "curriculum.lr_cap=1"))
SELECTION = Kind("infobatch", ("selection.method=infobatch", "epochs=4"))
FINETUNE = Kind("finetune", ("epochs=3",), labelled=True)

Start = Callable[[], Started]


def random_instant(chance: random.Random, whole: Whole, run: Path, started: Started) -> None:
    """Wait for one: half of them anywhere in a run's time, half some time after one of the rows to come.

    The second half makes up for machines that have become slower since the run's time was taken.
    """
    if chance.random() < 0.5:
        end, row = time.monotonic() + chance.uniform(0, whole.seconds), None
    else:
        end, row = None, chance.randint(rows_written(run), max(rows_written(run), whole.steps - 1))
    while started.poll() is None:
        if end is not None and time.monotonic() >= end:
            return
        if row is not None and rows_written(run) >= row:
            end, row = time.monotonic() + chance.uniform(0, 0.03), None
        time.sleep(0.001)


def newest_step(run: Path) -> int:
    found = complete_checkpoints(run)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def check_start(started: Started, before: int) -> None:
    """A start that found a checkpoint has said which one it continues from; it has not begun anew."""
    if before and "starting at step 0" in started.out:
        raise AssertionError(f"began at step 0 though step {before} was saved: {started.said()}")
    if before and started.code == 0:
        assert f"step-{before:08} at step {before}" in started.out, f"did not resume from {before}: {started.said()}"


def complete(kind: Kind, folder: Path, run: Path, whole: Whole, start: Start, why: str) -> None:
    """Start the run a last time, and compare what it comes to."""
    before = newest_step(run)
    last = start()
    assert last.wait() == 0, f"{why} the run did not complete: {last.said()}"
    check_start(last, before)
    check_same(run, whole, why)


def kill_and_resume(
    kind: Kind,
    folder: Path,
    seed: int,
    workers: tuple[int, ...] = (0,),
    between: Callable[[Path], None] = lambda _run: None,
    before: Callable[[], Any] = lambda: None,
) -> None:
    """Kill runs until `KILLS` kills have hit, resume each, and compare every one that completes."""
    chance, whole = chance_of(kind.name, seed), whole_run(kind, folder)
    number, kills, run = 0, 0, folder / "run-0"

    def start() -> Started:
        return kind.start(folder, run, SAVING, f"data.workers={chance.choice(workers)}", before=before)

    while kills < KILLS:
        saved = newest_step(run)
        attempt = start()
        random_instant(chance, whole, run, attempt)
        if attempt.poll() is None:
            attempt.send(signal.SIGKILL)
        code = attempt.wait()
        assert code in (0, -signal.SIGKILL), f"failed by itself with {code}: {attempt.said()}"
        check_start(attempt, saved)
        if code == 0:  # too late: it was complete
            check_same(run, whole)
            number += 1
            run = folder / f"run-{number}"
            continue
        kills += 1
        # Nothing saved is lost: with the row of a step, the save of the last even step before it is over.
        check_loads(run, max(saved, (last_step(run) - 1) // 2 * 2))
        between(run)
    complete(kind, folder, run, whole, start, f"after {kills} kills:")


def reverse_clocks(run: Path) -> None:
    """Older checkpoints get later times, and the file of metrics one in the future."""
    now = time.time()
    for age, path in enumerate(reversed(complete_checkpoints(run))):
        for file in (*path.iterdir(), path):
            os.utime(file, (now, now - 1e6 + 1e5 * age))
    for path in run.glob("*.*"):
        os.utime(path, (now, now + 1e7))


def run_clock_backwards() -> None:
    """The wall clock of this process goes an hour back with every look."""
    began, looks = time.time(), 0

    def backwards() -> float:
        nonlocal looks
        looks += 1
        return began - 3600.0 * looks

    time.time = backwards


def kill(folder: Path, seed: int) -> None:
    """`kill -9` at any moment"""
    kill_and_resume(PLAIN, folder, seed)


def kill_workers(folder: Path, seed: int) -> None:
    """`kill -9`, each start with 0, 1, 2 or 4 data workers"""
    kill_and_resume(PLAIN, folder, seed, workers=(0, 1, 2, 4))


def kill_clock(folder: Path, seed: int) -> None:
    """`kill -9` under a clock that goes backwards, files with reversed times"""
    kill_and_resume(PLAIN, folder, seed, between=reverse_clocks, before=run_clock_backwards)


def signals(folder: Path, seed: int) -> None:
    """SIGTERM, SIGINT or SIGUSR1 at any moment, mixed with `kill -9`"""
    chance, whole, run = chance_of("signals", seed), whole_run(PLAIN, folder), folder / "run"
    wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL]
    chance.shuffle(wanted)

    def start() -> Started:
        return PLAIN.start(folder, run, "saving.steps=5")

    for number in wanted:
        saved = newest_step(run)
        attempt = start()
        random_instant(chance, whole, run, attempt)
        if attempt.poll() is None:
            attempt.send(number)
        code = attempt.wait(60)
        check_start(attempt, saved)
        if code == 128 + number and "saved at step" in attempt.out:
            rows = history(run)
            assert rows, attempt.said()
            assert newest_step(run) == rows[-1]["step"], f"{number.name} lost steps: {attempt.said()}"
        else:
            # Before the training loop listens, a signal does what it does to any program.
            assert code in (0, -number, 128 + number), f"{number.name}: exit code {code}: {attempt.said()}"
            check_loads(run, saved)
    complete(PLAIN, folder, run, whole, start, "after signals:")


def two_signals(folder: Path, seed: int) -> None:
    """A second signal while the first is being answered"""
    chance, whole, run = chance_of("two_signals", seed), whole_run(PLAIN, folder), folder / "run"

    def start() -> Started:
        return PLAIN.start(folder, run, SAVING)

    attempt = start()
    random_instant(chance, whole, run, attempt)
    for _ in range(2):
        if attempt.poll() is None:
            attempt.send(signal.SIGTERM)
            time.sleep(chance.uniform(0, 0.01))
    code = attempt.wait(60)
    assert code in (0, 143, -signal.SIGTERM), f"exit code {code}: {attempt.said()}"
    check_loads(run, 0)
    complete(PLAIN, folder, run, whole, start, "after two signals:")


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "kill": kill,
    "kill_workers": kill_workers,
    "kill_accumulation": partial(kill_and_resume, ACCUMULATION),
    "kill_replay": partial(kill_and_resume, REPLAY),
    "kill_large_batch": partial(kill_and_resume, LARGE_BATCH),
    "kill_infobatch": partial(kill_and_resume, SELECTION, workers=(0, 1)),
    "kill_finetune": partial(kill_and_resume, FINETUNE, workers=(0, 2)),
    "kill_clock": kill_clock,
    "signals": signals,
    "two_signals": two_signals,
}
