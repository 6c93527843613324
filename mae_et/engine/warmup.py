"""Compiled blocks meet every size of a run before its clock starts."""

from __future__ import annotations

import time

import torch
from torch import nn

from mae_et.curriculum.plan import Plan
from mae_et.data.loader import SampleDataset
from mae_et.data.sampler import PlanSampler
from mae_et.engine.distributed import Ranks
from mae_et.engine.state import TrainState
from mae_et.engine.step import micro_step
from mae_et.engine.tasks import Task


def is_compiled(model: nn.Module) -> bool:
    """Whether some of the model's modules are compiled, or will be when they are called."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def warm_up(
    state: TrainState,
    plan: Plan,
    task: Task,
    dataset: SampleDataset,
    ranks: Ranks,
    seed: int,
    accumulation: int,
    repeats: int = 1,
) -> float:
    """Forward and backward passes of every size of the plan; all ranks call it together.

    One micro-batch each, the first of the stage. Weights, moments, running statistics and random numbers are as they
    were before.

    Stages that are over come as well: code for dynamic sizes depends on the size that is met first (torch's compiler
    splits sums by it), and a run that goes on must sum in the order in which it began.

    Args:
        state: new, or restored from a checkpoint; compiled.
        plan, task, dataset, ranks, seed, accumulation, repeats: of the run.

    Returns:
        Seconds that it took.
    """
    started = time.perf_counter()
    statistics = [buffer.clone() for buffer in state.statistics]
    devices = [state.device] if state.device.type == "cuda" else []
    state.network.train()
    with torch.random.fork_rng(devices):
        for first in plan.boundaries:
            share = (ranks.rank, ranks.count, accumulation)
            requests = next(iter(PlanSampler(plan, seed, first, *share, repeats)))
            micro_step(state, dataset.__getitems__(requests), plan.at(first), task, 1.0)
            state.optimizer.zero_grad(set_to_none=True)
    for buffer, before in zip(state.statistics, statistics):
        buffer.copy_(before)
    if state.device.type == "cuda":
        torch.cuda.synchronize(state.device)
    return time.perf_counter() - started
