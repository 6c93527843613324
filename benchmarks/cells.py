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


def run_cell(name: str, cell: dict[str, Any], runs: Path, settings: list[str], places: dict[str, str]) -> list[float]:
    """All seeds of a cell; the scores that it has."""
    found = []
    for seed in cell.get("seeds", [0]):
        run = runs / (name if len(cell.get("seeds", [0])) == 1 else f"{name}-{seed}")
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
            spread = f" ± {100 * statistics.stdev(found):.2f}" if len(found) > 1 else ""
            rows[name] = f"| {cell.get('title', name)} | {100 * statistics.mean(found):.2f}{spread} | {len(found)} |"
    print("\n| cell | test accuracy, % | seeds |\n|---|---|---|")
    print("\n".join(rows.values()))


if __name__ == "__main__":
    main()
