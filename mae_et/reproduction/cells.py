"""Running cells: a command for each seed, each in a process of its own; what is done is left as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from mae_et.config import ConfigError
from mae_et.reproduction.experiments import PROBES, REPOSITORY, STUDIES, TRAINING, Cell, Scale, fill
from mae_et.tracking.jsonl import read_metrics

MARKER = "cell.json"
# Files in which programs leave their results, and where in them the accuracy is, the first that is there.
RESULTS = {"report.json": ("test.top1",), "scores.json": ("scores.top1", "scores.top1_k20")}
# Scores that pretraining took of itself, in its metrics.
PRETRAINING_SCORES = ("eval/probe", "eval/knn20")

Say = Callable[[str], None]


class Run(NamedTuple):
    """One seed of a cell: its folder, and its command without folder and seed, by which it is recognised."""

    cell: Cell
    seed: int
    folder: Path
    words: list[str]


def run_folder(scale: Scale, cell: Cell, seed: int) -> Path:
    """Where a run is; programs run in the repository's root, of which relative folders are."""
    return scale.runs / (cell.name if len(cell.seeds) == 1 else f"{cell.name}-{seed}")


def runs_of(scale: Scale, cell: Cell, places: Mapping[str, str]) -> list[Run]:
    """The runs of a cell, with the folders of earlier cells in place of their names.

    A cell that uses another takes its run of the same seed, or the only one it has.

    Raises:
        ConfigError: a name in braces that is neither an earlier cell nor a place.
    """
    found, earlier = [], list(scale.cells.values())[: list(scale.cells).index(cell.name)]
    for seed in cell.seeds:
        folders = {
            other.name: str(run_folder(scale, other, seed if seed in other.seeds else other.seeds[0]))
            for other in earlier
        }
        words = fill(cell.words, {**folders, **places})
        if cell.program in (*TRAINING, *PROBES):
            words += scale.settings
        elif cell.program == "search":
            words += [word for word in scale.settings if word.startswith(("engine.", "saving."))]
        found.append(Run(cell, seed, REPOSITORY / run_folder(scale, cell, seed), words))
    return found


def command_line(run: Run, launch: Sequence[str] = ()) -> list[str]:
    """The whole command, with folder and seed; `launch` starts training in place of Python, such as torchrun."""
    program, *words = run.words
    start = [program] if program.endswith(".py") else ["-m", "mae_et", program]
    if launch and program in TRAINING:
        return [*launch, program, *words, f"run={run.folder}", f"seed={run.seed}", "tracking.console=false"]
    if program in STUDIES:
        return [sys.executable, *start, *words, "--folder", str(run.folder)]
    ends = [f"run={run.folder}", f"seed={run.seed}"]
    quiet = ["tracking.console=false"] if program != "search" else []
    return [sys.executable, *start, *words, *ends, *quiet]


def is_done(run: Run) -> bool:
    """Whether a run has been made.

    Raises:
        ConfigError: its folder was made by another command.
    """
    marker = run.folder / MARKER
    if marker.exists():
        made = json.loads(marker.read_text())["command"]
        if made != run.words:
            raise ConfigError(
                f"{run.folder} was made by another command:\n  {' '.join(made)}\nand now it is\n  "
                f"{' '.join(run.words)}\nremove it, or choose another folder with --runs"
            )
        return True
    # A pretraining run without a mark is asked to continue, which ends at once where it is complete.
    return any((run.folder / name).exists() for name in RESULTS)


def make_all(runs: Sequence[Run], jobs: int, say: Say, launch: Sequence[str] = ()) -> None:
    """Make what is missing of some runs, in their order, each after those whose folders it names.

    Args:
        runs: with those that others use.
        jobs: how many at a time.
        say, launch: see `make`.

    Raises:
        RuntimeError: a run failed; those that had begun are waited for, and no other is started.
        ConfigError: a folder was made by another command.
    """
    missing = {run.folder: run for run in runs if not is_done(run)}
    begun: dict[Path, Future[None]] = {}

    def one(run: Run, needed: Sequence[Future[None]]) -> None:
        for other in needed:
            other.result()
        make(run, say, launch)

    with ThreadPoolExecutor(jobs) as pool:

        def begin(run: Run) -> None:
            if run.folder in begun:
                return
            # What a run needs begins before it, so that no worker waits for what none has begun.
            needed = [place for word in run.words if (place := REPOSITORY / word.rpartition("=")[2]) in missing]
            for place in needed:
                begin(missing[place])
            begun[run.folder] = pool.submit(one, run, [begun[place] for place in needed])

        try:
            for run in missing.values():
                begin(run)
            done, _rest = wait(begun.values(), return_when=FIRST_EXCEPTION)
        finally:
            for future in begun.values():
                future.cancel()
    for future in done:
        future.result()


def make(run: Run, say: Say, launch: Sequence[str] = ()) -> None:
    """Start a run, or go on with it; its output is in <folder>.log.

    Raises:
        RuntimeError: the program failed; with the end of its output.
    """
    line, log = command_line(run, launch), run.folder.parent / f"{run.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("a") as output:
        process = subprocess.Popen(line, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen's own, it says what the process used
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{run.cell.name}, seed {run.seed} failed ({log}):\n{' '.join(line)}\n{tail}")
    seconds = time.perf_counter() - started
    run.folder.mkdir(exist_ok=True)
    written = run.folder / f"{MARKER}.tmp"
    values = {
        "command": run.words,
        "seed": run.seed,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    written.write_text(json.dumps(values, indent=1))
    written.replace(run.folder / MARKER)
    say(f"{run.cell.name}, seed {run.seed}: {seconds:.0f} s")


def score(run: Run, which: str = "") -> float | None:
    """Accuracy in [0, 1], on test images unless the command says otherwise; None for runs that have none, or not yet.

    Args:
        run: a seed of a cell.
        which: one of `RESULTS` or `PRETRAINING_SCORES`; "" takes the first that is there.
    """
    if run.cell.program not in (*TRAINING, *PROBES):
        return None
    metrics = run.folder / "metrics.jsonl"
    if run.cell.program == "pretrain.py" and metrics.exists():
        rows = read_metrics(metrics)
        names = [which] if which else PRETRAINING_SCORES
        return next((row[name] for name in names for row in reversed(rows) if name in row), None)
    for name, keys in RESULTS.items():
        path = run.folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        for key in [which] if which else keys:
            value = _lookup(found, key)
            if value is not None:
                return float(value)
    return None


def _lookup(values: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


class Spent(NamedTuple):
    """What a run's training took.

    `core_minutes` are the minutes times the cores that the last process of the run had in the mean, start-up and scores
    included, so that other work on the machine hardly changes them. A run that was interrupted for long, or stopped, is
    better made again. None where they were not kept.
    """

    flops: float
    minutes: float
    core_minutes: float | None


def spent(run: Run) -> Spent | None:
    """What a run's training took; None where nothing was trained."""
    path = run.folder / "metrics.jsonl"
    found = [row for row in read_metrics(path) if "compute/flops" in row] if path.exists() else []
    if not found:
        return None
    marker, minutes = run.folder / MARKER, 60 * found[-1]["time/hours"]
    made = json.loads(marker.read_text()) if marker.exists() else {}
    cores = made["cpu_seconds"] / made["seconds"] if "cpu_seconds" in made else None
    return Spent(found[-1]["compute/flops"], minutes, None if cores is None else minutes * cores)
