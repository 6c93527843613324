"""Two runs in one folder, folders that cannot be used, and a holder that is killed while its worker lives on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.torture.runs import (
    PLAIN,
    chance_of,
    check_same,
    children_of,
    complete_checkpoints,
    rows_written,
    start,
    wait_until,
    whole_run,
)


def two_runs(folder: Path, seed: int) -> None:
    """A second run in the folder of one that runs"""
    chance, whole, run = chance_of("two_runs", seed), whole_run(PLAIN, folder), folder / "run"
    first = PLAIN.start(folder, run, "saving.steps=2")
    row = chance.randint(1, whole.steps // 2)
    wait_until(lambda: rows_written(run) >= row or first.poll() is not None, 60, f"row {row} did not come")
    assert first.poll() is None, first.said()
    first.send(signal.SIGSTOP)  # so that it is there for certain, and changes nothing meanwhile
    before = files_of(run)
    second = PLAIN.start(folder, run, "saving.steps=2")
    code = second.wait(20)
    after = files_of(run)
    first.send(signal.SIGCONT)
    assert code == 1, f"the second run was not refused: {second.said()}"
    assert f"is in use by process {first.pid} " in second.err, second.said()
    assert before == after, "the second run changed the folder"
    assert first.wait() == 0, first.said()
    check_same(run, whole)


def files_of(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.is_file()}


def dead_holder(folder: Path, seed: int) -> None:
    """`kill -9` of a run with a data worker that is stopped; the same command at once"""
    chance, whole, run = chance_of("dead_holder", seed), whole_run(PLAIN, folder), folder / "run"
    first = PLAIN.start(folder, run, "saving.steps=2", "data.workers=1")
    row = chance.randint(1, whole.steps // 2)
    wait_until(lambda: rows_written(run) >= row or first.poll() is not None, 60, f"row {row} did not come")
    assert first.poll() is None, first.said()
    workers = children_of(first.pid)
    assert workers, "no data worker"
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # it cannot notice that its run is dead
    first.send(signal.SIGKILL)
    first.wait()
    saved = complete_checkpoints(run)
    second = PLAIN.start(folder, run, "saving.steps=2")
    code = second.wait()
    left = [pid for pid in workers if Path(f"/proc/{pid}/stat").exists()]
    assert not left, "the worker outlived its run"
    assert code == 0, f"the folder of a dead run was not free: {second.said()}"
    assert not saved or "resuming from" in second.out, second.said()
    check_same(run, whole)


def race_for_a_folder(folder: Path, seed: int) -> None:
    """Four runs started in one folder at the same moment"""
    whole, run = whole_run(PLAIN, folder), folder / "run"
    runs = [PLAIN.start(folder, run, "saving.steps=2") for _ in range(4)]
    codes = [one.wait() for one in runs]
    assert set(codes) <= {0, 1}, codes
    assert 0 in codes, [one.said() for one in runs]
    for one in runs:
        assert one.code == 0 or "is in use by process" in one.err, one.said()
    check_same(run, whole)


def unusable_folder(folder: Path, seed: int) -> None:
    """A run folder that is a file, lies under one, or may not be written"""
    whole_run(PLAIN, folder)
    kind = ("a file", "under a file", "not writable", "no such mount")[seed % 4]
    run = folder / "run"
    if kind == "a file":
        run.write_text("mine")
    elif kind == "under a file":
        run.write_text("mine")
        run = run / "deeper" / "run"
    elif kind == "not writable":
        run = Path("/proc/torture/run")
    else:
        run = Path("/sys/kernel/torture")
    lines = PLAIN.lines(folder, run, "saving.steps=2")
    started = start(lambda: PLAIN.main(lines), folder / "logs")
    assert started.wait(30) == 1, started.said()
    assert started.err.startswith(f"error: cannot use {run} as the run folder"), started.said()
    assert started.err.count("\n") == 1, started.said()
    if kind == "a file":
        assert run.read_text() == "mine", "a file was overwritten"


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "two_runs": two_runs,
    "dead_holder": dead_holder,
    "race_for_a_folder": race_for_a_folder,
    "unusable_folder": unusable_folder,
}
