"""Holds trials side by side, each in a process of its own, and writes down how they went.

    python -m tests.torture --short
    python -m tests.torture --kinds kill,bit_flip --trials kill=10 --log runs/torture/log.jsonl

A trial is `trial(folder, seed)`, which raises AssertionError. It runs in a forked process that leads a session, so
that whatever it starts can be found: a trial after which a process lives on has failed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.processes import MARK, adopt_orphans, end_all, left_behind
from tests.torture.runs import Skipped

Trial = Callable[[Path, int], None]

LIMIT = 900  # seconds of a trial
GRACE = 30  # seconds for a killed run's workers: torch's look for their parent every 5 s, ours hold out for 30 at most


@dataclass
class Held:
    """A trial that is being held, or whose processes are being waited for."""

    kind: str
    seed: int
    folder: Path
    pid: int
    result: Path
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    message: str = ""

    @property
    def mark(self) -> str:
        return str(self.folder)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; a torn last line is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def drop_torn_line(path: Path) -> None:
    """Remove what a runner that was killed has not finished writing."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def run_trials(
    trials: Mapping[str, Trial], counts: Mapping[str, int], log: Path, work: Path, jobs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Hold all trials that the log does not have yet, `jobs` at a time; returns the log's rows of these kinds."""
    adopt_orphans()
    log.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(log)
    done = {(row["kind"], row["seed"]) for row in read_log(log)}
    waiting = deque(pair for pair in interleaved(counts) if pair not in done)
    total, held = len(waiting), []
    say(f"{total} trials, {len(done)} in {log} already")
    finished = 0
    try:
        while waiting or held:
            while waiting and sum(one.ended is None for one in held) < jobs:
                kind, seed = waiting.popleft()
                held.append(begin(trials[kind], kind, seed, work / f"{kind}-{seed}"))
            time.sleep(0.02)
            reap(held)
            for one in list(held):
                row = conclude(one)
                if row is not None:
                    held.remove(one)
                    finished += 1
                    append(log, row)
                    say(
                        f"{finished}/{total} {row['kind']} {row['seed']}: {row['outcome']} ({row['seconds']} s)"
                        + (f"\n    {row['message']}" if row["message"] else "")
                    )
    finally:
        for one in held:
            end_all(left_behind(one.pid, one.mark))
    wanted = {(kind, seed) for kind, count in counts.items() for seed in range(count)}
    return [row for row in read_log(log) if (row["kind"], row["seed"]) in wanted]


def interleaved(counts: Mapping[str, int]) -> Sequence[tuple[str, int]]:
    """(kind, seed) such that a run that is cut short has held some of every kind."""
    pairs = [(seed / count, kind, seed) for kind, count in counts.items() for seed in range(count)]
    return [(kind, seed) for _, kind, seed in sorted(pairs)]


def begin(trial: Trial, kind: str, seed: int, folder: Path) -> Held:
    """Fork a process that holds one trial."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = folder / "result.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Held(kind, seed, folder, pid, result)
    code = 1
    try:
        os.setsid()
        os.environ[MARK] = str(folder)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        trial(folder, seed)
        code = 0
    except Skipped as reason:
        result.write_text(str(reason))
        code = 77
    except AssertionError as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        result.write_text(f"{error or line.line} [{Path(line.filename).name}:{line.lineno}]")
    except BaseException:
        result.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def reap(held: list[Held]) -> None:
    """Collect ended trials, and orphans that this process has adopted; end trials that take too long."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        for one in held:
            if one.pid == pid:
                one.ended, code = time.monotonic(), os.waitstatus_to_exitcode(status)
                text = one.result.read_text() if one.result.exists() else ""
                one.message = "" if code == 0 else f"skipped: {text}" if code == 77 else text or f"exit code {code}"
    for one in held:
        if one.ended is None and time.monotonic() - one.began > LIMIT:
            one.message = f"not over after {LIMIT} s"
            end_all({one.pid: "", **left_behind(one.pid, one.mark)})
            one.ended = time.monotonic()


def conclude(one: Held) -> dict[str, Any] | None:
    """The log's row of a trial that is over; None while it runs or something that it started still lives."""
    if one.ended is None:
        return None
    left = left_behind(one.pid, one.mark)
    if left and time.monotonic() - one.ended < GRACE:
        return None
    if left:
        one.message += f" left running: {left}"
        end_all(left)
    outcome = "skipped" if one.message.startswith("skipped: ") else "FAILED" if one.message else "passed"
    if outcome == "FAILED":
        one.message += f" (its files: {one.folder})"
    else:
        shutil.rmtree(one.folder, ignore_errors=True)
    seconds = round(one.ended - one.began, 2)
    return {"kind": one.kind, "seed": one.seed, "seconds": seconds, "outcome": outcome, "message": one.message.strip()}


def append(log: Path, row: Mapping[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per kind: trials, passed, failed, skipped, seconds; then the failures."""
    lines = [f"{'kind':28} {'trials':>7} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        by = [sum(row["outcome"] == outcome for row in of_kind) for outcome in ("passed", "FAILED", "skipped")]
        seconds = sum(row["seconds"] for row in of_kind)
        lines.append(f"{kind:28} {len(of_kind):7} {by[0]:7} {by[1]:7} {by[2]:8} {seconds:8.0f}")
    failed = [row for row in rows if row["outcome"] == "FAILED"]
    lines += [f"FAILED {row['kind']} {row['seed']}: {row['message']}" for row in failed]
    return "\n".join(lines)
