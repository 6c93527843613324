"""The replay buffer: steps on images decoded before, for machines whose data path is slower than the model."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from mae_et.curriculum.plan import PlannedStage, StepPlan
from mae_et.data.loader import Batch
from mae_et.data.randomness import REPLAY_STREAM, uniform_stream
from mae_et.data.sampler import PlanSampler, delivered_steps


def replayed(batches: Iterator[Batch], sampler: PlanSampler) -> Iterator[Batch]:
    """A batch for every micro-step, of fresh ones alone (EfficientTrain++ section 5.3).

    A stage with replay n takes one step on fresh images and then n on images that the buffer holds, so that the data
    path works for every (n + 1)-th step only.

    The released code draws replayed chunks of a batch with replacement, keeps its buffer in fp16 on each rank, and
    loses it where the run is interrupted. Here a run's images are a function of its plan and its seed alone,
    whatever the ranks, micro-batches, workers and interruptions: a checkpoint stores nothing but the step, from which
    follow the requests of what the buffer held, and the sampler yields those first, see `delivered_steps`. A resume
    therefore decodes again as much as the buffer holds, at most.

    Args:
        batches: what a loader makes of the sampler's requests.
        sampler: of this rank; its plan says which steps replay.

    Returns:
        `batches` itself where no stage replays.
    """
    if not any(stage.replay for stage in sampler.plan.stages):
        return batches
    return _with_replays(batches, sampler)


def _with_replays(batches: Iterator[Batch], sampler: PlanSampler) -> Iterator[Batch]:
    plan, micros = sampler.plan, range(sampler.accumulation)
    buffer: ReplayBuffer | None = None
    for step in range(sampler.first_step, plan.total_steps):
        now = plan.at(step)
        if buffer is None or buffer.stage is not now.stage:
            buffer = ReplayBuffer(now.stage, sampler)
            within = step - plan.boundaries[now.stage.index]
            for _ in range(delivered_steps(now.stage, within).start, within, now.stage.replay + 1):
                for micro in micros:
                    buffer.put(next(batches), micro)
        for micro in micros:
            if now.fresh:
                batch = next(batches)
                buffer.put(batch, micro)
            else:
                batch = buffer.draw(now, micro)
            yield batch


class ReplayBuffer:
    """The last fresh batches of a stage on this rank.

    They are copied into one block of memory that goes back to the system with the stage. To keep the loader's own
    tensors would take more than the plan grants: those of worker processes are open files, pinned ones come in powers
    of two, and the C library keeps what is freed (`engine.memory`).

    Args:
        stage: what `stage.replay_batches` batches of all ranks hold.
        sampler: of this rank.
    """

    def __init__(self, stage: PlannedStage, sampler: PlanSampler):
        self.stage, self.sampler = stage, sampler
        self.capacity = min(stage.replay_batches, stage.fresh_steps)
        self.added = 0  # micro-batches
        self._rows: tuple[Tensor, ...] = ()
        self._pinned = False

    @property
    def held(self) -> int:
        """Fresh batches to draw from."""
        return min(self.added // self.sampler.accumulation, self.capacity)

    @property
    def bytes(self) -> int:
        """What the images take on this rank."""
        return self._rows[0].nbytes if self._rows else 0

    def put(self, batch: Batch, micro: int) -> None:
        """Keep a micro-batch of a fresh step in the place of the oldest; a step's micro-batches come in order."""
        if not self.capacity:
            return
        count, accumulation = len(batch.images), self.sampler.accumulation
        if not self._rows:
            self._rows = tuple(empty_block(self.capacity * accumulation, values) for values in batch.tensors)
            self._pinned = batch.images.is_pinned()
        assert micro == self.added % accumulation
        first = self.added % (self.capacity * accumulation) * count
        for rows, values in zip(self._rows, batch.tensors):
            rows[first : first + count] = values
        self.added += 1

    def draw(self, now: StepPlan, micro: int) -> Batch:
        """A micro-batch of a replayed step: images, labels and indices of held samples, and seeds of its own.

        Each place takes the sample at the same place of one of the held batches, so that a rank and a micro-batch
        replay what they have themselves loaded; masks, mixing and drop path are new.
        """
        sampler = self.sampler
        places = sampler.places(now, micro)
        newest = self.added // sampler.accumulation - 1
        slots = [(newest - self.age(now, within)) % self.capacity for within in places]
        count = len(places)
        chosen = torch.tensor([(slot * sampler.accumulation + micro) * count + k for k, slot in enumerate(slots)])
        images, labels, _, indices = (self._take(rows, chosen) for rows in self._rows)
        seeds = torch.tensor([sampler.seed_at(now, within) for within in places])
        return Batch(images, labels, seeds, indices)  # what could not be read was told when it was fresh

    def age(self, now: StepPlan, within: int) -> int:
        """How many fresh batches ago the sample came that a place replays: 0 is the last one, uniform over the held.

        Drawn from the place's seed. Views of one image (repeated augmentation) stay together.
        """
        seed = self.sampler.seed_at(now, self.sampler.view_of(now, within))
        return int(next(uniform_stream(seed, REPLAY_STREAM)) * self.held)

    def _take(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """Rows as a new tensor, in the kind of memory that the loader delivers."""
        taken = torch.empty((len(chosen), *rows.shape[1:]), dtype=rows.dtype, pin_memory=self._pinned)
        return torch.index_select(rows, 0, chosen, out=taken)


def empty_block(batches: int, like: Tensor) -> Tensor:
    """Room for so many batches `like` one, memory of the system's own that is taken as it is filled."""
    block = torch.frombuffer(mmap.mmap(-1, batches * like.nbytes), dtype=like.dtype)
    return block.view(batches * len(like), *like.shape[1:])
