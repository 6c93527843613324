"""A run that is thrown away: its steps and its batches one by one, and what they take."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from mae_et.curriculum.calibration import stage_key
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.loader import Batch, batches_of, build_loader
from mae_et.data.sampler import PlanSampler
from mae_et.engine.distributed import Ranks, any_rank, slowest
from mae_et.engine.step import train_step
from mae_et.running import Assembly

Rehearse = Callable[[Ranks], Assembly]
"""Ranks to the configured run with an endless plan, for steps that nothing is kept of."""


class Rehearsal:
    """Steps and batches of a run that is thrown away.

    Every step takes a batch from the data path here; what replay saves is reckoned, not measured.

    Args:
        assembly: the run, with a state of its own.
        ranks: of the run.
        seed: of its samples.
        patience: seconds after which a block of calls ends, however few of them are done.
    """

    def __init__(self, assembly: Assembly, ranks: Ranks, seed: int, patience: float):
        stages = tuple(replace(stage, replay=0, replay_batches=0) for stage in assembly.plan.stages)
        self.plan: Plan = replace(assembly.plan, stages=stages)
        self.assembly, self.ranks, self.seed, self.patience = assembly, ranks, seed, patience
        self.accumulation = assembly.loop.accumulation
        assembly.state.network.train()

    def geometries(self) -> list[tuple[PlannedStage, int]]:
        """The first stage of each geometry with its first step, those of smaller steps first."""
        found: dict[str, tuple[PlannedStage, int]] = {}
        for stage, first in zip(self.plan.stages, self.plan.boundaries):
            found.setdefault(stage_key(stage), (stage, first))
        return sorted(found.values(), key=lambda pair: pair[0].batch * pair[0].grid[0] * pair[0].grid[1])

    def sampler(self, step: int, batch: int | None = None) -> PlanSampler:
        """Micro-batches of this rank from a step on; with `batch`, whole ones of so many images of each rank."""
        plan, accumulation = self.plan, self.accumulation
        if batch is not None:
            shared = batch * self.ranks.count
            plan = replace(plan, stages=tuple(replace(stage, batch=shared) for stage in plan.stages))
            accumulation = 1
        share = (self.ranks.rank, self.ranks.count, accumulation)
        return PlanSampler(plan, self.seed, step, *share, self.assembly.repeats)

    @contextmanager
    def batches(self, step: int, workers: int, batch: int | None = None) -> Iterator[Iterator[Batch]]:
        """What `sampler` asks for, through the data path."""
        pinned = self.ranks.device.type == "cuda"
        loader = build_loader(self.assembly.dataset, self.sampler(step, batch), workers, pinned)
        with batches_of(loader) as batches:
            yield batches

    def step(self, step: int, batches: Iterator[Batch], accumulation: int | None = None) -> None:
        """One step of training; `accumulation` takes the place of the run's."""
        now, loop = self.plan.at(step), self.assembly.loop
        train_step(self.assembly.state, batches, now, self.assembly.task, accumulation or loop.accumulation, loop.clip)

    def take(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of one step."""
        return list(islice(batches, self.accumulation))

    def timed(self, call: Callable[[], object], count: int) -> float:
        """Seconds of a call, see `timed`."""
        return timed(call, count, self.ranks.device, self.patience)


def timed(call: Callable[[], object], count: int, device: torch.device, patience: float) -> float:
    """Seconds of a call on the slowest rank, the mean of `count` in a row; all ranks call it together.

    Args:
        call: what to time.
        count: how often, at most.
        device: that is waited for, before and after.
        patience: seconds after which no further call begins.
    """
    wait_for(device)
    started, done, late = time.perf_counter(), 0, False
    while done < count and not late:
        call()
        done += 1
        # The ranks agree after each step, as they do in training.
        late = any_rank([time.perf_counter() - started > patience])[0]
    wait_for(device)
    return slowest((time.perf_counter() - started) / done)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def forget_peak_memory(device: torch.device) -> None:
    """Begin a new peak of `peak_memory`, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes, the most of any rank: on a GPU of tensors since the last reset, on a CPU of the whole process."""
    if device.type == "cuda":
        return int(slowest(torch.cuda.max_memory_allocated(device)))
    if device.type != "cpu" or not sys.platform.startswith(("linux", "darwin")):
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(slowest(peak * (1024 if sys.platform.startswith("linux") else 1)))  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """What people call the device, e.g. `NVIDIA H100` or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
