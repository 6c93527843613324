"""How a model is spread over ranks: copies of it (DDP), or shares of its weights, gradients and moments (FSDP2).

A checkpoint is the same files either way, whole tensors that the main rank writes, so that a run saved under one layout
continues under any other. Ranks other than the main one get a checkpoint's tensors from it: hosts need not share the
run's folder.

FSDP here is torch's `fully_shard`, around every block and around the rest. Parameters stay fp32 and autocast decides
what is computed in bf16, as without it, so that the two layouts differ by the order of fp32 sums alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mae_et.engine.checkpoint import Checkpoint
from mae_et.engine.distributed import Ranks, on_main, replicate

Layout = Literal["ddp", "fsdp"]


def parallelise(model: nn.Module, ranks: Ranks, layout: str) -> nn.Module:
    """The model as every rank calls it, on its device. Comes before the optimizer, as sharding replaces the parameters.

    Args:
        model: on the host, the same on all ranks; sharded in place, so that no device holds all of it at once.
        ranks: of the run; one rank alone has the whole model in either layout.
        layout: "ddp" or "fsdp".
    """
    if layout == "ddp" or ranks.count == 1:
        return replicate(model.to(ranks.device), ranks)
    shard(model, ranks)
    return model


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Shard a model's parameters over all ranks, in place: block by block where it has `blocks`, then the rest."""
    # It warns of outputs that are views, lest somebody writes into them; nobody does, and linear layers return views.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks" and isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_copy(model: nn.Module, ranks: Ranks, layout: str) -> nn.Module | None:
    """A copy for scores and pictures of a model that is about to be sharded; None where the model itself will do.

    Ranks look at the model one without the others, or with unequal shares of images, which a sharded one cannot do. It
    stays on the host but for the time of a look, see `TrainState.refresh`.
    """
    if layout == "ddp" or ranks.count == 1:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def gradients_shared(network: nn.Module, share: bool) -> AbstractContextManager[None]:
    """Forward and backward within it average gradients over ranks, or keep them for the next micro-batch's.

    Sharded ones are always averaged, since keeping them would take the room of the whole model's.
    """
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not share else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a tensor that every rank has whole, laid out like another one."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


Groups = dict[str, dict[str, Tensor]]


def gathered(groups: Mapping[str, Mapping[str, Tensor]], ranks: Ranks) -> Groups:
    """Whole tensors of a checkpoint, on the main rank alone; all ranks call it together.

    Sharded ones arrive one by one and wait on the host, so that no GPU needs room for more than one.
    """
    found: Groups = {name: {} for name in groups}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            full = whole(tensor)
            if ranks.is_main:
                found[group][name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def share_checkpoint(read: Callable[[], Checkpoint | None], ranks: Ranks) -> Checkpoint | None:
    """A checkpoint that the main rank reads, on every rank, or the error that reading it raised.

    Args:
        read: of the main rank alone.
        ranks: all call it together.
    """
    if ranks.count == 1:
        return read()
    read_here: list[Checkpoint] = []

    def outline() -> Checkpoint | None:
        checkpoint = read()
        if checkpoint is None:
            return None
        read_here.append(checkpoint)
        shapes = {
            group: {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
            for group, tensors in checkpoint.tensors.items()
        }
        return Checkpoint(checkpoint.path, checkpoint.step, shapes, checkpoint.state)

    outlined = on_main(ranks, outline)
    if outlined is None:
        return None
    shared = read_here[0] if ranks.is_main else outlined
    for group, tensors in outlined.tensors.items():
        for name, shape in tensors.items():
            tensor = shared.tensors[group][name] if ranks.is_main else torch.empty(shape.shape, dtype=shape.dtype)
            if tensor.numel():
                # As bytes, because gloo does not know every dtype.
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
            shared.tensors[group][name] = tensor
    return shared
