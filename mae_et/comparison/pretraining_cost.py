"""What the network cost that a run began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_et.comparison.opening import OpenedRun, open_run
from mae_et.config import ConfigError

LONGEST = 10  # pretraining, fine-tuning, once more, ...: what is longer goes round in circles


def add_pretraining(runs: Sequence[OpenedRun], axis: str) -> tuple[list[OpenedRun], dict[str, Mapping[str, float]]]:
    """The runs to compare, without those that only made what others began with, and what each had cost before.

    Args:
        runs: as opened.
        axis: of the comparison.

    Returns:
        (runs, costs by axis by the name of the run).

    Raises:
        ConfigError: the axis does not add up, or a network's cost cannot be told.
    """
    if axis == "fraction":
        raise ConfigError(
            "--with-pretraining: fractions of two runs do not add up; use --axis compute, hours or images"
        )
    known = {run.run_id: run for run in runs if run.run_id is not None}
    begun = {run.parent.run_id for run in runs if run.parent is not None}
    compared = [run for run in runs if run.run_id is None or run.run_id not in begun]
    return compared, {run.name: cost_before(run, known) for run in compared}


def cost_before(run: OpenedRun, known: Mapping[str, OpenedRun], depth: int = 0) -> dict[str, float]:
    """Everything that was spent on the checkpoint that a run began with, by axis; nothing from scratch.

    Args:
        run: that began with it.
        known: runs among which the one that made it is looked for first, by their ids.
        depth: of runs that begin with each other.

    Raises:
        ConfigError: the run that made it cannot be found, or no run made it.
    """
    if run.parent is None:
        return {}
    if depth == LONGEST:
        raise ConfigError(f"{run.path}: the runs that it began with begin with each other")
    parent = _find(run, known)
    earlier = cost_before(parent, known, depth + 1)
    step = run.parent.step
    own = parent.spent_at(float("inf") if step is None else step)
    return {axis: own[axis] + earlier.get(axis, 0.0) for axis in own if axis != "fraction"}


def _find(run: OpenedRun, known: Mapping[str, OpenedRun]) -> OpenedRun:
    """The run that made the checkpoint: among those given, or where it was when this run began."""
    parent = run.parent
    assert parent is not None
    if parent.kind != "run":
        raise ConfigError(
            f"{run.path} began with {parent.path}, and what that cost no run tells: compare without --with-pretraining"
        )
    if parent.run_id is not None and parent.run_id in known:
        return known[parent.run_id]
    folder = Path(parent.path).parent.parent
    there = "no such run is there any more"
    if (folder / "config.yaml").exists():
        found = open_run(folder, folder.name)
        if parent.run_id is None or found.run_id == parent.run_id:
            return found
        there = f"another run is there now (run id {found.run_id})"
    raise ConfigError(
        f"{run.path} began with {parent.path} (run id {parent.run_id}), and {there}: give its folder among the "
        "runs, or compare without --with-pretraining"
    )
