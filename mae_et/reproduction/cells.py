"""Running cells: a command for each seed, each in a process of its own; what is done is left as it is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mae_et.config import ConfigError
from mae_et.reproduction.experiments import PROBES, REPOSITORY, STUDIES, TRAINING, Cell, Scale, fill
from mae_et.tracking.jsonl import read_metrics

MARKER = "cell.json"
# Files in which programs leave their results, and where in them the accuracy is, the first that is there.
RESULTS = {"report.json": ("test.top1",), "scores.json": ("scores.top1", "scores.top1_k20")}

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


def make(run: Run, say: Say, launch: Sequence[str] = ()) -> None:
    """Start a run, or go on with it; its output is in <folder>.log.

    Raises:
        RuntimeError: the program failed; with the end of its output.
    """
    line, log = command_line(run, launch), run.folder.parent / f"{run.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("a") as output:
        done = subprocess.run(line, cwd=REPOSITORY, check=False, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{run.cell.name}, seed {run.seed} failed ({log}):\n{' '.join(line)}\n{tail}")
    seconds = time.perf_counter() - started
    run.folder.mkdir(exist_ok=True)
    written = run.folder / f"{MARKER}.tmp"
    written.write_text(json.dumps({"command": run.words, "seed": run.seed, "seconds": seconds}, indent=1))
    written.replace(run.folder / MARKER)
    say(f"{run.cell.name}, seed {run.seed}: {seconds:.0f} s")


def score(run: Run) -> float | None:
    """Test accuracy in [0, 1]; None for runs that have none, or not yet."""
    if run.cell.program not in (*TRAINING, *PROBES):
        return None
    for name, keys in RESULTS.items():
        path = run.folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        for key in keys:
            value = _lookup(found, key)
            if value is not None:
                return float(value)
    return None


def _lookup(values: Any, key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def spent(run: Run) -> tuple[float, float] | None:
    """(FLOPs, minutes) of a run's training; None where nothing was trained."""
    path = run.folder / "metrics.jsonl"
    found = [row for row in read_metrics(path) if "compute/flops" in row] if path.exists() else []
    return (found[-1]["compute/flops"], 60 * found[-1]["time/hours"]) if found else None
