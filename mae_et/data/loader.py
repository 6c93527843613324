"""Requests to batches: workers without state, built once for a whole run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source


class Batch(NamedTuple):
    """What a worker hands over.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], -1 where there is none.
        seeds: int64 [N], the samples' seeds; masks are drawn from them on the device.
        indices: int64 [N], image indices in the source.
    """

    images: Tensor
    labels: Tensor
    seeds: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copies do not wait for each other or for the host."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class RequestDataset(Dataset[Batch]):
    """Turns lists of requests into batches.

    Args:
        source: images and labels by index.
        transform: (uint8 [C, H, W], request) to uint8 [C, h, w] of the requested size, or of the final size where
            the low-frequency crop is left to the device.
    """

    def __init__(self, source: Source, transform: Callable[[Tensor, SampleRequest], Tensor]):
        self.source, self.transform = source, transform

    def __getitems__(self, requests: list[SampleRequest]) -> Batch:
        images = [self.transform(self.source.image(request.image), request) for request in requests]
        return Batch(
            images=torch.stack(images),
            labels=torch.tensor([self.source.label(request.image) for request in requests]),
            seeds=torch.tensor([request.seed for request in requests]),
            indices=torch.tensor([request.image for request in requests]),
        )


def whole(batch: Any) -> Batch:
    """Collate function: `__getitems__` returns a finished batch."""
    return batch


GRACE_SECONDS = 30


def outlive_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which often reach all processes of a job, to the training process.

    A worker that died of them at once would take the run down before it has saved. After SIGTERM it serves on for
    `GRACE_SECONDS`, so that nothing waits for it for ever.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(GRACE_SECONDS))


def build_loader(
    dataset: RequestDataset, sampler: Sampler[list[SampleRequest]], workers: int, pin_memory: bool
) -> DataLoader[Batch]:
    """A loader for the whole run: its workers live through all stages."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=whole,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


@contextmanager
def batches_of(loader: DataLoader[Batch], times: Iterable[object] = (None,)) -> Iterator[Iterator[Batch]]:
    """What a loader makes of its sampler; its workers end with the block, also when an error leaves it.

    Otherwise they would live for as long as something refers to the error's traceback.

    Args:
        loader: its sampler is asked at once, and some batches ahead of what is consumed.
        times: how often it is asked; the next time when all that it asked for before was consumed and one more
            batch is wanted.
    """
    iterator: Iterator[Batch] | None = None

    def batches() -> Iterator[Batch]:
        nonlocal iterator
        for _ in times:
            iterator = iter(loader)  # torch's own, which persistent workers make the same one every time
            yield from iterator

    try:
        yield batches()
    finally:
        shut_down = getattr(iterator, "_shutdown_workers", None)  # what torch itself calls when an iterator dies
        if shut_down is not None:
            shut_down()
