"""Requests to batches: workers without state, built once for a whole run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_et.data.parents import when_parent_dies
from mae_et.data.replacing import BadImage, Readable, Reader
from mae_et.data.requests import SampleRequest, SampleRequests
from mae_et.data.sources import Source


class DataError(RuntimeError):
    """The data path failed, not an image: a worker died, was killed, or says nothing any more."""


class Samples(Protocol):
    """What the engine knows of a batch, whatever its task.

    Attributes:
        seeds, indices, bad: as of `Batch`, on the host.
    """

    @property
    def seeds(self) -> Tensor: ...

    @property
    def indices(self) -> Tensor: ...

    @property
    def bad(self) -> tuple[BadImage, ...]: ...


class SampleDataset(Protocol):
    """Turns lists of requests into batches, as torch's loader asks a dataset to.

    Attributes:
        source: what is read.
    """

    @property
    def source(self) -> Readable: ...

    def __getitems__(self, requests: Any) -> Any: ...  # a sequence of SampleRequest


class Batch(NamedTuple):
    """What a worker hands over.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], -1 where there is none.
        seeds: int64 [N], the samples' seeds; masks are drawn from them on the device.
        indices: int64 [N], indices in the source of the images that were asked for.
        bad: images that could not be read, once per attempt: those that were asked for, in whose place others are
            shown, and those that were tried in their place.
    """

    images: Tensor
    labels: Tensor
    seeds: Tensor
    indices: Tensor
    bad: tuple[BadImage, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the device gets."""
        return self.images, self.labels, self.seeds, self.indices

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the copies do not wait for each other or for the host."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self.tensors), bad=self.bad)

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        """What goes from a worker to the training process: the bytes of small tensors, through the pipe.

        Torch hands a tensor over as an open file in shared memory: 0.2 ms of both processes for each.
        """
        return _rebuilt, ([t.numpy() if t.nbytes <= INLINE_BYTES else t for t in self.tensors], self.bad)


INLINE_BYTES = 1 << 20  # above about 1.5 MiB shared memory is the faster way


def _rebuilt(tensors: list[Tensor | np.ndarray], bad: tuple[BadImage, ...]) -> Batch:
    return Batch(*(t if isinstance(t, Tensor) else torch.from_numpy(t) for t in tensors), bad=bad)


@runtime_checkable
class InMemory(Protocol):
    """A source whose images have one size and cannot fail, so that many are taken at once."""

    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Tensor: ...


@runtime_checkable
class ManyAtOnce(Protocol):
    """A transform that has a faster way for images of one size, with the same result."""

    def many(self, images: Tensor, requests: SampleRequests) -> Tensor: ...


class RequestDataset(Dataset[Batch]):
    """Turns lists of requests into batches.

    Args:
        source: images and labels by index.
        transform: (uint8 [C, H, W], request) to uint8 [C, h, w] of the requested size, or of the final size where
            the low-frequency crop is left to the device.
        replace: show another image, with its own label, in place of one that cannot be read. Which one follows from
            the request's seed, so that workers, ranks and interruptions change nothing. Otherwise ImageError is raised.
    """

    def __init__(self, source: Source, transform: Callable[[Tensor, SampleRequest], Tensor], replace: bool = False):
        self.source, self.transform, self.reader = source, transform, Reader(source, replace)
        self._at_once: Callable[[SampleRequests], Batch] | None = None
        if isinstance(source, InMemory) and isinstance(transform, ManyAtOnce):
            self._at_once = partial(_all_at_once, source, transform)

    def __getitems__(self, requests: Sequence[SampleRequest]) -> Batch:
        if self._at_once is not None:
            return self._at_once(SampleRequests.of(requests))
        bad: list[BadImage] = []
        images, labels = [], []
        for request in requests:
            view, shown = self.reader.read(request, partial(self.view, request), bad)
            images.append(view)
            labels.append(self.source.label(shown))
        return Batch(
            images=torch.stack(images),
            labels=torch.tensor(labels),
            seeds=torch.tensor([request.seed for request in requests]),
            indices=torch.tensor([request.image for request in requests]),
            bad=tuple(bad),
        )

    def view(self, request: SampleRequest, i: int) -> Tensor:
        """Return the request's view of image `i`."""
        return self.transform(self.source.image(i), request)


def _all_at_once(source: InMemory, transform: ManyAtOnce, requests: SampleRequests) -> Batch:
    return Batch(
        images=transform.many(source.take(requests.images), requests),
        labels=torch.from_numpy(source.labels[requests.images].astype(np.int64)),
        seeds=torch.from_numpy(requests.seeds),
        indices=torch.from_numpy(requests.images),
    )


def whole(batch: Any) -> Any:
    """Collate function: `__getitems__` returns a finished batch."""
    return batch


DEATH_SECONDS = 2  # a dying worker's connections close first, and only then is it known how it died
KILL_SECONDS = 5  # only a read that the system itself cannot interrupt outlives SIGKILL


def outlive_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which often reach all processes of a job, to the training process.

    A worker that died of them would take the run down before it has saved, which may take long. It dies with its run,
    however that ends and whatever it is stuck in; torch's own watch looks between two batches alone.
    """
    when_parent_dies(signal.SIGKILL)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: SampleDataset,
    sampler: Sampler[Sequence[SampleRequest]],
    workers: int,
    pin_memory: bool,
    timeout_seconds: float = 0,
) -> DataLoader[Any]:
    """A loader for the whole run: its workers live through all stages.

    Args:
        dataset, sampler: what, and in which order.
        workers: processes; 0 reads in this one.
        pin_memory: for copies to a GPU that nothing waits for.
        timeout_seconds: how long to wait for a batch before the workers count as stuck; 0 waits for ever, as does
            reading without workers.
    """
    return DataLoader(
        dataset,  # pyright: ignore[reportArgumentType] - `__getitems__` is all that it asks for
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType] - nor need these be lists
        num_workers=workers,
        collate_fn=whole,
        pin_memory=pin_memory,
        timeout=timeout_seconds if workers else 0,
        worker_init_fn=outlive_signals,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
    )


@contextmanager
def batches_of(loader: DataLoader[Any], times: Iterable[object] = (None,)) -> Iterator[Iterator[Any]]:
    """What a loader makes of its sampler; its workers end with the block, also when an error leaves it.

    Otherwise they would live for as long as something refers to the error's traceback.

    Args:
        loader: its sampler is asked at once, and some batches ahead of what is consumed.
        times: how often it is asked; the next time when all that it asked for before was consumed and one more
            batch is wanted.

    Raises:
        DataError: a worker died or says nothing. Torch tells of a death wherever the block is at that moment, by a
            handler of SIGCHLD.
    """
    iterator: Any = None

    def fetched(fetch: Callable[[], Any]) -> Any:
        try:
            return fetch()
        except (RuntimeError, OSError, EOFError) as error:
            # What a worker's own code raised comes with its traceback, and stays what it is.
            if not loader.num_workers or "Original Traceback" in str(error):
                raise
            raise DataError(_lost_worker(error, loader, iterator)) from error

    def batches() -> Iterator[Any]:
        nonlocal iterator
        for _ in times:
            # Torch's own iterator, which persistent workers make the same one every time.
            iterator = fetched(partial(iter, loader))
            while (batch := fetched(partial(next, iterator, None))) is not None:
                yield batch

    failed = True
    try:
        yield batches()
        failed = False
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(_lost_worker(error, loader, iterator)) from error
    finally:
        _end_workers(iterator, at_once=failed)


def _lost_worker(error: BaseException, loader: DataLoader[Any], iterator: Any) -> str:
    """What became of the workers, and what to do, for people."""
    workers: list[BaseProcess] = getattr(iterator, "_workers", [])
    silent = "timed out" in str(error)
    if workers and not silent:
        ending = wait([worker.sentinel for worker in workers], DEATH_SECONDS)
        for worker in workers:
            if worker.sentinel in ending:
                worker.join(DEATH_SECONDS)
    dead = [worker for worker in workers if worker.exitcode is not None]
    after = "; the same command then continues a run from its last checkpoint"
    if silent and not dead:
        return (
            f"no data worker delivered a batch for {loader.timeout / 60:g} minutes: is the disk or the network share "
            "with the images stuck? Where it is only slow, raise data.timeout_minutes" + after
        )
    if not dead:
        return f"the data workers cannot be reached ({type(error).__name__}: {error}){after}"
    code = dead[0].exitcode or 0
    fate = f"was ended by signal {-code}" if code < 0 else f"ended by itself, with exit code {code}"
    if code < 0:
        fate += f" ({signal.strsignal(-code)})"
    hint = {
        -signal.SIGKILL: "the system does that when memory runs out: lower data.workers or optim.batch, or leave more "
        "memory free",
        -signal.SIGBUS: "shared memory has run out: enlarge /dev/shm (docker run --shm-size), or lower data.workers",
    }.get(code, "data.workers=0 shows in which image it happens, if it is an image")
    return f"data worker {dead[0].pid} {fate}; {hint}{after}"


def _end_workers(iterator: Any, at_once: bool) -> None:
    """Leave no worker behind.

    Args:
        iterator: torch's, None before the first batch was wanted.
        at_once: ask none of them first: one that was killed may have held a lock that the others, or torch's own
            orderly end, would wait for without end.
    """
    workers: list[BaseProcess] = getattr(iterator, "_workers", [])
    if not workers:
        return
    if at_once:
        if iterator._worker_pids_set:
            _remove_worker_pids(id(iterator))  # their deaths are no news now
        iterator._worker_pids_set, iterator._shutdown = False, True
        if iterator._pin_memory:
            iterator._pin_memory_thread_done_event.set()
    else:
        with suppress(RuntimeError):  # a worker that dies just now
            iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join(KILL_SECONDS)
