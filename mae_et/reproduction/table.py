"""The table of an experiment in Markdown: the paper's figures beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from mae_et.curriculum.table import write_csv
from mae_et.reproduction.cells import Run, runs_of, score, spent
from mae_et.reproduction.experiments import STUDIES, Experiment, Scale

KNOWN = {
    "text": "read in the paper",
    "picture": "read in the authors' picture of it",
    "code": "read in the authors' code",
    "notes": "from notes on the paper, not compared with it",
    "unseen": "not seen: cells and settings are ours",
}


def result_table(scale: Scale, places: Mapping[str, str]) -> str:
    """A row for each cell that has a score: mean and deviation over seeds, compute and median minutes of training.

    A cell that trains without a score of its own, as pretraining does, gives its costs to the cells that use it.
    """
    made = {cell.name: runs_of(scale, cell, places) for cell in scale.cells.values()}
    with_paper = any(cell.paper for cell in scale.cells.values())
    rows = []
    for runs in made.values():
        scores = [value for run in runs if (value := score(run)) is not None]
        if scores:
            rows.append(_row(runs, scores, made, with_paper))
    columns = ["run", *(["paper"] if with_paper else [])]
    columns += ["test accuracy, %", "training, TFLOPs", "training, min", "seeds"]
    return "\n".join([_line(columns), "|---" * len(columns) + "|", *rows])


def _row(runs: list[Run], scores: list[float], made: Mapping[str, list[Run]], with_paper: bool) -> str:
    cell = runs[0].cell
    spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    costs = [cost for run in runs if (cost := spent(run)) is not None]
    used = [name for name in cell.uses if name in made]
    if not costs and used:
        costs = [cost for run in made[used[0]] if (cost := spent(run)) is not None]
    compute = f"{costs[0].flops / 1e12:.1f}" if costs else ""
    minutes = f"{statistics.median(cost.minutes for cost in costs):.1f}" if costs else ""
    values = [cell.title, *([cell.paper] if with_paper else [])]
    return _line([*values, f"{100 * statistics.mean(scores):.1f}{spread}", compute, minutes, str(len(scores))])


def _line(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def write_runs(scale: Scale, places: Mapping[str, str], path: Path) -> None:
    """What is behind a table, as CSV: of each run that has a score its command, costs and scores."""
    rows = []
    for cell in scale.cells.values():
        for run in runs_of(scale, cell, places):
            first = score(run)
            if first is None:
                continue
            cost = spent(run)
            costs = [None] * 3 if cost is None else [cost.flops, cost.minutes, cost.core_minutes]
            knn = score(run, "eval/knn20") if cell.program == "pretrain.py" else None
            rows.append([cell.name, run.seed, first, knn, *costs, " ".join(cell.words)])
    header = ["cell", "seed", "accuracy", "eval/knn20", "flops", "minutes", "core_minutes", "command"]
    write_csv(path, header, rows)


def heading(experiment: Experiment) -> str:
    """What it is, where it is from, and how that is known."""
    if not experiment.entry:
        return experiment.title
    source = f"{experiment.paper}, {experiment.entry}: {experiment.title}"
    note = f"\n{' '.join(experiment.note.split())}" if experiment.note else ""
    return f"{source}\nthe paper's: {KNOWN[experiment.known]}{note}"


def whole_table(experiment: Experiment, scale: Scale, places: Mapping[str, str]) -> str:
    """Heading, table and what is to be known beside the numbers."""
    parts = [f"## {heading(experiment)}" if experiment.entry else ""]
    if any(cell.program not in (*STUDIES, "plan") for cell in scale.cells.values()):
        parts.append(result_table(scale, places))
    pictures = [
        str(path)
        for cell in scale.cells.values()
        if cell.program in STUDIES
        for run in runs_of(scale, cell, places)
        for path in sorted(run.folder.glob("*"))
        if path.suffix in (".png", ".csv")
    ]
    parts += ["\n".join(pictures), scale.caption]
    return "\n\n".join(part for part in parts if part)
