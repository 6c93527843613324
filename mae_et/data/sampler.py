"""Which samples a step sees: a pure function of the plan, the seed and the position in the run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mae_et.curriculum.plan import Plan, StepPlan
from mae_et.data.randomness import sample_seed
from mae_et.data.requests import SampleRequest


class EpochOrder:
    """The order of images in each pass over the data, one permutation per (seed, pass).

    Args:
        images: images in the data set.
        epoch_images: global positions that a pass takes, views of one image counted one by one.
        seed: of the run.
        repeats: views of an image in a batch. A pass then shows the first `epoch_images / repeats` images of its
            permutation, as DeiT's sampler does, and is as long as without.
    """

    def __init__(self, images: int, epoch_images: int, seed: int, repeats: int = 1):
        self.images, self.epoch_images, self.seed, self.repeats = images, epoch_images, seed, repeats
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def image_at(self, position: int) -> int:
        """Image index at a global sample position (0 is the first sample of the run).

        With repeats > 1, so many consecutive positions hold the same image; `PlanSampler` spreads them over the batch.
        """
        epoch, within = divmod(position, self.epoch_images)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.images)
        return int(self._order[within // self.repeats])


class PlanSampler(Sampler[list[SampleRequest]]):
    """Yields the requests of one rank, one micro-batch at a time, from a step to the end of the plan.

    Step s covers the global positions `plan.images_before(s)` and on; micro-batch a of rank r takes a contiguous
    share of them. What a position holds depends neither on ranks nor on micro-batches, and a checkpoint needs to
    store nothing but the step.

    Args:
        plan: the run.
        seed: of the run.
        first_step: where to begin.
        rank, ranks: this process among all.
        accumulation: micro-batches per step.
        repeats: views of every image in a batch, each with a seed of its own (repeated augmentation, Hoffer et al.,
            arXiv 1901.09335). In a batch of N, samples j, j + N/repeats, j + 2N/repeats, ... show the same image, so
            that neighbours show different ones.

    Raises:
        ValueError: `repeats` does not divide a batch.
    """

    def __init__(
        self,
        plan: Plan,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        repeats: int = 1,
    ):
        for stage in plan.stages:
            if repeats < 1 or stage.batch % repeats:
                raise ValueError(
                    f"{stage.name}: {repeats} views of each image do not divide a batch of {stage.batch}; choose a "
                    f"number of views that divides it, or 1 for no repeated augmentation"
                )
        self.plan, self.seed, self.first_step = plan, seed, first_step
        self.rank, self.ranks, self.accumulation = rank, ranks, accumulation
        self.repeats = repeats
        self._order = EpochOrder(plan.images, plan.epoch_images, seed, repeats)

    def __len__(self) -> int:
        return (self.plan.total_steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for step in range(self.first_step, self.plan.total_steps):
            for micro in range(self.accumulation):
                yield self.requests(step, micro)

    def requests(self, step: int, micro: int = 0) -> list[SampleRequest]:
        """Requests of one micro-batch of this rank."""
        now = self.plan.at(step)
        count = now.batch // (self.ranks * self.accumulation)
        first = (micro * self.ranks + self.rank) * count
        return [self._request(now, within) for within in range(first, first + count)]

    def _request(self, now: StepPlan, within: int) -> SampleRequest:
        """The sample at a place in the batch of all ranks and micro-batches."""
        image = within % (now.batch // self.repeats)
        return SampleRequest(
            self._order.image_at(now.images_seen + image * self.repeats),
            now.bandwidth,
            now.magnitude,
            sample_seed(self.seed, now.images_seen + within),
        )
