"""Searches for a curriculum: which candidate each stage takes, given what a training with it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from mae_et.curriculum.stage import Stage, format_size


@dataclass(frozen=True)
class Candidate:
    """What a stage may be.

    Attributes:
        bandwidth: B, (height, width) in px.
        mask_ratio: share of the patches hidden; None is the run's.
        batch_scale: the batch in multiples of the run's.
    """

    bandwidth: tuple[int, int]
    mask_ratio: float | None = None
    batch_scale: int = 1

    @property
    def name(self) -> str:
        """For tables and folders: `96`, `96m0.6` with its own mask ratio, `96k2` with twice the batch."""
        mask = "" if self.mask_ratio is None else f"m{self.mask_ratio:g}"
        return format_size(self.bandwidth) + mask + ("" if self.batch_scale == 1 else f"k{self.batch_scale}")

    def stage(self, end: float) -> Stage:
        """The stage that ends at `end`."""
        return Stage(end, self.bandwidth, self.mask_ratio, batch_scale=self.batch_scale)


Cell = tuple[Candidate, ...]
"""One candidate a stage, from the first stage on: all that decides a training besides its seed."""


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    Attributes:
        stage: that it decides about, from 0; the number of stages less one for the constant final size of `greedy`.
        candidate: for that stage.
        cell: that was trained.
        utility: what it came to; more is better.
        kept: whether the stage may take the candidate (`greedy`), or takes it (`sequential`).
    """

    stage: int
    candidate: Candidate
    cell: Cell
    utility: float
    kept: bool


@dataclass(frozen=True)
class Found:
    """What a search comes to: a candidate for every stage, and the trainings that said so, in order."""

    cell: Cell
    trials: tuple[Trial, ...]


def cell_name(cell: Cell) -> str:
    """Names of the stages, joined: `96-160-224`."""
    return "-".join(candidate.name for candidate in cell)


def candidates_of(
    bandwidths: Sequence[tuple[int, int]], mask_ratios: Sequence[float] = (), batch_scales: Sequence[int] = ()
) -> tuple[Candidate, ...]:
    """All combinations from the cheapest image to the dearest: by B, then from the most masked on, then by batch."""
    masks = sorted(set(mask_ratios), reverse=True) or [None]
    sizes = sorted(set(bandwidths), key=lambda size: (size[0] * size[1], size))
    return tuple(Candidate(*values) for values in product(sizes, masks, sorted(set(batch_scales)) or [1]))


def cell_stages(cell: Cell, stages: int, final: Candidate) -> tuple[Stage, ...]:
    """Stages of equal shares: those of the cell, then the final one for the rest."""
    whole = (*cell, *[final] * (stages - len(cell)))
    return tuple(candidate.stage((index + 1) / stages) for index, candidate in enumerate(whole))


def merged(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The same curriculum with neighbours that differ in nothing but their ends made one."""
    kept: list[Stage] = []
    for stage in stages:
        if kept and vars(kept[-1]) == {**vars(stage), "end": kept[-1].end}:
            kept.pop()
        kept.append(stage)
    return tuple(kept)


def sequential(
    stages: int, candidates: Sequence[Candidate], final: Candidate, evaluate: Callable[[Cell], float]
) -> Found:
    """EfficientTrain++'s Algorithm 2: stage by stage from the front, what is best when training goes on from there.

    Args:
        stages: N; the last one is `final`, as the algorithm's loop ends before it.
        candidates: of each other stage, the cheapest first: of equals the first is taken.
        final: the final size.
        evaluate: utility of the stages chosen so far and one more; `(stages - 1) * len(candidates)` calls.
    """
    chosen: Cell = ()
    trials: list[Trial] = []
    for stage in range(stages - 1):
        utilities = {candidate: evaluate((*chosen, candidate)) for candidate in candidates}
        best = max(utilities, key=utilities.__getitem__)
        trials += [Trial(stage, c, (*chosen, c), utility, c == best) for c, utility in utilities.items()]
        chosen = (*chosen, best)
    return Found((*chosen, final), tuple(trials))


def greedy(
    stages: int, candidates: Sequence[Candidate], final: Candidate, evaluate: Callable[[Cell], float], margin: float = 0
) -> Found:
    """EfficientTrain++'s Algorithm 1: stage by stage from the back, the smallest candidate that loses nothing.

    Stage i is tried with all stages before it at the same candidate. What a stage keeps, the one before it can keep as
    well, for that is the same training; so each stage begins where the one after it ended and goes down until a
    candidate loses. That finds the smallest one if larger ones lose no more, and takes at most N + M - 1 trainings (M:
    candidates and the final size), as the paper says of it.

    Args:
        stages: N; the last one is `final`.
        candidates: from the smallest to the largest, all smaller than `final` or equal to it.
        final: the final size, of which the first training is made throughout.
        evaluate: utility of a whole curriculum.
        margin: by which a utility may stay below that of the final size throughout.
    """
    falling = [final, *(candidate for candidate in reversed(candidates) if candidate != final)]
    found = [final] * stages
    baseline = evaluate(tuple(found))
    trials = [Trial(stages - 1, final, tuple(found), baseline, True)]
    place = 0
    for stage in reversed(range(stages - 1)):
        found[: stage + 1] = [falling[place]] * (stage + 1)
        for lower in range(place + 1, len(falling)):
            cell = (*[falling[lower]] * (stage + 1), *found[stage + 1 :])
            utility = evaluate(cell)
            trials.append(Trial(stage, falling[lower], cell, utility, utility >= baseline - margin))
            if not trials[-1].kept:
                break
            place, found[: stage + 1] = lower, cell[: stage + 1]
    return Found(tuple(found), tuple(trials))
