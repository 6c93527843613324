"""One optimizer step. Nothing in here waits for the device, unless the optimizer cannot leave a step out by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_et.curriculum.plan import StepPlan
from mae_et.data.loader import Samples
from mae_et.engine.optim import set_learning_rate
from mae_et.engine.parallel import gradients_shared, whole
from mae_et.engine.state import TrainState
from mae_et.engine.tasks import Task


class StepResult(NamedTuple):
    """Scalars on the device: mean loss over this rank's images, and the gradient's norm before clipping."""

    loss: Tensor
    gradient_norm: Tensor


def micro_step(state: TrainState, batch: Samples, now: StepPlan, task: Task, share: float) -> Tensor:
    """Forward and backward of one micro-batch; returns its loss, detached."""
    inputs = task.prepare(batch, now, state.device)
    with state.precision.autocast():
        loss = task.loss(state.network, inputs, now)
    scaled = finite_or_nan(loss) * share
    (scaled if state.scaler is None else state.scaler.scale(scaled)).backward()
    return loss.detach()


def finite_or_nan(loss: Tensor) -> Tensor:
    """The loss, to the bit; but one that is not finite gives gradients that are all NaN.

    An infinite loss may have finite gradients (that of a mean of squares has), and only a gradient reaches the other
    ranks.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def train_step(
    state: TrainState, batches: Iterator[Samples], now: StepPlan, task: Task, accumulation: int, clip: float | None
) -> StepResult:
    """One step of the plan on `accumulation` micro-batches of this rank.

    A gradient that is not finite on any rank is not finite on all once gradients are averaged, and a loss that is not
    makes its gradients so: all ranks leave the step out together. The fused optimizer is told so on the device and
    keeps weights and moments as they are.
    """
    statistics = [buffer.clone() for buffer in state.statistics]
    losses = []
    for micro in range(accumulation):
        # Gradients are averaged over ranks once a step, with the last micro-batch.
        with gradients_shared(state.network, share=micro == accumulation - 1):
            losses.append(micro_step(state, next(batches), now, task, 1 / accumulation))

    set_learning_rate(state.optimizer, now.learning_rate)
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        clip_grads_with_norm_(parameters, clip, norm)
    norm = whole(norm)
    bad = apply_update(state, norm)
    for buffer, before in zip(state.statistics, statistics):
        buffer.copy_(torch.where(bad.bool(), before, buffer))
    state.update_average()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepResult(torch.stack(losses).mean(), norm)


def apply_update(state: TrainState, norm: Tensor) -> Tensor:
    """Update the weights, unless the gradient's norm is not finite; returns 1.0 on the device where it is not."""
    bad = (~torch.isfinite(norm)).float()
    if state.scaler is not None:
        # fp16 overflow is the scaler's business: it skips, lowers its scale and goes on.
        state.scaler.step(state.optimizer)
        state.scaler.update()
    elif not state.optimizer.defaults.get("fused"):
        # LAMB, LARS and SGD know no such thing: the host looks, and waits for the device once a step.
        if not bad.item():
            state.optimizer.step()
    else:
        # The attribute by which torch's own GradScaler tells fused optimizers to leave a step out.
        state.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        state.optimizer.step()
    state.skipped += bad
    state.skipped_in_a_row = (state.skipped_in_a_row + bad) * bad
    state.longest_skipped = torch.maximum(state.longest_skipped, state.skipped_in_a_row)
    return bad
