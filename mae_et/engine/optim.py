"""Optimizers, and which of their groups a parameter belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._manipulate import group_parameters
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import auto_group_layers
from timm.optim.lamb import Lamb
from timm.optim.lars import Lars
from torch import nn

from mae_et.engine.parallel import placed

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its constants; its learning rate is set before every step.

    Attributes:
        name: "adamw", "lamb", "lars" or "sgd".
        weight_decay: of the groups that decay.
        betas: of adamw and lamb.
        momentum: of lars and sgd.
    """

    name: str = "adamw"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Parameters with and without weight decay.

    As in MAE's pretraining: biases and other one-dimensional parameters are spared; class and mask tokens are not.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    spared = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def supervised_groups(
    net: nn.Module, weight_decay: float, layer_decay: float | None, model: nn.Module | None = None
) -> Groups:
    """Groups of one of timm's networks: one learning rate a layer, and what is exempt from weight decay.

    A group's learning rate is `lr_scale` of the schedule's: d^(layers - layer) for layer decay d, with `layer_ids`.
    Vectors do not decay, nor does what the network itself exempts: position embeddings and class tokens.

    Args:
        net: of timm.
        weight_decay: of what is not exempt.
        layer_decay: d; None is one rate for all.
        model: that holds the network among other parts, which come after its last layer.
    """
    exempt = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()  # pyright: ignore[reportCallIssue]
    layers = {} if layer_decay is None else layer_ids(net)
    last = max(layers.values(), default=0) + (model is not None and not isinstance(net, VisionTransformer))
    inside = {id(parameter): name for name, parameter in net.named_parameters()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in (net if model is None else model).parameters():
        if not parameter.requires_grad:
            continue
        name = inside.get(id(parameter))
        spared = parameter.ndim <= 1 or name in exempt
        layer = last if layer_decay is None or name is None else layers[name]
        group = {"params": [], "weight_decay": 0.0 if spared else weight_decay}
        if layer_decay is not None:
            group["lr_scale"] = layer_decay ** (last - layer)
        groups.setdefault((layer, spared), group)["params"].append(parameter)
    return list(groups.values())


def layer_ids(net: nn.Module) -> dict[str, int]:
    """The layer of each parameter, from 0.

    Of a ViT of n blocks as in MAE's fine-tuning, after BEiT: 0 for embeddings and class token, i + 1 for block i from
    0, n + 1 for what follows the blocks. Of other networks as timm groups them, with the head in the last layer.
    """
    names = [name for name, _ in net.named_parameters()]
    if isinstance(net, VisionTransformer):
        after = len(net.blocks) + 1
        stem = ("cls_token", "pos_embed", "reg_token", "patch_embed.", "norm_pre.")
        inside = {name: 0 if name.startswith(stem) else after for name in names}
        return {name: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else inside[name] for name in names}
    matcher: Any = getattr(net, "group_matcher", None)  # CAFormer, for one, has none
    known: Any = (
        auto_group_layers(net) if matcher is None else group_parameters(net, matcher(coarse=False), reverse=True)
    )
    last = max(known.values())
    return {name: known.get(name, last) for name in names}


def build_optimizer(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of parameter groups.

    LARS is MAE's (arXiv 2111.06377, table 10): rates of matrices adapt by 0.001 * |w| / |gradient|, those of
    one-dimensional parameters not at all, and the learning rate acts outside of the momentum. LAMB clips gradients to
    norm 1 over all parameters, as timm's does unless told otherwise.

    Raises:
        ValueError: unknown name.
    """
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum)
    if settings.name == "lamb":
        return Lamb(groups, lr=0.0, betas=settings.betas)
    if settings.name == "lars":
        return Lars(split_by_dimension(groups), lr=0.0, momentum=settings.momentum, trust_coeff=0.001)  # pyright: ignore[reportArgumentType]
    raise ValueError(f"unknown optimizer {settings.name!r}; known: adamw, lamb, lars, sgd")


def split_by_dimension(groups: Groups) -> Groups:
    """Each group's matrices, which LARS adapts, apart from its vectors, which it neither adapts nor decays."""
    matrices: Groups = [{**group, "always_adapt": True} for group in groups]
    vectors: Groups = [{**group, "always_adapt": False, "weight_decay": 0.0} for group in groups]
    for group in matrices:
        group["params"] = [p for p in group["params"] if p.ndim > 1]
    for group in vectors:
        group["params"] = [p for p in group["params"] if p.ndim <= 1]
    return [group for group in (*matrices, *vectors) if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of the next step, for all groups, each at its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `<parameter>.<exp_avg | exp_avg_sq | momentum_buffer | step>`."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    for index, group in enumerate(optimizer.param_groups):
        if "step" in group:  # timm's LAMB counts per group, on the host
            tensors[f"{index}.{GROUP_STEP}"] = torch.as_tensor(group["step"]).clone()
    return tensors


GROUP_STEP = "group_step"


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        ValueError: the tensors name a parameter that the model has not.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition(".")
        if key == GROUP_STEP:
            optimizer.param_groups[int(parameter_name)]["step"] = tensor.clone()
            continue
        if parameter_name not in parameters:
            raise ValueError(f"the optimizer state holds {parameter_name!r}, which the model has not")
        parameter = parameters[parameter_name]
        if tensor.shape == parameter.shape:
            tensor = placed(tensor, parameter)
        optimizer.state[parameter][key] = tensor.to(parameter.device, copy=True)


def adam_settings(weight_decay: float, betas: Sequence[float]) -> OptimizerSettings:
    """AdamW with these constants."""
    return OptimizerSettings("adamw", weight_decay, (betas[0], betas[1]))
