"""What a search leaves: the curriculum as YAML with its reasons, a table, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import mae_et
from mae_et.config import SearchConfig
from mae_et.curriculum.search import Found, Trial, cell_name, cell_stages, merged
from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import quantity, text_table
from mae_et.engine.run_folder import write_text_atomic
from mae_et.search.trainings import Spent, Trainings, score_text, stage_configs
from mae_et.tracking.search import Tried, search_picture

CURRICULUM_FILE = "curriculum.yaml"
ALGORITHMS = {"sequential": "EfficientTrain++, Algorithm 2", "greedy": "EfficientTrain++, Algorithm 1"}
OBJECTIVES = {"acc": "acc", "loss_time": "loss * T^{:g}", "error_time": "(1 - acc) * T^{:g}"}


def write_evidence(folder: Path, search: SearchConfig, trainings: Trainings, found: Found, planned: Spent) -> str:
    """Write `curriculum.yaml`, `search.csv`, `search.json` and `pictures/search.png`; returns the table for people."""
    rows = [row_of(trial, trainings) for trial in found.trials]
    spent = spent_on(found, trainings)
    write_text_atomic(folder / "search.csv", as_csv(rows))
    values = {
        "algorithm": search.algorithm,
        "curriculum": cell_name(found.cell),
        "trials": rows,
        "planned": asdict(planned),
        "spent": asdict(spent),
        "images": {"train": len(trainings.images.train), "held_out": len(trainings.images.held)},
    }
    write_text_atomic(folder / "search.json", json.dumps(values, indent=1))
    write_text_atomic(folder / CURRICULUM_FILE, as_yaml(search, trainings, found, spent))
    tried = [Tried(t.stage, t.candidate.name, row["score"], t.kept) for t, row in zip(found.trials, rows)]
    title = f"{ALGORITHMS[search.algorithm]}: {cell_name(found.cell)}"
    picture, baseline = folder / "pictures" / "search.png", rows[0]["score"] if trainings.whole else None
    search_picture(tried, search.stages, picture, title, search.score, trainings.axis, baseline)
    return trial_table(found, trainings)


def row_of(trial: Trial, trainings: Trainings) -> dict[str, Any]:
    """A trial with what its trainings cost, for tables."""
    records = trainings.records(trial.cell)
    scores = [record["score"] for record in records]
    return {
        "stage": trial.stage + 1,
        "candidate": trial.candidate.name,
        "trained": cell_name(trial.cell),
        "score": statistics.fmean(scores),
        "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        "utility": trial.utility,
        "kept": trial.kept,
        "equivalent_epochs": sum(record["equivalent_epochs"] for record in records),
        "flops": sum(record["flops"] for record in records),
        "seconds": sum(record["seconds"] for record in records),
        "scoring_seconds": sum(record["scoring_seconds"] for record in records),
    }


def spent_on(found: Found, trainings: Trainings) -> Spent:
    """By all trainings together, as they were recorded."""
    total = Spent()
    for trial in found.trials:
        for record in trainings.records(trial.cell):
            total += Spent(
                1, record["equivalent_epochs"], record["flops"], record["seconds"], record["scoring_seconds"]
            )
    return total


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A table for spreadsheets."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_yaml(search: SearchConfig, trainings: Trainings, found: Found, spent: Spent) -> str:
    """The curriculum, as `curriculum=<this file>` takes it, under comments that say why it is this one."""
    path = Path(search.run) / CURRICULUM_FILE
    size = trainings.final.bandwidth
    comments = [
        f"Found by `python -m mae_et search` ({ALGORITHMS[search.algorithm]}) on {datetime.now():%Y-%m-%d}, mae_et "
        f"{mae_et.__version__}.",
        "",
        f"use it: curriculum={path} with any recipe; another final size takes its stages in proportion",
        f"recipe: {search.recipe} {' '.join(search.overrides)}".rstrip(),
        f"images: {trainings.images.describe()}",
        f"objective: {OBJECTIVES[search.objective].format(search.alpha)}, by {score_note(search)}; seeds "
        f"{', '.join(map(str, search.seeds))}",
        f"cost: {spent_text(spent, trainings)}",
        "",
        *trial_table(found, trainings).splitlines(),
    ]
    lines = [f"# {line}".rstrip() for line in comments]
    lines += ["", f"size: {plain_size(size)}", f"axis: {trainings.axis}", "stages:"]
    for stage in stage_configs(merged(cell_stages(found.cell, search.stages, trainings.final))):
        extras = "" if stage.mask_ratio is None else f", mask_ratio: {stage.mask_ratio}"
        extras += "" if stage.batch_scale == 1 else f", batch_scale: {stage.batch_scale}"
        lines.append(f"  - {{end: {stage.end!r}, bandwidth: {stage.bandwidth}{extras}}}")
    return "\n".join(lines) + "\n"


def plain_size(size: tuple[int, int]) -> str:
    """A size as YAML has it."""
    return str(size[0]) if size[0] == size[1] else str(list(size))


def score_note(search: SearchConfig) -> str:
    """What a score is, and when it is taken."""
    when = f" after {search.settle:g} of the axis at the final size" if search.algorithm == "sequential" else ""
    return f"{search.score} on held-out images of train{when}"


def trial_table(found: Found, trainings: Trainings) -> str:
    """Scores of all candidates: a row a candidate, a column a stage; what is taken has a star."""
    search = trainings.search
    stages = sorted({trial.stage for trial in found.trials})
    names = list(dict.fromkeys(t.candidate.name for t in sorted(found.trials, key=lambda t: t.candidate.bandwidth)))
    scores = {(t.stage, t.candidate.name): trainings.mean_score(t.cell) for t in found.trials}
    kept = {(stage, found.cell[stage].name) for stage in stages}
    rows = []
    for name in names:
        cells = []
        for stage in stages:
            value = scores.get((stage, name))
            text = "-" if value is None else score_text(search.score, value).partition(" ")[2]
            cells.append(text + ("*" if (stage, name) in kept else " "))
        rows.append([name, *cells])
    return text_table(["B", *(f"stage {stage + 1} " for stage in stages)], rows)


def spent_text(spent: Spent, trainings: Trainings) -> str:
    """What a search cost, beside the training that it is for."""
    one = trainings.plan(())
    size = format_size(trainings.final.bandwidth)
    took = ""
    if spent.seconds:
        took = f"; {spent.seconds / 60:.1f} min of training and {spent.scoring / 60:.1f} min of scores"
    return (
        f"{spent.trainings} trainings, {spent.epochs:.3f} equivalent epochs at B={size}, {quantity(spent.flops)}FLOPs; "
        f"one training by the recipe is {one.equivalent_epochs:.3f} and {quantity(one.total_flops)}FLOPs, so that the "
        f"search costs {spent.epochs / one.equivalent_epochs:.2f} of it{took}"
    )
