"""The trackers of a run, and what they are told of its parent."""

from __future__ import annotations

import json
from typing import Any

from mae_et.config import RunConfig, as_dict
from mae_et.curriculum.plan import Plan
from mae_et.engine.run_folder import RunFolder
from mae_et.exchange.weights import Origin
from mae_et.tracking import ConsoleTracker, JsonlTracker, MultiTracker, WandbTracker
from mae_et.tracking.run_id import run_id_of
from mae_et.tracking.tracker import Tracker


def lineage_row(parent: Origin) -> dict[str, str]:
    """The first row of a downstream run's metrics: what it began with."""
    facts = {
        "parent/kind": parent.kind,
        "parent/path": parent.path,
        "parent/run_id": parent.run_id,
        "parent/checkpoint_sha256": parent.sha256,
        "parent/step": None if parent.step is None else str(parent.step),
        "parent/config": None if parent.config is None else json.dumps(parent.config),
    }
    return {name: value for name, value in facts.items() if value is not None}


def lineage(parent: Origin | None) -> dict[str, Any]:
    """The same for W&B's configuration of a run: `parent_run_id`, `parent_checkpoint_sha256`, `parent`."""
    if parent is None:
        return {}
    facts = {"kind": parent.kind, "path": parent.path, "step": parent.step, "config": parent.config}
    return {"parent_run_id": parent.run_id, "parent_checkpoint_sha256": parent.sha256, "parent": facts}


def open_trackers(
    config: RunConfig, folder: RunFolder, plan: Plan | None, parent: Origin | None, job_type: str
) -> Tracker:
    """metrics.jsonl, and the console and W&B as configured; a new run with a parent begins with a row about it.

    Scores that are taken once more in the same folder begin with such a row again: the parent may be another.

    Args:
        config, folder: of the run.
        plan: of the run; None where nothing is trained.
        parent: where its first weights came from.
        job_type: for W&B.
    """
    settings = config.tracking
    is_new = not folder.metrics_path.exists()
    trackers: list[Tracker] = [JsonlTracker(folder.metrics_path)]
    if settings.console and plan is not None:
        trackers.append(ConsoleTracker(plan.total_steps, stages=len(plan.stages)))
    run_id = run_id_of(folder.path)
    if settings.wandb != "disabled":
        planned = {} if plan is None else {"plan": plan.to_dict()}
        trackers.append(
            WandbTracker(
                settings.wandb,
                folder.path,
                project=settings.project,
                name=settings.name or folder.path.name,
                group=settings.group,
                job_type=job_type,
                entity=settings.entity,
                tags=settings.tags,
                config={**as_dict(config), **planned, **lineage(parent)},
                run_id=run_id,
                metrics=folder.metrics_path,
                alerts=settings.alerts,
                checkpoints=folder.checkpoints if settings.artifacts else None,
            )
        )
    if parent is not None and (is_new or plan is None):
        trackers[0].log(lineage_row(parent), 0)  # W&B has it in its configuration of the run
    return MultiTracker(trackers)
