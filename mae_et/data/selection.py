"""Sample selection: passes that leave out a random share of what the network already does well (InfoBatch).

InfoBatch (arXiv 2303.04947; EfficientTrain++, arXiv 2405.08768, Table 23): each sample's score is the loss it had when
it was last trained on. A pass leaves out those below the mean score, each with probability r, and weighs the losses of
the others below the mean by 1 / (1 - r), so that the expected sum of gradients over a pass is that of the whole data
set. The end of training, from u = 1 - anneal on, leaves out nothing.

A run is a budget of steps, here as everywhere: shorter passes do not shorten it, the same steps make more of them. To
save compute instead, as the published runs do, lower the budget. Per step, the mean of weighted losses is on average
images / kept times the plain mean, as published; there, a pass has as many times fewer steps.

What differs from the published code: samples are left out independently of each other, as the paper's Eq. 3 has it,
where the code draws a fixed number; pruning begins with the second pass, once there are scores, and samples without
one are kept and have no part in the mean, where the code gives them a score of 3; a pass that is under way when the
annealing begins is cut short.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mae_et.curriculum.plan import Plan
from mae_et.data.requests import SampleRequests
from mae_et.data.sampler import PlanSampler, pass_order

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InfoBatch:
    """The rule.

    Attributes:
        ratio: r, the probability of leaving out a sample below the mean, in [0, 1).
        anneal: share of the budget, at its end, in which nothing is left out.
    """

    ratio: float = 0.5
    anneal: float = 0.125

    def weights(self, scores: Floats, seed: int, number: int) -> Floats:
        """What each sample's loss counts in a pass: a pure function of its arguments.

        Args:
            scores: float32 [images], NaN where there is none.
            seed: of the run.
            number: of the pass.

        Returns:
            float32 [images]: 0 for a sample that is left out, 1 / (1 - ratio) for others below the mean, else 1.
        """
        known = scores[~np.isnan(scores)].astype(np.float64)
        below = scores < known.mean() if len(known) else np.zeros(len(scores), dtype=bool)  # NaN is below nothing
        # The order of a pass begins at counter 0 of the same key, the mixing of a step at [0, 0, 0, 1].
        generator = np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, 0, 2]))
        pruned = below & (generator.random(len(scores)) < self.ratio)
        weights = np.where(below, np.float32(1 / (1 - self.ratio)), np.float32(1))
        weights[pruned] = 0
        return weights


@dataclass(frozen=True)
class Pass:
    """One pass over the data.

    It shows its samples in the order of the pass's permutation, and ends with its last whole batch: what is left over
    is not shown. Its stage may change on the way, and its batch with it.

    Attributes:
        number: from 0.
        first_step: where it begins.
        weights: float32 [images], of `InfoBatch.weights`.
    """

    number: int
    first_step: int
    weights: Floats

    @property
    def pruned(self) -> float:
        """Share of the images that it leaves out."""
        return float(np.mean(self.weights == 0))


class Passes:
    """A run pass by pass: what the running one shows, and where it ends.

    Args:
        plan: of the run.
        rule: which samples are left out.
        seed: of the run.

    Attributes:
        running: the pass that runs, at first one over all images.
        end: the step after its last.

    Raises:
        ValueError: a plan with a batch of more images than there are, or one that replays images.
    """

    def __init__(self, plan: Plan, rule: InfoBatch, seed: int):
        for stage in plan.stages:
            if stage.batch > plan.images:
                raise ValueError(
                    f"{stage.name}: a pass over {plan.images} images has no whole batch of {stage.batch}; lower "
                    "optim.batch, or set selection.method=none"
                )
            if stage.replay:
                raise ValueError(
                    f"{stage.name} replays images, which would train again on what selection chose once, with the "
                    "weights of another pass; set replay.ratio=0, or selection.method=none"
                )
        self.plan, self.rule, self.seed = plan, rule, seed
        self._annealing = plan.first_step_at(1 - rule.anneal)
        self.enter(Pass(0, 0, np.ones(plan.images, dtype=np.float32)))

    def enter(self, running: Pass) -> None:
        """Go on within a pass."""
        order, plan, first = pass_order(self.plan.images, self.seed, running.number), self.plan, running.first_step
        self.running, self._order = running, order[running.weights[order] > 0]
        shown = plan.images_before(first) + len(self._order)
        self.end = first + bisect_right(range(first, plan.total_steps + 1), shown, key=plan.images_before) - 1
        if running.pruned and first < self._annealing:
            self.end = min(self.end, self._annealing)

    def begin(self, scores: Floats) -> None:
        """Begin the next pass, where the running one ends, with the scores at that point."""
        number, step = self.running.number + 1, self.end
        weights = self.rule.weights(scores, self.seed, number)
        # Of few images, those kept may not fill a batch: then none is left out.
        if step >= self._annealing or np.count_nonzero(weights) < self.plan.at(step).batch:
            weights = np.ones_like(weights)
        self.enter(Pass(number, step, weights))

    def images_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Image indices at global sample positions, which are of the running pass."""
        return self._order[positions - self.plan.images_before(self.running.first_step)]

    def made(self, step: int) -> float:
        """Passes made before a step of the running one, or its end."""
        first = self.running.first_step
        return self.running.number + (step - first) / (self.end - first)


class PassSampler(PlanSampler):
    """Yields the requests of one rank, from `first_step` to the end of the running pass.

    Scores decide about a pass, and are not there before the last one's end; so that the sampler, which is asked ahead
    of time, stops there, and is asked anew for each pass. Samples have the seeds that they have without selection.

    Args:
        passes: of the run.
        rank, ranks, accumulation: as of `PlanSampler`.
    """

    def __init__(self, passes: Passes, rank: int = 0, ranks: int = 1, accumulation: int = 1):
        super().__init__(passes.plan, passes.seed, passes.running.first_step, rank, ranks, accumulation)
        self.passes = passes

    def __len__(self) -> int:
        return (self.passes.end - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[SampleRequests]:
        for step in range(self.first_step, self.passes.end):
            for micro in range(self.accumulation):
                yield self.requests(step, micro)

    def images_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Image indices at global positions of the running pass."""
        return self.passes.images_at(positions)
