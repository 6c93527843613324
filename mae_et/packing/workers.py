"""Shards over processes. What a shard holds depends on its number alone, and so not on who packs it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mae_et.data.loader import outlive_signals
from mae_et.packing.shards import Job, Report, pack_shard


def pack_shards(job: Job, numbers: Sequence[int], workers: int, report: Report) -> None:
    """Pack shards in so many processes, 0 for this one; none outlives the call.

    Raises:
        OSError: as `pack_shard`.
        RuntimeError: a process died.
    """
    workers = min(workers, len(numbers))
    if not workers:
        for number in numbers:
            pack_shard(job, number, report)
        return
    context = multiprocessing.get_context("fork")  # millions of paths are shared, and not sent
    running: dict[Any, Any] = {}
    try:
        for first in range(workers):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, numbers[first::workers], writer), daemon=True)
            process.start()
            writer.close()  # so that the worker's end is the last: its death is the end of what is read
            running[reader] = process
        while running:
            for reader in wait(list(running)):
                _receive(reader, running, report)
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _receive(reader: Any, running: dict[Any, Any], report: Report) -> None:
    try:
        message = reader.recv()
    except EOFError:
        process = running.pop(reader)
        process.join()
        if process.exitcode:
            fate = signal.strsignal(-process.exitcode) if process.exitcode < 0 else f"exit code {process.exitcode}"
            raise RuntimeError(
                f"a packing process died ({fate}); if memory ran out, set a lower --workers; the same command continues"
            ) from None
        return
    if isinstance(message, Exception):
        raise message
    report(*message)


def _work(job: Job, numbers: Sequence[int], writer: Connection) -> None:
    outlive_signals(0)
    try:
        for number in numbers:
            pack_shard(job, number, lambda done, bad: writer.send((done, bad)))
    except Exception as error:
        writer.send(error)
