"""Sample selection within a run: per-sample losses on the device become the scores that the next pass is chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mae_et.config import ConfigError, SelectionConfig
from mae_et.curriculum.plan import Plan, StepPlan
from mae_et.data.loader import Batch
from mae_et.data.selection import InfoBatch, Pass, Passes, PassSampler
from mae_et.engine.distributed import gather_rows
from mae_et.engine.tasks import Task


class SampleTask(Task, Protocol):
    """A task that also knows the loss of each sample."""

    def losses(self, network: nn.Module, inputs: Any, now: StepPlan) -> Tensor:
        """Loss of each input, float32 [N]; their mean is `loss` up to the order of the sum."""
        ...


class Selection:
    """The scores of all samples, and the passes that they decide about; equal on all ranks once gathered.

    Args:
        passes: of the run.

    Attributes:
        scores: float32 [images] on the host, each sample's latest loss as it was trained on, before its weight; NaN
            where there is none yet, or none that is finite.
    """

    def __init__(self, passes: Passes):
        self.passes = passes
        self.scores = torch.full((passes.plan.images,), torch.nan)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def weights(self, indices: Tensor) -> Tensor:
        """Weights in the running pass of samples by index, float32 [N] on the host."""
        return torch.from_numpy(self.passes.running.weights)[indices]

    def record(self, indices: Tensor, losses: Tensor) -> None:
        """Note this rank's losses, [N] on any device, of samples by index; nothing is read from the device."""
        # A copy, because a worker's tensor holds on to a piece of shared memory.
        self._pending.append((indices.clone(), losses.detach()))

    def gather(self) -> None:
        """Enter the losses of all ranks into the scores. All ranks call it together; waits for the device."""
        if not self._pending:
            return
        indices = gather_rows(torch.cat([indices for indices, _ in self._pending]).cpu())
        losses = gather_rows(torch.cat([losses for _, losses in self._pending]).float().cpu())
        # A pass shows no sample twice, and begins with nothing pending: the order does not matter.
        self.scores[indices] = torch.where(losses.isfinite(), losses, torch.nan)
        self._pending.clear()

    def passes_from(self, step: int, sampler: PassSampler) -> Iterator[None]:
        """From a step to the end of the plan, set the sampler to one pass after the other.

        A pass begins when the iterator is asked for it, which is to be after the last step of the one before.
        """
        while step < self.passes.plan.total_steps:
            if step == self.passes.end:
                self.gather()
                self.passes.begin(self.scores.numpy())
            sampler.first_step = step
            yield
            step = self.passes.end

    def metrics(self, step: int) -> dict[str, float]:
        """Share of the images that the running pass leaves out, and passes made after `step` steps."""
        return {"selection/pruned": self.passes.running.pruned, "selection/passes": self.passes.made(step)}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores, once all is gathered."""
        return {"scores": self.scores, "weights": torch.from_numpy(self.passes.running.weights)}

    def values(self) -> dict[str, int]:
        """Likewise, as JSON values."""
        return {"pass": self.passes.running.number, "first_step": self.passes.running.first_step}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, int]) -> None:
        """Go on from what a checkpoint stored."""
        self.scores = tensors["scores"].clone()
        self._pending.clear()
        self.passes.enter(Pass(values["pass"], values["first_step"], tensors["weights"].numpy()))


class SelectedInputs(NamedTuple):
    """A task's own inputs, and which samples they are.

    Attributes:
        inputs: of the task.
        indices: int64 [N], image indices.
        weights: float32 [N] on the device.
    """

    inputs: Any
    indices: Tensor
    weights: Tensor


def choose_selection(
    settings: SelectionConfig, plan: Plan, seed: int, drop_last: bool = True, repeats: int = 1
) -> Selection | None:
    """The configured selection of samples; None selects nothing.

    Args:
        settings: of the configuration.
        plan, seed: of the run.
        drop_last: whether the plan counts whole batches of a pass alone.
        repeats: views of an image in a batch.

    Raises:
        ConfigError: what selection cannot be composed with.
    """
    if settings.method == "none":
        return None
    if not drop_last:
        raise ConfigError(
            f"selection.method={settings.method} shows the whole batches of a pass alone, and curriculum.drop_last="
            "false wants the rest too; set curriculum.drop_last=true"
        )
    if repeats > 1:
        raise ConfigError(
            f"selection.method={settings.method} scores a sample by its one view in a pass, and data.repeats={repeats} "
            "shows several; set data.repeats=1, or selection.method=none"
        )
    try:
        return Selection(Passes(plan, InfoBatch(settings.ratio, settings.anneal), seed))
    except ValueError as error:
        raise ConfigError(f"selection.method={settings.method}: {error}") from None


def selected(task: SampleTask, selection: Selection | None) -> Task:
    """The task on selected samples; the task itself where there is no selection."""
    return task if selection is None else SelectedTask(task, selection)


@dataclass(frozen=True)
class SelectedTask:
    """A task on selected samples: their losses are recorded, weighted, and averaged.

    Where a task mixes images, a sample's loss is that of the mixed image that has most of its place in the batch: it
    is scored as it is trained, as in the published runs.
    """

    task: SampleTask
    selection: Selection

    def prepare(self, batch: Batch, now: StepPlan, device: torch.device) -> SelectedInputs:
        """The task's inputs, and the weights of the samples in the running pass."""
        weights = self.selection.weights(batch.indices).to(device, non_blocking=True)
        return SelectedInputs(self.task.prepare(batch, now, device), batch.indices, weights)

    def loss(self, network: nn.Module, inputs: SelectedInputs, now: StepPlan) -> Tensor:
        """Mean of the weighted losses."""
        losses = self.task.losses(network, inputs.inputs, now)
        self.selection.record(inputs.indices, losses)
        return (inputs.weights * losses).mean()
