"""Several ranks of one job on this host, from a fork server that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

SECONDS = 120  # until ranks that are stuck are killed; a machine may be busy


def fork_server() -> ForkServerContext:
    """What starts processes that have everything imported: a start takes no second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"mae_et.{name}" for name in ("pretraining", "finetuning", "detecting", "segmenting")]
    )
    return context


def start_workers_as_usual() -> None:
    """In a fork server's child, let data workers be started as in users' runs, not by a server of its own."""
    multiprocessing.set_start_method(None, force=True)  # pyright: ignore[reportArgumentType] - None is the default


def run_ranks(count: int, body: Callable[..., None], *arguments: Any, expect: int = 0) -> list[str]:
    """Run `body(*arguments)`, a function of a module, in so many processes that find each other as torchrun's do.

    Returns:
        What each rank wrote to stderr; all have ended with exit code `expect`.
    """
    context = fork_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [Path(f"/tmp/mae_et-ranks-{os.getpid()}-{port}-{rank}") for rank in range(count)]
    ranks = [
        context.Process(target=_rank, args=(rank, count, port, str(log), body, arguments))
        for rank, log in enumerate(logs)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
        codes = [process.exitcode for process in ranks]
        said = [log.read_text() if log.exists() else "" for log in logs]
        assert codes == [expect] * count, (codes, said)
        return said
    finally:
        for process in ranks:
            process.kill()
        for log in logs:
            log.unlink(missing_ok=True)


def _rank(rank: int, count: int, port: int, log: str, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, OMP_NUM_THREADS="1")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process
    sys.stderr = open(log, "w")  # noqa: SIM115, PTH123
    start_workers_as_usual()
    import torch

    torch.set_num_threads(1)
    try:
        body(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sys.stderr.flush()
