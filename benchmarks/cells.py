"""Run the cells of a table one after the other and print it: `python benchmarks/cells.py benchmarks/<table>.yaml`.

A cell is a command and a number of seeds. Runs that have their result are left as they are, and an interrupted one
continues, so that the command can be repeated until the table is whole; the same cell means the same command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = {"finetune.py": "report.json", "linear_probe.py": "scores.json", "knn": "scores.json", "pretrain.py": None}


def command(words: list[str], run: Path, seed: int) -> list[str]:
    """The command line of a cell with its folder and seed."""
    program = ["-m", "mae_et", *words] if words[0] == "knn" else words
    return [sys.executable, *program, f"run={run}", f"seed={seed}", "tracking.console=false"]


def is_done(run: Path, words: list[str]) -> bool:
    """Whether a run has its result; a pretraining run is asked to continue, which ends at once where it is complete."""
    result = RESULTS[words[0]]
    return result is not None and (run / result).exists()


def score(run: Path, words: list[str]) -> float | None:
    """Test accuracy of a run; None for a pretraining run."""
    result = RESULTS[words[0]]
    if result is None:
        return None
    found: dict[str, Any] = json.loads((run / result).read_text())
    if result == "report.json":
        return found["test"]["top1"]
    scores = found["scores"]
    return scores["top1"] if "top1" in scores else scores["top1_k20"]


def spent(run: Path) -> tuple[float, float] | None:
    """(FLOPs, minutes) of a run's training; None where nothing was trained."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if "compute/flops" in row]
    return (found[-1]["compute/flops"], 60 * found[-1]["time/hours"]) if found else None


def table_row(title: str, runs: list[Path], found: list[float]) -> str:
    """Mean and deviation of the accuracy, compute and median minutes of training."""
    spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
    costs = [cost for run in runs if (cost := spent(run)) is not None]
    compute = f"{costs[0][0] / 1e12:.1f}" if costs else ""
    minutes = f"{statistics.median(cost[1] for cost in costs):.1f}" if costs else ""
    return f"| {title} | {100 * statistics.mean(found):.1f}{spread} | {compute} | {minutes} | {len(found)} |"


def folders(name: str, cell: dict[str, Any], runs: Path) -> dict[int, Path]:
    """Where the run of each seed is."""
    seeds = cell.get("seeds", [0])
    return {seed: runs / (name if len(seeds) == 1 else f"{name}-{seed}") for seed in seeds}


def run_cell(name: str, cell: dict[str, Any], runs: Path, settings: list[str], places: dict[str, str]) -> list[float]:
    """All seeds of a cell; the scores that it has."""
    found = []
    for seed, run in folders(name, cell, runs).items():
        words = [word.format(**places) if "=" in word else word for word in cell["command"].split()]
        if not is_done(run, words):
            started = time.perf_counter()
            line = command([*words, *settings], run, seed)
            done = subprocess.run(line, cwd=REPOSITORY, check=False, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, seed {seed} failed:\n{' '.join(line)}\n{done.stderr}")
            print(f"{name}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
        value = score(run, words)
        if value is not None:
            found.append(value)
    return found


def main() -> None:
    """Run what is missing, print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="a YAML file: runs, settings, cells")
    parser.add_argument("--set", nargs="*", default=[], metavar="name=path", help="places that the commands name in {}")
    options = parser.parse_args()
    places = dict(pair.split("=", 1) for pair in options.set)
    table = yaml.safe_load(Path(options.table).read_text())
    runs = Path(table["runs"])
    rows = {}
    for name, cell in table["cells"].items():
        found = run_cell(name, cell, runs, table.get("settings", []), places)
        if found:
            rows[name] = table_row(cell["title"], list(folders(name, cell, runs).values()), found)
    print("\n| run | test accuracy, % | training, TFLOPs | training, min | seeds |\n|---|---|---|---|---|")
    print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
