"""A disk that fills up in the middle of a run, and may be freed again; a small tmpfs that only the trial sees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_et.engine import checkpoint
from mae_et.tracking import read_metrics
from tests.engine.children import mount_tmpfs
from tests.torture.runs import (
    PLAIN,
    Skipped,
    Started,
    Whole,
    chance_of,
    check_loads,
    check_same,
    complete_checkpoints,
    last_step,
    replace_everywhere,
    whole_run,
)

EVERY = 2


def small_disk(folder: Path, size: int) -> Path:
    """Mount a tmpfs that this process and its children see, and that goes away with them.

    Raises:
        Skipped: this machine does not allow it.
    """
    disk = folder / "disk"
    disk.mkdir()
    if not mount_tmpfs(disk, size):
        raise Skipped("needs root, and a machine that lets it mount a tmpfs")
    return disk


def bytes_of(checkpoint_folder: Path) -> int:
    """What a checkpoint takes up, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in checkpoint_folder.iterdir())


def fill(disk: Path, left: int) -> None:
    """Fill the disk but for `left` bytes."""
    with (disk / "ballast").open("ab") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))


def free(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)


def watch_saves(at: Callable[[int], None], after: Callable[[int, bool], None]) -> None:
    """In this process, call `at(n)` before the n-th save, and `after(n, failed)` after it."""
    real, number = checkpoint.save_checkpoint, 0

    def save(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        number += 1
        at(number - 1)
        failed = True
        try:
            result = real(*args, **kwargs)
            failed = False
        finally:
            after(number - 1, failed)
        return result

    replace_everywhere(real, save)


def prepare(folder: Path, kind: str, seed: int) -> tuple[Any, Whole, Path, int]:
    """Chance, the whole run, a disk with room for all that is kept and one more, and a checkpoint's size."""
    whole = whole_run(PLAIN, folder)
    size = bytes_of(complete_checkpoints(whole.run)[-1])
    return chance_of(kind, seed), whole, small_disk(folder, 8 * size + (1 << 20)), size


def full_for(folder: Path, seed: int, kind: str, saves: int) -> tuple[Started, Whole, Path, Path]:
    """A run whose disk has room for half a checkpoint during `saves` saves in a row.

    Its own process checks that a save that fails leaves the folder of checkpoints as it was.
    """
    chance, whole, disk, size = prepare(folder, kind, seed)
    run, first = disk / "run", chance.randrange(1, 5)
    before: list[str] = []

    def at(number: int) -> None:
        if number == first:
            fill(disk, size // 2)
        if number == first + saves:
            free(disk)
        before[:] = sorted(path.name for path in (run / "checkpoints").iterdir())

    def after(number: int, failed: bool) -> None:
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        if failed != (first <= number < first + saves):
            print(f"WRONG save {number}: failed={failed}")
        if failed and names != before:
            print(f"WRONG save {number} left {names} of {before}")

    started = PLAIN.start(folder, run, f"saving.steps={EVERY}", "saving.keep=2", before=lambda: watch_saves(at, after))
    started.wait()
    assert "WRONG" not in started.out, started.said()
    assert "Traceback" not in started.err, started.said()
    return started, whole, run, disk


def disk_full_for_a_while(folder: Path, seed: int) -> None:
    """The disk is full during one or two saves in a row"""
    started, whole, run, _ = full_for(folder, seed, "disk_full_for_a_while", 1 + seed % 2)
    assert started.code == 0, f"the run ended: {started.said()}"
    assert "No space left on device" in started.err + started.out, f"no warning: {started.said()}"
    check_same(run, whole)


def disk_full_for_good(folder: Path, seed: int) -> None:
    """The disk stays full, and is freed when the run has ended"""
    started, whole, run, disk = full_for(folder, seed, "disk_full_for_good", 10**6)
    assert started.code == 1, f"exit code {started.code}: {started.said()}"
    assert "No space left on device" in started.err, started.said()
    kept = check_loads(run, EVERY)
    # The third save in a row that fails is the last.
    assert kept is not None
    assert last_step(run) == kept.step + 3 * EVERY, f"ended after step {last_step(run)}, saved {kept.step}"
    free(disk)
    again = PLAIN.start(folder, run, f"saving.steps={EVERY}", "saving.keep=2")
    assert again.wait() == 0, again.said()
    assert f"at step {kept.step}" in again.out, again.said()
    check_same(run, whole)


def disk_full_for_metrics(folder: Path, seed: int) -> None:
    """Not a byte left for metrics.jsonl: a row does not fit"""
    chance, whole, disk, _ = prepare(folder, "disk_full_for_metrics", seed)
    run, first = disk / "run", chance.randrange(1, 5)
    watch = lambda: watch_saves(lambda _: None, lambda number, _: fill(disk, 0) if number == first else None)  # noqa: E731
    started = PLAIN.start(folder, run, f"saving.steps={10}", "saving.keep=2", before=watch)
    code = started.wait()
    rows = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert rows == list(range(1, len(rows) + 1)), f"holes in the metrics: {rows}"
    raw = (run / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n"), "a torn row was left by a process that could have removed it"
    if len(rows) < whole.steps:
        assert code == 1, f"rows are missing, and the exit code is {code}: {started.said()}"
        assert "metrics.jsonl" in started.err, started.said()
        assert "No space left" in started.err or "free some space" in started.err, started.said()
    assert "Traceback" not in started.err, started.said()
    free(disk)
    again = PLAIN.start(folder, run, f"saving.steps={10}", "saving.keep=2")
    assert again.wait() == 0, again.said()
    check_same(run, whole)


def disk_too_small(folder: Path, seed: int) -> None:
    """A disk of 1.5 checkpoints: the first save fits, the next one cannot"""
    whole = whole_run(PLAIN, folder)
    size = bytes_of(complete_checkpoints(whole.run)[-1])
    others = 4096 * (8 + seed % 8)  # the run's other files
    run = small_disk(folder, size * 3 // 2 + others + (1 << 16)) / "run"
    started = PLAIN.start(folder, run, f"saving.steps={EVERY}", "saving.keep=1")
    code = started.wait()
    assert code == 1, f"exit code {code}: {started.said()}"
    assert "No space left on device" in started.err, started.said()
    assert "Traceback" not in started.err, started.said()
    kept = check_loads(run, EVERY)
    assert kept is not None
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"step-{kept.step:08}"], names


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "disk_full_for_a_while": disk_full_for_a_while,
    "disk_full_for_good": disk_full_for_good,
    "disk_full_for_metrics": disk_full_for_metrics,
    "disk_too_small": disk_too_small,
}
