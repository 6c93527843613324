"""Whether a calibrated plan's time is a run's real time: `python benchmarks/calibration.py [--minutes 2] [--runs DIR]`.

Calibrates, plans and runs three models on Fashion-MNIST, one after another, each with a budget in minutes; prints a
Markdown table of predicted and real training time. Meant for a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from tempfile import mkdtemp

from mae_et.config import load_config
from mae_et.curriculum import Plan
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.time_table import time_table
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.pretraining import pretrain

MODELS = {
    "ViT 64 x 4": ["model.width=64", "model.depth=4", "model.heads=2"],
    "ViT 96 x 6": ["model.width=96", "model.depth=6", "model.heads=3"],
    "ViT 192 x 6": ["model.width=192", "model.depth=6", "model.heads=3"],
}


def row(name: str, changes: list[str], options: argparse.Namespace, folder: Path) -> tuple[float, str]:
    """Run one model; (real time over predicted time, a row of the table)."""
    budget = [f"budget={options.minutes} minutes", f"run={folder}", "tracking.console=false", "tracking.pictures=false"]
    config = load_config(options.config, [*changes, *budget, *options.overrides])
    loads = [os.getloadavg()[0]]
    assert pretrain(config) == 0, folder
    loads.append(os.getloadavg()[0])
    calibration = Calibration.from_json((folder / "calibration.json").read_text())
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    plan = Plan.from_dict(json.loads((folder / "plan.json").read_text()))
    print(time_table(plan, calibration), flush=True)
    predicted, real = calibration.seconds(plan.stages), checkpoint.state["seconds"]
    cells = [
        name,
        f"{plan.total_steps:,}",
        ", ".join(f"{1000 * calibration.seconds_per_step(stage):.1f}" for stage in plan.stages),
        f"{predicted:.1f} ±{100 * calibration.uncertainty(plan.stages):.0f} %",
        f"{real:.1f}",
        f"{100 * (real / predicted - 1):+.1f} %",
        f"{loads[0]:.1f} to {loads[1]:.1f}",
    ]
    return real / predicted, f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the three models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/pretrain/demo.yaml")
    parser.add_argument("--minutes", type=float, default=2.0, help="the budget of each run")
    parser.add_argument("--runs", help="a new folder for the runs; default: a temporary one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    runs = Path(options.runs or mkdtemp(prefix="calibration-"))
    done = [row(name, changes, options, runs / f"model-{i}") for i, (name, changes) in enumerate(MODELS.items())]
    print("\n| model | steps | ms/step by stage | predicted s | real s | real - predicted | load |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(line for _, line in done))
    worst = max(abs(ratio - 1) for ratio, _ in done)
    middle = statistics.median(ratio for ratio, _ in done)
    print(f"\nworst error {100 * worst:.1f} %; the median run took {middle:.3f} times its prediction")


if __name__ == "__main__":
    main()
