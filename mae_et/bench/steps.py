"""What steps take on micro-batches of several sizes, at every geometry of a plan."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch

from mae_et.bench.report import MicroBatch
from mae_et.curriculum.plan import PlannedStage
from mae_et.data.loader import Batch
from mae_et.engine.distributed import any_rank
from mae_et.engine.parallel import gradients_shared
from mae_et.engine.step import micro_step
from mae_et.rehearsal import Rehearsal, forget_peak_memory, peak_memory

SMALLEST = 8
"""Images of the smallest micro-batch, unless the batch itself is smaller."""

MULTIPLES = (2, 4)
"""Of the batch, tried besides."""

ROUNDS = 5
"""Turns in which all sizes are timed, fewer where time is up; medians of them are kept."""

TOGETHER = 4
"""Micro-batches of a step that is timed, at most: more would make the update's part of each little smaller."""

LEAST_SECONDS = 1.0
"""For all steps of a size up to the configured one, however little time there is."""

KEPT = 8
"""Micro-batches up to so many times smaller than the largest that fits everywhere are timed."""

MEMORY_SHARE = 0.7
"""Of a machine's memory that steps on a CPU may be expected to take: there is no error to catch when it runs out."""


class Geometry:
    """A stage's steps on images that are there.

    Args:
        rehearsal: of the run.
        stage, first: of its plan, with the stage's first step.
    """

    def __init__(self, rehearsal: Rehearsal, stage: PlannedStage, first: int):
        self.rehearsal, self.stage, self.first = rehearsal, stage, first
        repeats = rehearsal.assembly.repeats
        sampler = rehearsal.sampler(first, batch=repeats)
        found: Batch = rehearsal.assembly.dataset.__getitems__(sampler.requests(first))
        self.pool = Batch(*(tensor[:1] for tensor in found.tensors), bad=())

    @property
    def share(self) -> int:
        """Images of a step on each rank."""
        return self.stage.batch // self.rehearsal.ranks.count

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) as it reaches the device."""
        _, channels, height, width = self.pool.images.shape
        return channels, height, width

    def batch(self, images: int) -> Batch:
        """So many times the same image, each with a seed of its own; pinned where the data path pins."""
        held = len(self.pool.images)
        if held < images:
            places = torch.zeros(images, dtype=torch.int64)
            pixels, labels, _, indices = (tensor[places] for tensor in self.pool.tensors)
            self.pool = Batch(pixels, labels, torch.arange(images), indices)
            if self.rehearsal.ranks.device.type == "cuda":
                self.pool = Batch(*(tensor.pin_memory() for tensor in self.pool.tensors), bad=())
        return Batch(*(tensor[:images] for tensor in self.pool.tensors), bad=())

    def seconds(self, images: int, count: int = 1, accumulation: int = 1) -> float:
        """Of a step on so many images in each micro-batch, the mean of `count`."""
        batch = self.batch(images)
        return self.rehearsal.timed(lambda: self.rehearsal.step(self.first, repeat(batch), accumulation), count)

    def fits(self, images: int) -> bool:
        """Try a step; False where any rank's GPU has not the memory for it.

        The first try keeps its gradients to itself, so that ranks that had the memory wait for none that had not.
        """
        state, task = self.rehearsal.assembly.state, self.rehearsal.assembly.task

        def alone() -> None:
            with gradients_shared(state.network, share=False):
                micro_step(state, self.batch(images), self.rehearsal.plan.at(self.first), task, 1.0)

        for call in (alone, lambda: self.seconds(images)):
            full = False
            try:
                call()
            except torch.cuda.OutOfMemoryError:
                full = True
            state.optimizer.zero_grad(set_to_none=True)
            if any_rank([full])[0]:
                torch.cuda.empty_cache()
                return False
        return True


@dataclass
class Candidate:
    """A size of micro-batch under measurement.

    Attributes:
        images, accumulation: as of `MicroBatch`.
        fits: whether memory suffices.
        guess: seconds of a step, from the first one.
        together: micro-batches of a step that is timed.
        seconds: of such a step, by block.
        memory: peak bytes.
    """

    images: int
    accumulation: int | None
    fits: bool = True
    guess: float = 0.0
    together: int = 1
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None


def ladder(share: int, accumulation: int) -> list[Candidate]:
    """Sizes to try for a step of `share` images on a process: halves, the configured one, and multiples."""
    counts = {1, accumulation}
    for count in (1, accumulation):
        while share % (2 * count) == 0 and share // (2 * count) >= SMALLEST:
            count *= 2
            counts.add(count)
    while accumulation % 2 == 0:
        accumulation //= 2
        counts.add(accumulation)
    found = [Candidate(share // count, count) for count in sorted(counts, reverse=True)]
    return [*found, *(Candidate(multiple * share, None) for multiple in MULTIPLES)]


def climb(geometry: Geometry, accumulation: int, seconds: float) -> list[Candidate]:
    """Try sizes from the smallest on, until memory or time for the next one's rounds do not suffice.

    Args:
        geometry: of the steps.
        accumulation: as configured; up to the size that it means a size may take all of the seconds, or
            LEAST_SECONDS where that is more; larger ones half.
        seconds: for all sizes; the first is tried however long it takes.
    """
    configured = geometry.share // accumulation
    device, tried = geometry.rehearsal.ranks.device, []
    for candidate in ladder(geometry.share, accumulation):
        limit = max(LEAST_SECONDS, seconds) if candidate.images <= configured else seconds / 2
        last = tried[-1] if tried else None
        if last is not None and last.guess * candidate.images / last.images * ROUNDS > limit:
            break
        if last is not None and device.type == "cpu" and 2 * (last.memory or 0) > MEMORY_SHARE * machine_memory():
            break
        forget_peak_memory(device)
        candidate.fits = geometry.fits(candidate.images)
        tried.append(candidate)
        if not candidate.fits:
            break
        candidate.guess = geometry.seconds(candidate.images)
        candidate.memory = peak_memory(device)
    return tried


def machine_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def turns_within(seconds: float) -> Iterator[int]:
    """0, 1, ... below ROUNDS, until the seconds are over on any rank; 0 in any case."""
    started = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and any_rank([time.perf_counter() - started > seconds])[0]:
            return
        yield turn


def measure_steps(geometries: Sequence[Geometry], accumulation: int, seconds: float) -> list[list[Candidate]]:
    """Candidates of every geometry, those that fit with the seconds of their blocks, in turns.

    Args:
        geometries: smaller steps first.
        accumulation: as configured.
        seconds: for all of it.
    """
    share = seconds / len(geometries)
    found = [climb(geometry, accumulation, share) for geometry in geometries]
    fitting = [[size.accumulation for size in sizes if size.fits and size.accumulation] for sizes in found]
    common = set.intersection(*map(set, fitting))
    most = KEPT * min(common, default=10**9)
    kept = [[size for size in sizes if wanted(size, most, accumulation)] for sizes in found]
    turns = [(geometry, size) for geometry, sizes in zip(geometries, kept) for size in sizes if size.fits]
    block = 0.7 * seconds / (ROUNDS * max(1, len(turns)))  # where nothing fits there is nothing to time
    for turn in turns_within(0.7 * seconds):
        for geometry, size in turns if turn % 2 == 0 else reversed(turns):
            size.together = max(1, min(size.accumulation or 1, TOGETHER, round(block / size.guess)))
            count = max(1, round(block / (size.together * size.guess)))
            size.seconds.append(geometry.seconds(size.images, count, size.together))
    return kept


def wanted(size: Candidate, most: int, accumulation: int) -> bool:
    """Whether a size is near enough to those that will be advised, or is the configured one."""
    return size.accumulation is None or size.accumulation <= most or size.accumulation == accumulation


def noise(sizes: Sequence[Candidate]) -> float:
    """By how much repeats of the same steps differ: half their range as a share of the median, the median of sizes."""
    spreads = [
        (max(size.seconds) - min(size.seconds)) / (2 * statistics.median(size.seconds))
        for size in sizes
        if size.seconds
    ]
    return statistics.median(spreads) if spreads else 0.0


def micro_batch(size: Candidate, flops_per_image: float, peak: float) -> MicroBatch:
    """What was measured, as rates; see `MicroBatch`."""
    if not size.fits:
        return MicroBatch(size.images, size.accumulation, None, None, None, None, None)
    seconds = statistics.median(size.seconds) / size.together
    rate = size.images / seconds
    flops = rate * flops_per_image
    return MicroBatch(size.images, size.accumulation, seconds, rate, flops, flops / peak, size.memory)


def vary_threads(
    geometries: Sequence[Geometry], images: Sequence[int], cores: int, seconds: float
) -> list[dict[int, float]]:
    """Images a second of each geometry by number of threads: 1, 2, 4, ... and all cores, in turns."""
    before, counts = torch.get_num_threads(), thread_counts(cores)
    times: list[dict[int, list[float]]] = [{count: [] for count in counts} for _ in geometries]
    block = seconds / (ROUNDS * len(counts) * len(geometries))
    try:
        for turn in turns_within(seconds):
            for count in counts if turn % 2 == 0 else reversed(counts):
                torch.set_num_threads(count)
                for geometry, size, found in zip(geometries, images, times):
                    once = geometry.seconds(size)  # starts the threads
                    again = round(block / once)
                    found[count].append(geometry.seconds(size, again) if again else once)
    finally:
        torch.set_num_threads(before)
    return [
        {count: size / statistics.median(values) for count, values in found.items()}
        for size, found in zip(images, times)
    ]


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... below the number of cores, and that number."""
    return [*(1 << power for power in range(10) if 1 << power < cores), cores]
