"""Everything that a run changes as it goes, and its trip through a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from mae_et.engine.checkpoint import Checkpoint
from mae_et.engine.optim import optimizer_tensors, restore_optimizer
from mae_et.engine.precision import Precision
from mae_et.engine.selection import Selection


@dataclass
class TrainState:
    """A model in training.

    Attributes:
        model: the bare model; what is saved.
        network: the model as it is called, maybe wrapped for several ranks.
        optimizer: of the model's parameters.
        precision: autocast type.
        device: where the model lives.
        scaler: for fp16, else None.
        average: running average of the model's weights and buffers, else None.
        selection: of samples by their losses, else None.
        step: steps done; the next step is this one.
        seconds: spent in training so far, over all starts of the run.
        skipped, skipped_in_a_row: steps whose gradients were not finite; float32 scalars on the device, so that
            counting them does not wait for it.
        loss_sum, loss_steps: of the steps since the last row of metrics; the sum a float32 scalar on the device.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    device: torch.device
    scaler: torch.amp.GradScaler | None = None
    average: ModelEmaV3 | None = None
    selection: Selection | None = None
    step: int = 0
    seconds: float = 0.0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    skipped_in_a_row: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_steps: int = 0

    def __post_init__(self) -> None:
        self.skipped = self.skipped.to(self.device)
        self.skipped_in_a_row = self.skipped_in_a_row.to(self.device)
        self.loss_sum = self.loss_sum.to(self.device)

    @property
    def evaluated(self) -> nn.Module:
        """What scores are of: the average where there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def update_average(self) -> None:
        """Move the average towards the model's weights, if there is one."""
        if self.average is not None:
            self.average.update(self.model)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensor groups of a checkpoint: model, optimizer, and average and selection where there are."""
        groups = {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}
        if self.average is not None:
            groups["average"] = self.average.module.state_dict()
        if self.selection is not None:
            groups["selection"] = self.selection.tensors()
        return groups

    def values(self) -> dict[str, Any]:
        """JSON values of a checkpoint."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped.item(),
            "skipped_in_a_row": self.skipped_in_a_row.item(),
            "loss_sum": self.loss_sum.item(),
            "loss_steps": self.loss_steps,
            "selection": self.selection.values() if self.selection else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "precision": self.precision.name,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same model."""
        self.model.load_state_dict(checkpoint.tensors["model"])
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.tensors["average"])
        restore_optimizer(self.model, self.optimizer, checkpoint.tensors["optimizer"])
        values = checkpoint.state
        self.step, self.seconds = values["step"], values["seconds"]
        self.skipped.fill_(values["skipped"])
        self.skipped_in_a_row.fill_(values["skipped_in_a_row"])
        self.loss_sum.fill_(values["loss_sum"])
        self.loss_steps = values["loss_steps"]
        if self.selection is not None:
            self.selection.restore(checkpoint.tensors["selection"], values["selection"])
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
