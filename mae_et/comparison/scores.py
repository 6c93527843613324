"""Which of a run's metrics tell how good it is, and which of them a comparison is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from mae_et.comparison.runs import ComparedRun, Point
from mae_et.config import ConfigError

# The best first. Held-out images before test images: they are looked at on the way, and not at the end alone.
PREFERRED = (
    *("eval/probe", "eval/knn", "val/top1", "test/top1", "val/miou", "test/miou", "val/ap", "test/ap"),
    *("probe/top1", "knn/"),
)
ROOMS = ("eval", "val", "test", "val_many_scales", "test_many_scales", "probe", "knn")
CHOICES = ("probe/strength", "probe/rate")  # what probes chose, which is no score
LOSS = "-train/loss"


def scores_of(
    curves: Mapping[str, Sequence[tuple[float, float]]], late: Sequence[tuple[float, Mapping[str, float]]]
) -> dict[str, list[Point]]:
    """Curves of scores by name; the training loss among them, negated, so that more is better.

    Args:
        curves: of all metrics.
        late: (cost, scores by name) that were taken afterwards. They count where a curve has not got so far.
    """
    found = {
        name: [Point(*point) for point in curve]
        for name, curve in curves.items()
        if name.partition("/")[0] in ROOMS and name not in CHOICES
    }
    for cost, values in late:
        for name, value in values.items():
            curve = found.setdefault(name, [])
            if not curve or curve[-1].cost < cost:
                curve.append(Point(cost, value))
    if "train/loss" in curves:
        found[LOSS] = [Point(cost, -loss) for cost, loss in curves["train/loss"]]
    return found


def choose_score(runs: Sequence[ComparedRun], wanted: str | None) -> str:
    """The score to compare: the one asked for, or the best that all runs have.

    The training loss is taken unasked only where no run has anything better.

    Raises:
        ConfigError: a run does not have it, or runs share none; the message names what each has.
    """
    shared = [name for name in runs[0].scores if all(name in run.scores for run in runs)]
    if wanted is not None:
        name = f"-{wanted}" if f"-{wanted}" in shared else wanted
        if name not in shared:
            _refuse(runs, wanted, shared)
        return name
    better = [name for name in shared if name != LOSS]
    if better:
        return min(better, key=_preference)
    if LOSS in shared and len({run.task for run in runs}) == 1 and all(run.scores.keys() == {LOSS} for run in runs):
        return LOSS
    raise ConfigError(
        f"these runs share no score:\n{_inventory(runs)}\nCompare runs of one task that have been scored (pretraining: "
        "evaluation.every=0.1, or `python -m mae_et evaluate RUN` afterwards), or name one with --score"
    )


def _refuse(runs: Sequence[ComparedRun], wanted: str, shared: Sequence[str]) -> None:
    everywhere = dict.fromkeys(name for run in runs for name in run.scores)
    if wanted in everywhere:
        lacking = [run for run in runs if wanted not in run.scores]
        raise ConfigError(f"--score {wanted}: there are runs without it:\n{_inventory(lacking)}\nLeave them out")
    close = get_close_matches(wanted, everywhere, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"--score {wanted}: these runs share {', '.join(sorted(shared)) or 'no score'}{hint}")


def _inventory(runs: Sequence[ComparedRun]) -> str:
    """What each run has, one a line."""
    return "\n".join(
        f"  {run.name} ({run.task}, {run.status}): {', '.join(sorted(run.scores)) or 'no score yet'}" for run in runs
    )


def _preference(name: str) -> tuple[int, int, str]:
    ranks = [rank for rank, start in enumerate(PREFERRED) if name.startswith(start)]
    return ranks[0] if ranks else len(PREFERRED), len(name), name


def is_share(runs: Sequence[ComparedRun], score: str) -> bool:
    """Whether the score is one of those in [0, 1]: all are but losses."""
    return not score.startswith("-") and all(0 <= point.score <= 1 for run in runs for point in run.scores[score])


def check_reach(runs: Sequence[ComparedRun], score: str, reach: float) -> None:
    """Raise ConfigError for a score that cannot be reached by any run, such as one in per cent, or a loss's own."""
    if score == LOSS and not reach <= 0:
        raise ConfigError(f"--reach {reach:g}: losses are compared negated; say --reach=-{abs(reach):g}")
    if is_share(runs, score) and not 0 <= reach <= 1:
        raise ConfigError(f"--reach {reach:g}: {score} is between 0 and 1; say {reach / 100:g} for {reach:g} %")
