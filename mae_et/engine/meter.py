"""What a row of metrics says about the steps since the last one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mae_et.curriculum.plan import Plan, StepPlan
from mae_et.data.loader import Samples
from mae_et.engine.distributed import mean_over_ranks
from mae_et.engine.state import TrainState
from mae_et.engine.step import StepResult


class TimedBatches:
    """An iterator that knows how long its consumer waited, and shows each batch to others as it passes."""

    def __init__(self, batches: Iterator[Samples], *watchers: Callable[[Samples], None]):
        self._batches, self._watchers, self.waited = batches, watchers, 0.0

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Samples:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        for watch in self._watchers:
            watch(batch)
        return batch

    def take_waited(self) -> float:
        """Seconds waited since last asked."""
        waited, self.waited = self.waited, 0.0
        return waited


class Meter:
    """Counts since the last row. The sum of losses lives in the state, so that a resumed run's rows are the same."""

    def __init__(self) -> None:
        self.gradient_norm: Tensor = torch.zeros(())
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()

    def add(self, state: TrainState, result: StepResult, images: int, waited: float) -> None:
        """Count one step; nothing is read from the device."""
        finite = torch.isfinite(result.loss)
        state.loss_sum += torch.where(finite, result.loss, 0)
        state.loss_steps += finite
        self.gradient_norm = result.gradient_norm
        self.images += images
        self.waited += waited

    def read(self, state: TrainState) -> dict[str, float]:
        """Means since the last row; waits for the device, and starts the sum of losses anew."""
        total, steps = mean_over_ranks(torch.stack([state.loss_sum, state.loss_steps]))
        loss = (total / steps).item()  # NaN where no step had a finite one
        state.loss_sum.zero_()
        state.loss_steps.zero_()
        elapsed = time.perf_counter() - self.started
        return {
            "train/loss": loss,
            "train/gradient_norm": self.gradient_norm.item(),
            "throughput/images_per_second": self.images / elapsed,
            "throughput/data_wait": self.waited / elapsed,
        }


def axes(plan: Plan, state: TrainState) -> dict[str, float]:
    """The axes on which runs compare, after the state's steps."""
    return {
        "step": state.step,
        "compute/fraction": plan.compute_fraction(state.step),
        "compute/flops": plan.flops_before(state.step) or 0.0,
        "time/hours": state.seconds / 3600,
        "images_seen": plan.images_before(state.step),
    }


def row(plan: Plan, state: TrainState, now: StepPlan, meter: Meter) -> dict[str, float]:
    """One row of metrics about the steps since the last one."""
    fraction = plan.compute_fraction(state.step)
    return {
        **axes(plan, state),
        **meter.read(state),
        "train/lr": now.learning_rate,
        "train/skipped_steps": state.skipped.item(),
        "stage/index": now.stage.index,
        "stage/bandwidth": max(now.bandwidth),
        "stage/visible": now.stage.visible,
        # What the data path delivered, where the others are replayed.
        **({"train/images_fresh": plan.fresh_before(state.step)} if plan.total_fresh < plan.total_images else {}),
        **({} if state.selection is None else state.selection.metrics(state.step)),
        # By compute, not by steps: later stages have dearer steps.
        "eta/hours": state.seconds / fraction * (1 - fraction) / 3600,
    }
