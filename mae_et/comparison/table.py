"""A comparison as tables: for the terminal, and for spreadsheets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_et.comparison.runs import ComparedRun, Comparison
from mae_et.comparison.scores import is_share
from mae_et.comparison.speedup import Reached
from mae_et.curriculum.table import quantity, text_table, write_csv

WIDEST = 40  # characters of a setting in the terminal
HEADER = (
    *("group", "runs", "seeds", "complete", "score", "final", "final_sd", "best", "best_sd", "best_at", "flops"),
    *("hours", "images", "reach", "cost_to_reach", "reached_by", "speedup", "speedup_low", "speedup_high"),
    "speedup_is",
)
SIGNS = {"": "", "at least": "≥ ", "at most": "≤ "}


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the deviation of one; None of a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class GroupRow:
    """A group in numbers, means over its seeds.

    Attributes:
        name: of the group.
        runs: of it.
        final, best: scores.
        best_at: cost of the best, on the axis.
        flops, hours, images: spent in all.
        cost: geometric mean of what the seeds that reach the score took to reach it, on the axis; None if none does.
        reached: the score, the costs, and the speed-up against the baseline.
    """

    name: str
    runs: tuple[ComparedRun, ...]
    final: Spread
    best: Spread
    best_at: float
    flops: float
    hours: float
    images: float
    cost: float | None
    reached: Reached


def group_rows(comparison: Comparison) -> list[GroupRow]:
    """One row a group, in the order of their first runs."""
    rows = []
    for found in comparison.reached:
        runs = tuple(run for run in comparison.runs if run.group == found.group)
        curves = [run.scores[comparison.score] for run in runs]
        best = [max(curve, key=lambda point: point.score) for curve in curves]
        costs = [cost for cost in found.costs if cost is not None]
        rows.append(
            GroupRow(
                name=found.group,
                runs=runs,
                final=Spread.of([curve[-1].score for curve in curves]),
                best=Spread.of([point.score for point in best]),
                best_at=statistics.fmean(point.cost for point in best),
                flops=statistics.fmean(run.spent["compute"] for run in runs),
                hours=statistics.fmean(run.spent["hours"] for run in runs),
                images=statistics.fmean(run.spent["images"] for run in runs),
                cost=None if not costs else geometric_mean(costs),
                reached=found,
            )
        )
    return rows


def geometric_mean(costs: Sequence[float]) -> float:
    """Of costs, which may be 0."""
    return 0.0 if min(costs) == 0 else statistics.geometric_mean(costs)


def comparison_table(comparison: Comparison) -> str:
    """The groups for people."""
    share = is_share(comparison.runs, comparison.score)
    target = comparison.reached[0].score
    on_axis = f", {comparison.unit}" if comparison.unit else ""
    header = ["", "seeds", "final", "best", f"at{on_axis}", "compute", "time"]
    header += [f"{'u' if not comparison.unit else comparison.unit} to {score_text(target, share)}", "speed-up"]
    rows = [
        [
            row.name + ("" if all(run.status == "complete" for run in row.runs) else " (unfinished)"),
            str(len(row.runs)),
            spread_text(row.final, share),
            spread_text(row.best, share),
            number_text(row.best_at),
            flops_text(row.flops),
            time_text(row.hours),
            "-" if row.cost is None else number_text(row.cost) + _reached_by(row.reached),
            speedup_text(row.reached, row.name == comparison.baseline),
        ]
        for row in group_rows(comparison)
    ]
    return text_table(header, rows)


def _reached_by(reached: Reached) -> str:
    seeds, of = reached.speedup.seeds[1], reached.speedup.of[1]
    return "" if seeds == of else f" ({seeds} of {of})"


def speedup_text(reached: Reached, is_baseline: bool = False) -> str:
    """A speed-up with its interval, where there is one."""
    gain = reached.speedup
    if is_baseline:
        return "baseline"
    if gain.ratio is None:
        return "-"
    if gain.low is None or gain.high is None:
        return f"{SIGNS[gain.bound]}{gain.ratio:.2f}x"
    return f"{gain.ratio:.2f}x [{gain.low:.2f}, {gain.high:.2f}]"


def spread_text(spread: Spread, share: bool) -> str:
    """Mean and deviation of scores; in per cent if they are shares."""
    if spread.deviation is None:
        return score_text(spread.mean, share)
    if share:
        return f"{100 * spread.mean:.2f} ± {100 * spread.deviation:.2f} %"
    return f"{spread.mean:.4g} ± {spread.deviation:.2g}"


def score_text(score: float, share: bool) -> str:
    """A score; in per cent if it is a share."""
    return f"{100 * score:.2f} %" if share else f"{score:.4g}"


def number_text(value: float) -> str:
    """A cost with three digits, and no fewer than it has before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def flops_text(flops: float) -> str:
    """FLOPs with an SI prefix."""
    number = quantity(flops)
    return f"{number}FLOPs" if number[-1].isalpha() else f"{number} FLOPs"


def time_text(hours: float) -> str:
    """Hours, or minutes or seconds of less."""
    if hours >= 1:
        return f"{number_text(hours)} h"
    return f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.3g} s"


def differences_table(comparison: Comparison) -> str:
    """Settings that differ, one row a setting and one column a group, in which they are the same."""
    first: dict[str, int] = {}
    for index, run in enumerate(comparison.runs):
        first.setdefault(run.group, index)
    rows = [[key, *(_short(values[index]) for index in first.values())] for key, values in comparison.differences]
    return text_table(["", *first], rows)


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def write_tables(comparison: Comparison, path: Path) -> Path:
    """The groups as CSV, and every curve in long form as `<name>-curves.csv` beside it, which is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        [
            *(row.name, " ".join(run.name for run in row.runs), len(row.runs)),
            *(all(run.status == "complete" for run in row.runs), comparison.score),
            *(row.final.mean, row.final.deviation, row.best.mean, row.best.deviation, row.best_at),
            *(row.flops, row.hours, row.images, row.reached.score, row.cost, row.reached.speedup.seeds[1]),
            *(row.reached.speedup.ratio, row.reached.speedup.low, row.reached.speedup.high),
            row.reached.speedup.bound,
        ]
        for row in group_rows(comparison)
    ]
    named = {"best_at": "best_at_", "cost_to_reach": "cost_to_reach_"}
    unit = comparison.unit or "fraction"
    write_csv(path, [f"{named[name]}{unit}" if name in named else name for name in HEADER], rows)
    beside = path.with_name(f"{path.stem}-curves{path.suffix}")
    write_csv(beside, ["run", "group", "seed", "metric", unit, "value"], list(curve_rows(comparison)))
    return beside


def curve_rows(comparison: Comparison) -> list[list[str | int | float]]:
    """One row a point of every curve; of scores, what was scored afterwards with them."""
    found: list[list[str | int | float]] = []
    for run in comparison.runs:
        scores = {name: [(point.cost, point.score) for point in curve] for name, curve in run.scores.items()}
        for name, curve in {**run.curves, **scores}.items():
            found += [[run.name, run.group, run.seed, name, cost, value] for cost, value in curve]
    return found
