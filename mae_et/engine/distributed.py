"""Ranks and devices: one process alone, or many started by torchrun."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mae_et.engine.signals import follow_launcher
from mae_et.tracking.tracker import warn

T = TypeVar("T")


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


def join_ranks(device_name: str, timeout_minutes: float = 30.0) -> Ranks:
    """Join the process group if torchrun or SLURM started this process; otherwise be the only rank.

    Gradients travel by NCCL on GPUs and by gloo on CPUs; flags for the host always travel by gloo, so that agreeing
    to stop never waits for the GPU.

    Args:
        device_name: of the configuration.
        timeout_minutes: after which ranks that wait for one that is dead, stuck or cut off give up.
    """
    follow_launcher()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return Ranks(0, 1, device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _warn_of_stale_addresses()
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _warn_of_stale_addresses() -> None:
    """Say what torchrun's restarts need: with torch 2.14 the ranks of a second attempt read the addresses of the first.

    The launcher keeps one store for all attempts unless it is told not to (2 of 2 restarts failed with it, 3 of 3 came
    back without).
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("RANK") == "0" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        warn(
            "torchrun was started with --max-restarts and without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: with some releases of torch its restarts fail; see docs/launching.md"
        )


def leave_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def largest(values: Sequence[int]) -> list[int]:
    """The largest value of any rank, one by one; every rank gets the same answer."""
    if not dist.is_initialized():
        return list(values)
    votes = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.tolist()


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Per flag, whether it is set on any rank; every rank gets the same answer."""
    return [bool(vote) for vote in largest([int(flag) for flag in flags])]


def on_main(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do something on the main rank alone; every rank gets its result, or raises its error, and none waits in vain.

    Args:
        ranks: all call it together.
        work: returns plain values.

    Raises:
        Exception: of `work`'s kind and message; on other ranks it is marked as told already, see `told_by_main`.
    """
    if ranks.count == 1:
        return work()
    box: list[Any] = [None, None, None]
    failure: Exception | None = None
    if ranks.is_main:
        try:
            box[0] = work()
        except Exception as error:
            failure, box[1:] = error, [type(error), str(error)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise _echo(box[1], box[2])
    return box[0]


def _echo(kind: type[Exception], message: str) -> Exception:
    """The main rank's error, for others to raise."""
    try:
        echo = kind(message)
    except TypeError:  # one that is made of more than a message
        echo = RuntimeError(message)
    return as_told_by_main(echo)


def as_told_by_main(error: Exception) -> Exception:
    """Mark an error that the main rank raises as well, and reports."""
    error.told_by_main = True  # pyright: ignore[reportAttributeAccessIssue]
    return error


def lost_peer(error: BaseException) -> bool:
    """Whether an error is what gloo or NCCL say when another rank is gone."""
    told = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def told_by_main(error: BaseException) -> bool:
    """Whether the main rank reports the same error."""
    return getattr(error, "told_by_main", False)


def gather_objects(value: T) -> list[T]:
    """The plain values of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def share_of(values: Sequence[float] | float) -> float:
    """This rank's of the values that each rank had, or their mean where there were more ranks or fewer."""
    if not isinstance(values, Sequence):
        return values  # of checkpoints that kept one
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return values[rank] if len(values) == count else sum(values) / len(values)


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model as every rank calls it: gradients averaged over ranks where there are several."""
    if ranks.count == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Buffers are constants (positions, pixel statistics), so broadcasting them every step would be waste; but for those
    # of BatchNorm, whose statistics are then the main rank's everywhere.
    known = inspect.signature(DistributedDataParallel).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its former name
    options: dict[str, Any] = {broadcast: bool(running_statistics(model))}
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **options)


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """The buffers of a model's running statistics, which each rank counts on its own images; [] of most models.

    Those of layers whose weights are frozen stay as they are (`models.trunk`), and are left out.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    layers = [layer for layer in layers if layer.weight is None or layer.weight.requires_grad]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the main rank's running statistics, which its checkpoint holds as well."""
    if ranks.count > 1 and running_statistics(model):
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
