"""Opened runs put on one axis, in groups that differ in their seed alone, and set against a baseline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from mae_et.comparison.opening import OpenedRun, open_runs, stage_pictures
from mae_et.comparison.pretraining_cost import add_pretraining
from mae_et.comparison.runs import AXES, ComparedRun, Comparison, StageSpan
from mae_et.comparison.scores import check_reach, choose_score, is_share, scores_of
from mae_et.comparison.speedup import Reached, Speedup, cost_to_reach, speedup, with_bounds
from mae_et.comparison.table import score_text
from mae_et.config import ConfigError
from mae_et.curriculum.stage import format_size
from mae_et.curriculum.table import SUFFIXES

# Where a run is, and how it is kept and watched; its seed makes it one of a group.
NO_DIFFERENCE = ("run", "seed", "saving.", "tracking.", "data.download")
ABSENT = "-"


def compare_runs(
    folders: Sequence[str | Path],
    axis: str = "compute",
    score: str | None = None,
    baseline: str | None = None,
    reach: float | None = None,
    with_pretraining: bool = False,
) -> Comparison:
    """Put runs on one axis and compare a score.

    Args:
        folders: of the runs, of any kind.
        axis: compute, hours, images or fraction.
        score: its name; None takes the best that all runs have.
        baseline: a group or a run of it, which speed-ups are against; None takes the first run's.
        reach: the score that costs are given for; None takes the baseline's final score, of its seeds the lowest.
        with_pretraining: add to each run what the network cost that it began with. Runs among `folders` that made it
            are looked up there, and not compared themselves.

    Raises:
        ConfigError: a folder that holds no run, runs that share no score, an unknown score or baseline, or a network
            whose cost cannot be told.
    """
    opened = open_runs(folders)
    if axis == "compute":
        _refuse_without_flops(opened)
    before: Mapping[str, Mapping[str, float]] = {}
    if with_pretraining:
        opened, before = add_pretraining(opened, axis)
    spent = {run.name: _spent(run, before.get(run.name, {})) for run in opened}
    scale, unit = _scale(axis, max(values[axis] for values in spent.values()))
    groups = group_names(opened)
    runs = tuple(
        place(run, axis, scale, before.get(run.name, {}).get(axis, 0.0), groups[run.name], spent[run.name])
        for run in opened
    )
    chosen = choose_score(runs, score)
    first = _find_group(runs, baseline)
    target = _target(runs, chosen, first, reach)
    comparison = Comparison(axis, unit, chosen, runs, first, differences(runs), reached(runs, chosen, first, target))
    return replace(comparison, notes=notes(comparison, with_pretraining))


def _refuse_without_flops(runs: Sequence[OpenedRun]) -> None:
    unknown = [str(run.path) for run in runs if run.plan is not None and run.plan.total_flops is None]
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: the plan knows no FLOPs: use --axis hours, images or fraction")


def _spent(run: OpenedRun, before: Mapping[str, float]) -> dict[str, float]:
    """What the run cost, by axis, on top of what it began with; a fraction has nothing under it."""
    own = run.spent_at(max((row.get("step", 0.0) for row in run.rows), default=0.0))
    return {axis: own[axis] + before.get(axis, 0.0) for axis in AXES}


def _scale(axis: str, largest: float) -> tuple[float, str]:
    """What costs are divided by, and the unit that they are in then."""
    if axis != "compute":
        return 1.0, {"hours": "hours", "images": "images", "fraction": ""}[axis]
    factor, suffix = next(((factor, suffix) for factor, suffix in SUFFIXES if largest >= factor), (1.0, ""))
    return factor, f"{suffix}FLOPs"


def place(
    run: OpenedRun, axis: str, scale: float, before: float, group: str, spent: Mapping[str, float]
) -> ComparedRun:
    """A run on the axis.

    Args:
        run: as opened.
        axis: of the comparison.
        scale: that costs are divided by.
        before: what the network cost that the run began with, without the scale.
        group, spent: of the run.
    """
    key = AXES[axis]
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in run.rows:
        cost = row.get(key, 0.0 if run.plan is None else None)  # what trains nothing, costs nothing
        if cost is not None:
            for name in row.keys() - {"step", key}:
                curves.setdefault(name, []).append(((cost + before) / scale, row[name]))
    ordered = {name: sorted(points, key=lambda point: point[0]) for name, points in sorted(curves.items())}
    late = [((run.spent_at(step)[axis] + before) / scale, values) for step, values in run.late]
    return ComparedRun(
        name=run.name,
        path=run.path,
        task=run.task,
        group=group,
        seed=run.seed,
        status=run.status,
        settings=run.settings,
        stages=_stages(run, key, scale, before),
        curves=ordered,
        scores=scores_of(ordered, late),
        total=spent[axis] / scale,
        pictures=stage_pictures(run.path),
        parent=None if run.parent is None else run.parent.run_id,
        spent=spent,
    )


def _stages(run: OpenedRun, key: str, scale: float, before: float) -> tuple[StageSpan, ...]:
    """The stages that the run has got to; one ends at its last row, which is logged at its last step."""
    if run.plan is None or len(run.plan.stages) == 1:
        return ()
    ends: dict[int, float] = {}
    for row in run.rows:
        if "stage/index" in row and key in row and int(row["stage/index"]) in range(len(run.plan.stages)):
            ends[int(row["stage/index"])] = (row[key] + before) / scale
    spans: list[StageSpan] = []
    for index, end in sorted(ends.items()):
        begin = spans[-1].end if spans else before / scale
        spans.append(StageSpan(format_size(run.plan.stages[index].bandwidth), begin, end))
    return tuple(spans)


def compared_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """What makes a run what it is, as text, without its seed and its place."""
    kept = {}
    for key, value in settings.items():
        own = key.removeprefix("checkpoint.")
        if not any(own == skipped or (skipped[-1] == "." and own.startswith(skipped)) for skipped in NO_DIFFERENCE):
            kept[key] = value if isinstance(value, str) else json.dumps(value)
    return kept


def group_names(runs: Sequence[OpenedRun]) -> dict[str, str]:
    """The group of each run, by the run's name: what its members have in common before their seeds."""
    members: dict[str, list[str]] = {}
    for run in runs:
        members.setdefault(json.dumps([run.task, sorted(compared_settings(run.settings).items())]), []).append(run.name)
    found: dict[str, str] = {}
    for names in members.values():
        group = names[0]
        if len(names) > 1:
            common = "".join(same[0] for same in takewhile(lambda letters: len(set(letters)) == 1, zip(*names)))
            group = re.sub(r"[-_./]+(seed|s)?[-_.=]*$", "", common) or names[0]
        others = {*found.values(), *(run.name for run in runs if run.name not in names)}
        found |= dict.fromkeys(names, names[0] if group in others else group)
    return found


def differences(runs: Sequence[ComparedRun]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Settings that differ between runs which have them, and the value of each run as YAML has it."""
    settings = [compared_settings(run.settings) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    differing = (key for key in keys if len({values[key] for values in settings if key in values}) > 1)
    return tuple((key, tuple(values.get(key, ABSENT) for values in settings)) for key in differing)


def _find_group(runs: Sequence[ComparedRun], name: str | None) -> str:
    """The baseline's group, by its name or that of one of its runs."""
    for run in runs:
        if name in (None, run.group, run.name) or Path(name) == run.path:
            return run.group
    names = dict.fromkeys(run.group for run in runs)
    raise ConfigError(f"--baseline {name}: there is no such run or group; there are {', '.join(names)}")


def _target(runs: Sequence[ComparedRun], score: str, baseline: str, reach: float | None) -> float:
    if reach is not None:
        check_reach(runs, score, reach)
        return reach
    return min(run.scores[score][-1].score for run in runs if run.group == baseline)


def reached(runs: Sequence[ComparedRun], score: str, baseline: str, target: float) -> tuple[Reached, ...]:
    """What it costs each group to reach a score, in the order of the groups' first runs."""
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for run in runs:
        curves.setdefault(run.group, []).append([(point.cost, point.score) for point in run.scores[score]])
    found = []
    for group, seeds in curves.items():
        gain = speedup(curves[baseline], seeds, target)
        if group == baseline:  # against itself there is nothing to estimate
            gain = Speedup(gain.ratio, None, None, gain.seeds, gain.of)
        else:
            gain = with_bounds(gain, curves[baseline], seeds, target)
        found.append(Reached(group, target, tuple(cost_to_reach(curve, target) for curve in seeds), gain))
    return tuple(found)


def notes(comparison: Comparison, with_pretraining: bool) -> tuple[str, ...]:
    """What a reader must know of a comparison."""
    runs, score, found = comparison.runs, comparison.score, []
    for run in runs:
        if run.status != "complete":
            share = run.spent["fraction"]
            found.append(f"{run.name} is {run.status} at {share:.0%} of its plan, and compared as far as it is.")
    if score.startswith("-"):
        found.append(
            "No run has been scored. Training losses compare between runs of one target alone, and stages of another B "
            "have other losses: score with evaluation.every=0.1 or `python -m mae_et evaluate RUN`."
        )
    target = comparison.reached[0].score
    early = dict.fromkeys(run.group for run in runs if run.scores[score][0].score > target)
    if early:
        found.append(
            f"Above {score_text(target, is_share(runs, score))} when first scored, and perhaps there for less, are runs"
            f" of {', '.join(early)}: a speed-up is then a bound, and none where the baseline's are, too."
        )
    if with_pretraining:
        found.append("Costs are those of a run and of all that made the network it began with.")
    elif any(run.total == 0 for run in runs):
        found.append(
            "Scores of a frozen encoder cost nothing themselves; --with-pretraining adds what the encoder cost."
        )
    begun: dict[str, list[str | None]] = {}
    for run in runs:
        begun.setdefault(run.group, []).append(run.parent)
    shared = [group for group, parents in begun.items() if len(parents) > len({*parents}) and any(parents)]
    if shared:
        found.append(f"Runs of {', '.join(shared)} began with one network: how they vary says nothing of its own seed.")
    seen: dict[tuple[Any, ...], str] = {}
    for run in runs:
        seeds = (run.group, run.seed, run.settings.get("checkpoint.seed"), run.settings.get("checkpoint.checkpoint"))
        if seeds in seen:
            found.append(f"{seen[seeds]} and {run.name} have the same seed: as two of a group they say too much.")
        seen.setdefault(seeds, run.name)
    return tuple(found)
