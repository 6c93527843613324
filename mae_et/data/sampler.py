"""Which samples a step sees: a pure function of the plan, the seed and the position in the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from mae_et.curriculum.plan import Plan, PlannedStage, StepPlan
from mae_et.data.randomness import sample_seed, sample_seeds
from mae_et.data.requests import SampleRequest, SampleRequests


def pass_order(images: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """The permutation of so many images in a pass over the data."""
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(images)


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

    def images_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Image indices at global positions among fresh samples (0 is the first sample of the run).

        With repeats > 1, so many consecutive positions hold the same image; `PlanSampler` spreads them over the batch.
        """
        epochs, within = np.divmod(positions, self.epoch_images)
        images = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            if epoch != self._epoch:
                self._epoch, self._order = epoch, pass_order(self.images, self.seed, epoch)
            here = epochs == epoch
            images[here] = self._order[within[here] // self.repeats]
        return images


def delivered_steps(stage: PlannedStage, within: int) -> range:
    """Steps of a stage whose images the data path delivers to a run that goes on at its step `within`.

    They are the fresh ones from there on. Before them come those whose images the replay buffer held when the run
    left off, so that it is filled again.
    """
    fresh = stage.fresh_steps_before(within)
    if stage.replay and 0 < within < stage.steps:
        starts_fresh = within % (stage.replay + 1) == 0  # and pushes the oldest out: that is not needed any more
        fresh -= min(fresh, stage.replay_batches - starts_fresh)
    return range(fresh * (stage.replay + 1), stage.steps, stage.replay + 1)


class PlanSampler(Sampler[Sequence[SampleRequest]]):
    """Yields the requests of one rank, one micro-batch at a time, from a step to the end of the plan.

    Step s covers the global positions `plan.images_before(s)` and on; micro-batch a of rank r takes a contiguous
    share of them. What a position holds depends neither on ranks nor on micro-batches, and a checkpoint needs to
    store nothing but the step.

    Steps that replay images (`data.replay`) request nothing. A pass over the data goes through the fresh samples
    alone, so that it stays whole; seeds count all samples, so that none comes twice. Where the run goes on amid
    replays, the requests of what the replay buffer held come first, once more.

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
        return sum(len(steps) for steps in self._delivered()) * self.accumulation

    def __iter__(self) -> Iterator[SampleRequests]:
        for steps in self._delivered():
            for step in steps:
                for micro in range(self.accumulation):
                    yield self.requests(step, micro)

    def _delivered(self) -> Iterator[range]:
        """Steps of the plan whose images the data path delivers, by stage."""
        for stage, start in zip(self.plan.stages, self.plan.boundaries):
            if self.first_step < start + stage.steps:
                steps = delivered_steps(stage, max(0, self.first_step - start))
                yield range(start + steps.start, start + steps.stop, steps.step)

    def requests(self, step: int, micro: int = 0) -> SampleRequests:
        """Requests of one micro-batch of this rank; the step is a fresh one."""
        now = self.plan.at(step)
        assert now.fresh, f"step {step} replays images, and requests none"
        places = self.places(now, micro)
        views = np.arange(places.start, places.stop) % self._distinct(now)
        positions = now.fresh_images + views * self.repeats
        seeds = sample_seeds(self.seed, now.images_seen + places.start, len(places))
        return SampleRequests(self.images_at(positions), now.bandwidth, now.magnitude, seeds)

    def places(self, now: StepPlan, micro: int = 0) -> range:
        """Places of one micro-batch of this rank in the batch of all ranks and micro-batches."""
        count = now.batch // (self.ranks * self.accumulation)
        first = (micro * self.ranks + self.rank) * count
        return range(first, first + count)

    def seed_at(self, now: StepPlan, within: int) -> int:
        """Seed of the sample at a place in the batch, fresh or replayed."""
        return sample_seed(self.seed, now.images_seen + within)

    def view_of(self, now: StepPlan, within: int) -> int:
        """The first place in the batch that shows the same image as this one; itself without repeats."""
        return within % self._distinct(now)

    def _distinct(self, now: StepPlan) -> int:
        """Images in the batch of all ranks and micro-batches, views of one counted once."""
        return now.batch // self.repeats

    def images_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Image indices at global positions among fresh samples."""
        return self._order.images_at(positions)
