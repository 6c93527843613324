"""One optimizer step. Nothing in here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mae_et.curriculum.plan import StepPlan
from mae_et.data.loader import Batch
from mae_et.engine.optim import set_learning_rate
from mae_et.engine.state import TrainState
from mae_et.models.masking import mask_noise

Prepare = Callable[[Tensor, tuple[int, int]], Tensor]
"""(images uint8 [N, C, H, W], B) to the images that the model sees; where the exact low-frequency crop happens."""


class StepResult(NamedTuple):
    """Scalars on the device: mean loss over this rank's images, and the gradient's norm before clipping."""

    loss: Tensor
    gradient_norm: Tensor


def micro_step(state: TrainState, batch: Batch, now: StepPlan, prepare: Prepare, share: float) -> Tensor:
    """Forward and backward of one micro-batch; returns its loss, detached."""
    batch = batch.to(state.device)
    images = prepare(batch.images, now.bandwidth)
    noise = mask_noise(batch.seeds, now.stage.visible + now.stage.masked)
    with state.precision.autocast():
        loss = state.network(images, noise, now.stage.visible).loss
    scaled = loss * share if state.scaler is None else state.scaler.scale(loss * share)
    scaled.backward()
    return loss.detach()


def train_step(
    state: TrainState, batches: Iterator[Batch], now: StepPlan, prepare: Prepare, accumulation: int, clip: float | None
) -> StepResult:
    """One step of the plan on `accumulation` micro-batches of this rank.

    A gradient that is not finite on any rank is not finite on all once gradients are averaged, so all ranks leave
    the step out together. The fused optimizer is told so on the device and keeps weights and moments as they are.
    """
    losses = []
    for micro in range(accumulation):
        last = micro == accumulation - 1
        # Gradients are averaged over ranks once a step, with the last micro-batch.
        silent = isinstance(state.network, DistributedDataParallel) and not last
        with state.network.no_sync() if silent else nullcontext():  # pyright: ignore[reportCallIssue]
            losses.append(micro_step(state, next(batches), now, prepare, 1 / accumulation))

    set_learning_rate(state.optimizer, now.learning_rate)
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        clip_grads_with_norm_(parameters, clip, norm)
    apply_update(state, norm)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepResult(torch.stack(losses).mean(), norm)


def apply_update(state: TrainState, norm: Tensor) -> None:
    """Update the weights, unless the gradient's norm is not finite."""
    bad = (~torch.isfinite(norm)).float()
    if state.scaler is not None:
        # fp16 overflow is the scaler's business: it skips, lowers its scale and goes on.
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # The attribute by which torch's own GradScaler tells fused optimizers to leave a step out.
        state.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        state.optimizer.step()
    state.skipped += bad
    state.skipped_in_a_row = (state.skipped_in_a_row + bad) * bad
