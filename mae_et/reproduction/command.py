"""`python -m mae_et reproduce`: the planned cost, then the runs that are missing, then the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mae_et.config import ConfigError
from mae_et.curriculum import Plan
from mae_et.reproduction.cells import make_all, runs_of
from mae_et.reproduction.costs import Planner, cost_table, traffic_table
from mae_et.reproduction.curves import curves_text, draw_curves
from mae_et.reproduction.experiments import (
    REPOSITORY,
    TRAINING,
    Experiment,
    Scale,
    find,
    names,
    read_experiment,
)
from mae_et.reproduction.table import heading, whole_table, write_runs

Say = Callable[[str], None]


def reproduce(
    name: str,
    scale: str = "laptop",
    places: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    runs: str | None = None,
    changes: Sequence[str] = (),
    plan: bool = False,
    yes: bool = False,
    launch: Sequence[str] = (),
    jobs: int = 1,
    table: bool = False,
    say: Say = print,
) -> int:
    """Reproduce a table or figure at one scale; it can be interrupted and repeated.

    Args:
        name: of the experiment, or its file's path.
        scale: "laptop" or "paper"; a file without scales has but its own.
        places: by the names that commands have in braces.
        only: cells to run; empty runs all.
        runs: folder in place of the experiment's own.
        changes: overrides of every training run, for trials.
        plan: print the cost, and run nothing.
        yes: start at the paper's scale.
        launch: what starts training in place of Python, such as torchrun and its options.
        jobs: runs at a time.
        table: print the table of what was made, and run nothing.
        say: where it is printed.

    Returns:
        Exit code.

    Raises:
        ConfigError: no such experiment, scale, cell or place, or a configuration that cannot be used.
        RuntimeError: a run failed.
    """
    experiment = read_experiment(find(name))
    chosen = choose_scale(experiment, scale, runs, changes)
    patterns = {cell.pattern for cell in chosen.cells.values()}
    unknown = set(only) - set(chosen.cells) - patterns
    if unknown:
        raise ConfigError(f"--only {', '.join(sorted(unknown))}: the cells are {', '.join(chosen.cells)}")
    absolute = {key: str(Path(value).resolve()) for key, value in (places or {}).items()}
    if table:
        _print_table(experiment, chosen, absolute, say)
        return 0
    # A plan asks nothing of places that are not said.
    unsaid = {used: used for cell in chosen.cells.values() for used in cell.uses if used not in chosen.cells}
    say(f"{heading(experiment)}\n\n{cost_table(chosen, {**unsaid, **absolute})}\n")
    if plan:
        return 0
    trained = any(cell.program in (*TRAINING, "search") for cell in chosen.cells.values())
    if chosen.name == "paper" and trained and not yes:
        say("that is a matter of GPUs and days: to start it, say --yes")
        return 0
    wanted = [cell for cell in chosen.cells.values() if not only or {cell.name, cell.pattern} & set(only)]
    for cell in wanted:
        if cell.program == "plan":
            found = Planner(chosen, absolute).plan(cell.name)
            assert isinstance(found, Plan)
            say(f"{cell.title}\n\n{traffic_table(found, 3)}\n")
    to_make = [run for cell in wanted if cell.program != "plan" for run in runs_of(chosen, cell, absolute)]
    # The first seed of everything comes first: a table with few seeds is sooner of use than a part of one with many.
    make_all(sorted(to_make, key=lambda run: run.cell.seeds.index(run.seed)), jobs, say, launch)
    _print_table(experiment, chosen, absolute, say)
    return 0


def _print_table(experiment: Experiment, chosen: Scale, places: Mapping[str, str], say: Say) -> None:
    """Print table and curves, and keep them and a line for every run beside the runs."""
    text = whole_table(experiment, chosen, places)
    folder = REPOSITORY / chosen.runs
    folder.mkdir(parents=True, exist_ok=True)
    for number, curves in enumerate(chosen.curves, 1):
        text += f"\n\n{curves_text(chosen, curves, places)}"
        picture = folder / f"{experiment.name}-{number}.png"
        if draw_curves(chosen, curves, places, picture):
            text += f"\n\n{picture}"
    say(f"\n{text}")
    (folder / f"{experiment.name}.md").write_text(text + "\n")
    write_runs(chosen, places, folder / f"{experiment.name}.csv")


def choose_scale(experiment: Experiment, name: str, runs: str | None, changes: Sequence[str]) -> Scale:
    """A scale of an experiment, elsewhere and with changes where asked.

    Raises:
        ConfigError: the experiment has no such scale.
    """
    found = experiment.scales.get("table") or experiment.scales.get(name)
    if found is None:
        raise ConfigError(f"{experiment.name} has no scale {name!r}; it has {', '.join(experiment.scales)}")
    cells = {
        key: replace(cell, words=(*cell.words, *changes)) if cell.program in TRAINING else cell
        for key, cell in found.cells.items()
    }
    return replace(found, cells=cells, runs=Path(runs).resolve() if runs else found.runs)


def listing() -> str:
    """The experiments that are known by name, one a line."""
    rows = []
    for name in names():
        experiment = read_experiment(find(name))
        rows.append(f"{name:24} {', '.join(experiment.scales):14} {experiment.entry}: {experiment.title}")
    return "\n".join(rows)
