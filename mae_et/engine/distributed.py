"""Ranks and devices: one process alone, or many started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run.

    Attributes:
        rank, count: position and number of processes.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """Resolve "auto": the GPU of this rank, else Apple's, else the CPU.

    Raises:
        ValueError: the device that was asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"engine.device={name}: torch sees no such device here; use engine.device=auto")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def join_ranks(device_name: str) -> Ranks:
    """Join the process group if torchrun started this process; otherwise be the only rank.

    Gradients travel by NCCL on GPUs and by gloo on CPUs; flags for the host always travel by gloo, so that agreeing
    to stop never waits for the GPU.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Per flag, whether it is set on any rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def from_main(value: str | None) -> str | None:
    """The main rank's value, on every rank; all ranks wait for it."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def slowest(value: float) -> float:
    """The largest value of all ranks, on every rank; such as seconds, where all wait for the slowest."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a small tensor over all ranks."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks one after another, [ranks * N, ...] from [N, ...] of each; on the host."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model as every rank calls it: gradients averaged over ranks where there are several."""
    if ranks.count == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Buffers are constants (positions, pixel statistics), so broadcasting them every step would be waste; but for those
    # of BatchNorm, whose statistics are then the main rank's everywhere.
    return DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=has_statistics(model), gradient_as_bucket_view=True
    )


def has_statistics(model: nn.Module) -> bool:
    """Whether a model has running statistics, which each rank counts on its own images."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the main rank's running statistics, which its checkpoint holds as well."""
    if ranks.count > 1 and has_statistics(model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
