"""What a run's folder says of it, whatever kind of run it is."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_et.comparison.runs import AXES
from mae_et.config import (
    ConfigError,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    SegmentConfig,
)
from mae_et.config.kept import kept_config, kept_task, read_kept, unique_names
from mae_et.config.plain import parse_json
from mae_et.curriculum.plan import Plan
from mae_et.planning import plan_of
from mae_et.tracking import read_metrics
from mae_et.tracking.run_id import RUN_ID_FILE

SCHEMAS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "probe": ProbeConfig,
    "detect": DetectConfig,
    "segment": SegmentConfig,
}
STATES = {"running": "running", "failed": "failed", "complete": "complete", "time is up": "complete"}
FROZEN = "scores.json"  # of a run that trains nothing


@dataclass(frozen=True)
class Parent:
    """What a run began with.

    Attributes:
        kind: "run", or that of a file or of published weights.
        path: of the checkpoint.
        run_id, step: of the run that made it.
        settings: of that run, flat; empty where it is not known.
    """

    kind: str
    path: str
    run_id: str | None
    step: int | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class OpenedRun:
    """A run's folder.

    Attributes:
        name, path, run_id, task, seed, status, settings: as of `ComparedRun`.
        plan: None of scores of a frozen encoder.
        rows: the numbers of its metrics that are finite, in the order written.
        late: (step, scores by name) of what was scored afterwards.
        parent: None from scratch.
    """

    name: str
    path: Path
    run_id: str | None
    task: str
    seed: int
    status: str
    settings: dict[str, Any]
    plan: Plan | None
    rows: list[dict[str, float]]
    late: list[tuple[float, dict[str, float]]]
    parent: Parent | None

    def spent_at(self, step: float) -> dict[str, float]:
        """What had been spent after so many steps, by the name of the axis.

        Straight between rows, of which there is one at the end of every stage: costs are exact, and times nearly so.
        """
        rows = [row for row in self.rows if row.keys() >= {"step", *AXES.values()}]
        steps = [0.0, *(row["step"] for row in rows)]
        return {axis: float(np.interp(step, steps, [0.0, *(r[key] for r in rows)])) for axis, key in AXES.items()}


def open_runs(folders: Sequence[str | Path]) -> list[OpenedRun]:
    """Open runs, under names that tell them apart.

    Raises:
        ConfigError: a folder holds no run, one that has logged nothing, or is there twice.
    """
    paths = [Path(folder) for folder in folders]
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places):
        if places.count(place) > 1:
            raise ConfigError(f"{path} is given twice: a run is compared with others")
    return [open_run(path, name) for path, name in zip(paths, unique_names(paths))]


def open_run(path: Path, name: str) -> OpenedRun:
    """Open one run.

    Raises:
        ConfigError: see `open_runs`.
    """
    file, plan_file = path / "config.yaml", path / "plan.json"
    if not file.exists():
        raise ConfigError(f"{path} holds no run: there is no {file}")
    task = kept_task(file)
    if task not in SCHEMAS:
        raise ConfigError(f"{path} holds a run of {task}, and these compare: {', '.join(SCHEMAS)}")
    config = kept_config(file, SCHEMAS[task])
    frozen = read_kept(path / FROZEN, parse_json) if (path / FROZEN).exists() else None
    if frozen is None and not plan_file.exists():
        raise ConfigError(f"{path} holds no run: there is no {plan_file}")
    try:
        rows = read_metrics(path / "metrics.jsonl")
    except FileNotFoundError:
        raise ConfigError(f"{path} has logged nothing yet: leave it out") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    parent, begin = _parent(rows, path)
    settings = flat(asdict(config))
    if parent is not None:
        settings |= {f"checkpoint.{key}": value for key, value in parent.settings.items()}
        # Paths of runs differ from seed to seed; what they were told is beside.
        settings["checkpoint"] = "a run" if parent.kind == "run" else parent.path
    return OpenedRun(
        name=name,
        path=path,
        run_id=_run_id(path),
        task="knn" if isinstance(frozen, dict) and frozen.get("job") == "knn" else task,
        seed=config.seed,
        status="complete" if frozen is not None else _status(path),
        settings=settings,
        plan=None if frozen is not None else read_kept(plan_file, plan_of),
        # Scores that were taken once more in the same folder begin anew with what they began with.
        rows=[numbers(row) for row in (rows if frozen is None else rows[begin:])],
        late=_late_scores(path),
        parent=parent,
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The values that are finite numbers; a loss that is not finite has no place on a curve."""
    largest = sys.float_info.max
    return {
        f"{prefix}{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest
    }


def _parent(rows: list[dict[str, Any]], path: Path) -> tuple[Parent | None, int]:
    """What the last row of lineage says, and which row that is."""
    begins = [index for index, row in enumerate(rows) if "parent/kind" in row]
    if not begins:
        return None, 0
    row = rows[begins[-1]]
    facts = {name: row.get(f"parent/{name}") for name in ("kind", "path", "run_id", "step", "config")}
    try:
        config = parse_json(facts["config"]) if facts["config"] is not None else {}
        step = None if facts["step"] is None else int(facts["step"])
        parent = Parent(str(facts["kind"]), str(facts["path"]), facts["run_id"], step, flat(config))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path / 'metrics.jsonl'} is damaged: what the run began with is no lineage ({error})"
        ) from None
    return parent, begins[-1]


def _run_id(path: Path) -> str | None:
    file = path / RUN_ID_FILE
    return read_kept(file, str.strip) if file.exists() else None


def _status(path: Path) -> str:
    file = path / "status.json"
    values = read_kept(file, parse_json) if file.exists() else {}
    status = STATES.get(str(values.get("state")) if isinstance(values, dict) else "", "interrupted")
    # A killed run cannot say that it is over; but the lock on its folder is gone.
    return "interrupted" if status == "running" and not _is_held(path / ".lock") else status


def _is_held(file: Path) -> bool:
    """Whether a run holds a lock; a mount without locks cannot tell, and the run is believed."""
    try:
        lock = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _late_scores(path: Path) -> list[tuple[float, dict[str, float]]]:
    """Scores of evaluation.json and of report.json, under the names that metrics have for them."""
    found: list[tuple[float, dict[str, float]]] = []
    readers = {"evaluation.json": _evaluated, "report.json": _reported}
    for name, reader in readers.items():
        if (path / name).exists():
            found.append(read_kept(path / name, lambda text, reader=reader: reader(parse_json(text))))
    return found


def _evaluated(report: dict[str, Any]) -> tuple[float, dict[str, float]]:
    return float(report["checkpoint_step"]), numbers(report["scores"]["pretrained"], "eval/")


def _reported(report: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Of a report's parts, by split: accuracies, and of detection those of boxes and of masks."""
    found: dict[str, float] = {}
    for split, part in report.items():
        if not isinstance(part, dict):
            continue
        found |= numbers({key: value for key, value in part.items() if isinstance(value, float)}, f"{split}/")
        for kind, start in (("boxes", ""), ("masks", "mask_")):
            found |= numbers(part.get(kind) or {}, f"{split}/{start}")
    return float(report["step"]), found


def stage_pictures(path: Path) -> dict[str, Path]:
    """Pictures that pretraining draws at the end of its stages, by name, in order of stages."""
    folder = path / "pictures"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(int(m[1]), m[2], file) for file in files if (m := re.fullmatch(r"stage-(\d+)-B(\w+)\.png", file.name))]
    return {f"stage {number}, B={size}": file for number, size, file in sorted(found)}
