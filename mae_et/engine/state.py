"""Everything that a run changes as it goes, and its trip through a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mae_et.engine.bad_images import BadImages
from mae_et.engine.checkpoint import Checkpoint
from mae_et.engine.distributed import gather_rows, running_statistics, share_of
from mae_et.engine.optim import optimizer_tensors, restore_optimizer
from mae_et.engine.parallel import placed, whole
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
        longest_skipped: of them in a row since the last row of metrics; likewise.
        loss_sum, loss_steps: of the steps with a finite loss since the last row of metrics; float32 scalars on the
            device.
        bad_images: the ledger of images that could not be read; None until the run has its folder.
        twin: a copy of what is evaluated of a model that is sharded, where this rank looks at it; else None.
        statistics: buffers that the model's forward pass changes; not given.
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
    longest_skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    loss_steps: Tensor = field(default_factory=lambda: torch.zeros(()))
    bad_images: BadImages | None = None
    twin: nn.Module | None = None

    def __post_init__(self) -> None:
        self.skipped = self.skipped.to(self.device)
        self.skipped_in_a_row = self.skipped_in_a_row.to(self.device)
        self.longest_skipped = self.longest_skipped.to(self.device)
        self.statistics = running_statistics(self.model)
        self.loss_sum = self.loss_sum.to(self.device)
        self.loss_steps = self.loss_steps.to(self.device)

    @property
    def evaluated(self) -> nn.Module:
        """What scores and pictures are of: the average where there is one, else the model; `refresh` comes first."""
        if self.twin is not None:
            return self.twin
        return self.model if self.average is None else self.average.module

    def refresh(self) -> None:
        """Bring the copy of a sharded model up to date, on the device; all ranks call it together, with one or without.

        `dismiss` ends its use.
        """
        if not isinstance(self.model, FSDPModule):
            return
        current = self.model if self.average is None else self.average.module
        copies = {} if self.twin is None else self.twin.to(self.device).state_dict()
        with torch.no_grad():
            for name, tensor in current.state_dict().items():
                full = whole(tensor)
                if name in copies:
                    copies[name].copy_(full)

    def dismiss(self) -> None:
        """Give the device its memory back that the copy of a sharded model has taken."""
        if self.twin is not None:
            self.twin.to("cpu")

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
        """JSON values of a checkpoint; all ranks call it together."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped.item(),
            "skipped_in_a_row": self.skipped_in_a_row.item(),
            # One a rank, so that a run on as many ranks goes on with the same bits.
            "loss_sum": gather_rows(self.loss_sum.cpu()[None]).tolist(),
            "loss_steps": gather_rows(self.loss_steps.cpu()[None]).tolist(),
            "bad_images": self.bad_images.values() if self.bad_images else None,
            "selection": self.selection.values() if self.selection else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "precision": self.precision.name,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same model, maybe of another number of ranks; all call it together."""
        load_whole(self.model, checkpoint.tensors["model"])
        if self.average is not None:
            load_whole(self.average.module, checkpoint.tensors["average"])
        restore_optimizer(self.model, self.optimizer, checkpoint.tensors["optimizer"])
        values = checkpoint.state
        self.step, self.seconds = values["step"], non_negative(values, "seconds")
        if self.bad_images is not None and values.get("bad_images"):
            self.bad_images.restore(values["bad_images"], self.step)
        self.skipped.fill_(non_negative(values, "skipped"))
        self.skipped_in_a_row.fill_(non_negative(values, "skipped_in_a_row"))
        self.longest_skipped.zero_()
        self.loss_sum.fill_(share_of(values["loss_sum"]))
        self.loss_steps.fill_(share_of(values["loss_steps"]))
        if self.selection is not None:
            self.selection.restore(checkpoint.tensors["selection"], values["selection"])
        if self.scaler is not None and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])


def non_negative(values: Mapping[str, Any], name: str) -> float:
    """A number of a checkpoint's values.

    Raises:
        ValueError: it is none, or below 0.
    """
    value = values[name]
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}")
    return value


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a model that may be sharded.

    Raises:
        RuntimeError: as `load_state_dict`.
    """
    own = model.state_dict()
    fitting = {name for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    model.load_state_dict({n: placed(t, own[n]) if n in fitting else t for n, t in tensors.items()})
