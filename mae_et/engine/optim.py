"""AdamW with MAE's rule for weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters with and without weight decay.

    As in MAE's code: biases and other one-dimensional parameters are spared; class and mask tokens are not.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, weight_decay: float, betas: Sequence[float]) -> torch.optim.AdamW:
    """Fused AdamW; its learning rate is set before every step."""
    groups = decay_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(betas[0], betas[1]), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of the next step, for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<parameter>.<exp_avg | exp_avg_sq | step>`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        ValueError: the tensors name a parameter that the model has not.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        if parameter_name not in parameters:
            raise ValueError(f"the optimizer state holds {parameter_name!r}, which the model has not")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)
