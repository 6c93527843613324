"""Tiny runs in forked children, and what of them must repeat.

The process that forks has the package imported and no threads, so that a start costs no import: see `runner.py`.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import finetune
import pretrain
from mae_et.engine.checkpoint import Checkpoint, latest_checkpoint
from mae_et.tracking import read_metrics
from tests.end_to_end.labelled import TINY_FINETUNE, TINY_VIT, write_classes
from tests.end_to_end.tiny import CLOCKS, TINY

PATIENCE = 120  # seconds for a run that takes one or two; a busy machine may need many


class Skipped(Exception):  # noqa: N818 - not an error
    """A trial that cannot be held on this machine; says why."""


@dataclass
class Started:
    """A child that runs `body`, its standard output and error in files."""

    pid: int
    out_path: Path
    err_path: Path
    code: int | None = None

    @property
    def out(self) -> str:
        return self.out_path.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(errors="replace")

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, limit: float = PATIENCE) -> int:
        """Exit code.

        Raises:
            AssertionError: it was still running after `limit` seconds, and was killed.
        """
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                raise AssertionError(f"still running after {limit:g} s: {self.said()}")
            time.sleep(0.003)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        """The last lines of what it printed, for messages."""
        return f"[out] {self.out[-250:]} [err] {self.err[-1200:]}"


def start(body: Callable[[], Any], folder: Path, environment: dict[str, str] | None = None) -> Started:
    """Fork a child that runs `body`; an int that it returns is its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{len(list(folder.glob('*.out'))):03}"
    started = Started(0, folder / f"{name}.out", folder / f"{name}.err")
    for path in (started.out_path, started.err_path):
        path.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    started.pid = os.fork()
    if started.pid:
        return started
    code = 1
    try:
        for descriptor, path in ((1, started.out_path), (2, started.err_path)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        os.environ.update(environment or {})
        code = body() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as a process of its own would: multiprocessing ends its children there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Kind:
    """A kind of tiny run: its settings, and the command that takes them."""

    name: str
    changes: tuple[str, ...] = ()
    labelled: bool = False

    def lines(self, folder: Path, run: Path, *changes: str) -> list[str]:
        """Arguments of the command line."""
        room = shared(folder)
        if self.labelled:
            own = [*TINY_FINETUNE, *TINY_VIT, f"data={room / 'classes'}", f"run={run}"]
        else:
            own = [*TINY, f"data.root={room / 'photos'}", f"run={run}"]
        return [
            "--config",
            str(room / ("finetune.yaml" if self.labelled else "empty.yaml")),
            *own,
            *self.changes,
            *changes,
        ]

    def main(self, lines: Sequence[str]) -> int:
        return (finetune if self.labelled else pretrain).main(list(lines))

    def start(
        self, folder: Path, run: Path, *changes: str, before: Callable[[], Any] = lambda: None, **environment: str
    ) -> Started:
        """A start, or restart, of the run; `before` is called first in its process."""
        lines = self.lines(folder, run, *changes)

        def body() -> int:
            before()
            return self.main(lines)

        return start(body, folder / "logs", environment)


PLAIN = Kind("plain")


def shared(folder: Path) -> Path:
    """What trials side by side have in common: photos, empty configurations, and runs that nothing interrupted."""
    room = folder.parent / "shared"
    room.mkdir(parents=True, exist_ok=True)
    with locked(room / "lock"):
        if not (room / "ready").exists():
            for path in (room / "photos", room / "classes"):
                shutil.rmtree(path, ignore_errors=True)
            write_photos(room / "photos")
            write_classes(room / "classes")
            (room / "empty.yaml").write_text("{}\n")
            (room / "finetune.yaml").write_text("task: finetune\n")
            (room / "ready").touch()
    return room


def write_photos(folder: Path, count: int = 45) -> None:
    """Small PNGs; passes of five batches of 8 leave images over."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 255, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((28, 24)).save(folder / f"{index:02}.png")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The block in one process at a time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted, with a checkpoint of every step."""

    run: Path
    seconds: float
    rows: list[dict[str, Any]] = field(repr=False)
    weights: str

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])


def whole_run(kind: Kind, folder: Path) -> Whole:
    """The uninterrupted run of a kind; made once, by whoever needs it first."""
    room = shared(folder)
    run, clock = room / kind.name, room / f"{kind.name}.seconds"
    with locked(room / f"{kind.name}.lock"):
        if not clock.exists():
            shutil.rmtree(run, ignore_errors=True)
            scratch = room / f"{kind.name}.starts"
            for changes in (("saving.steps=1", "saving.keep=1000"), ("saving.steps=2",)):
                target = run if "saving.keep=1000" in changes else scratch / "timed"
                # The second only for its time, that of a run as the trials start it.
                shutil.rmtree(target, ignore_errors=True)
                began, lines = time.monotonic(), kind.lines(folder, target, *changes)
                started = start(lambda lines=lines: kind.main(lines), scratch)
                assert started.wait() == 0, f"the uninterrupted run failed: {started.said()}"
            check_same(scratch / "timed", Whole(run, 0, history(run), weights(run)))
            clock.write_text(str(time.monotonic() - began))
    return Whole(run, float(clock.read_text()), history(run), weights(run))


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders in their final place, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def weights(run: Path) -> str:
    """Hash of the newest checkpoint's weights and moments."""
    newest = complete_checkpoints(run)[-1]
    files = [newest / name for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def history(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in rows]


def rows_written(run: Path) -> int:
    """Lines of the metrics file, also while somebody writes it."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def last_step(run: Path) -> int:
    """Step of the last whole row of metrics; 0 where there is none."""
    rows = read_metrics(run / "metrics.jsonl") if rows_written(run) else []
    return int(rows[-1]["step"]) if rows else 0


def check_same(run: Path, whole: Whole, why: str = "") -> None:
    """The run has the metrics and the weights of the one that nothing interrupted.

    Raises:
        AssertionError: naming the first step that differs.
    """
    rows = history(run)
    for ours, theirs in zip(rows, whole.rows):
        keys = [key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)]
        assert not keys, f"{why} metrics differ at step {theirs['step']}: {sorted(keys)}"
    assert len(rows) == len(whole.rows), f"{why} {len(rows)} rows of metrics instead of {len(whole.rows)}"
    assert weights(run) == whole.weights, f"{why} metrics are the same and weights are not"


def check_loads(run: Path, at_least: int) -> Checkpoint | None:
    """A checkpoint loads without complaint, of step `at_least` or later; None where 0 is asked and there is none."""
    complaints: list[str] = []
    found = latest_checkpoint(run / "checkpoints", complaints.append)
    assert not complaints, f"a kill broke a checkpoint: {complaints}"
    assert (0 if found is None else found.step) >= at_least, f"only step {found and found.step}, {at_least} was saved"
    return found


def copy_at(step: int, whole: Whole, run: Path, keep: int = 1) -> Path:
    """A run folder as a run killed some time after saving `step` leaves it, with the last `keep` checkpoints."""
    shutil.copytree(whole.run, run, ignore=shutil.ignore_patterns("step-*", "report*", "status.json"))
    for kept in range(max(1, step - keep + 1), step + 1):
        name = f"step-{kept:08}"
        shutil.copytree(whole.run / "checkpoints" / name, run / "checkpoints" / name)
    return run


def replace_everywhere(original: Any, replacement: Any) -> None:
    """Put `replacement` where any module of the package holds `original`; for children, which end with it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mae_et") and module is not None:
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, replacement)


def wait_until(true: Callable[[], bool], limit: float, why: str) -> None:
    """Poll.

    Raises:
        AssertionError: with `why`, when it has not come true in `limit` seconds.
    """
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"{why}, not within {limit:g} s"
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    """Direct children, such as data workers."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def chance_of(kind: str, seed: int) -> random.Random:
    """Random numbers of a trial."""
    return random.Random(f"{kind} {seed}")
