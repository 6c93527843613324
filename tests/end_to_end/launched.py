"""Runs as processes of their own: started, watched, and looked for after their end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pretrain
from tests.end_to_end.tiny import arguments
from tests.engine.ranks import fork_server, start_workers_as_usual
from tests.torture.processes import MARK, left_behind

REPOSITORY = Path(__file__).resolve().parents[2]
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
PATIENCE = 240  # seconds for what takes ten; a machine may be busy


@dataclass
class Job:
    """A command, and all that it starts; its output is in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def alive(self) -> dict[int, str]:
        """Living processes of the job by id, itself included."""
        return left_behind(-1, str(self.log))

    def gone_after(self) -> float:
        """Seconds until none of its processes lives.

        Raises:
            AssertionError: naming those that do; they are killed.
        """
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            if self.process.poll() is not None and not self.alive():
                return time.monotonic() - began
            time.sleep(0.02)
        orphans = self.alive()
        self.end()
        raise AssertionError(f"after {PATIENCE} s there are still {orphans}: {self.said[-2000:]}")

    def end(self) -> None:
        """Kill what still lives."""
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def start(line: Sequence[str | Path], log: Path, **environment: str) -> Job:
    """Start a command in the repository."""
    # OWN_STORE: see docs/launching.md.
    changed = {**os.environ, "OMP_NUM_THREADS": "1", OWN_STORE: "1", MARK: str(log), **environment}
    with log.open("wb") as out:
        process = subprocess.Popen(line, cwd=REPOSITORY, env=changed, stdout=out, stderr=subprocess.STDOUT)
    return Job(process, log)


def torchrun(ranks: int, *options: str) -> list[str]:
    """The launcher on this host; it finds a free port by itself."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]


def command(photos: Path, run: Path, *changes: str) -> list[str]:
    """pretrain.py and its arguments."""
    config = run.parent / "empty.yaml"
    config.write_text("{}\n")
    return ["pretrain.py", "--config", str(config), *arguments(photos, run, *changes)]


@dataclass
class Ranks:
    """Ranks of a run from a fork server that has everything imported: a start takes no second."""

    processes: list[BaseProcess]
    logs: list[Path] = field(default_factory=list)

    @property
    def said(self) -> list[str]:
        """Output by rank."""
        return [log.read_text(errors="replace") for log in self.logs]

    def signal(self, number: int) -> None:
        """Send a signal to every rank, as SLURM does."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def codes(self) -> list[int | None]:
        """Exit codes by rank, negative for signals.

        Raises:
            AssertionError: some do not end; they are killed.
        """
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        alive = [process for process in self.processes if process.exitcode is None]
        for process in alive:
            process.kill()
        assert not alive, f"{len(alive)} ranks do not end: {[text[-1500:] for text in self.said]}"
        return [process.exitcode for process in self.processes]


def start_ranks(count: int, lines: Sequence[str], folder: Path, **environment: str) -> Ranks:
    """Start ranks with the variables that torchrun and launch/slurm.sbatch set.

    Args:
        count: of ranks; a single one is started like any process, without these variables.
        lines: pretrain.py and its arguments.
        folder: for their output.
        environment: further variables; "{rank}" in a value is the rank.
    """
    context = fork_server()
    folder.mkdir(parents=True, exist_ok=True)
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks, number = Ranks([]), len(list(folder.iterdir()))
    for rank in range(count):
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        own |= {name: value.replace("{rank}", str(rank)) for name, value in environment.items()}
        ranks.logs.append(folder / f"{number:03}-{rank}.log")
        ranks.processes.append(context.Process(target=_rank, args=(list(lines[1:]), own, str(ranks.logs[-1]))))
        ranks.processes[-1].start()
    return ranks


def free_port(ports: range = range(1)) -> int:
    """A port on which nobody listens: any, or one of some."""
    for port in random.sample(ports, len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError(f"no port of {ports} is free")


def _rank(lines: list[str], environment: dict[str, str], log: str) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    start_workers_as_usual()
    sys.exit(pretrain.main(lines))


def rows_of(run: Path) -> int:
    """Lines of the metrics, also while somebody writes them."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(run: Path, rows: int, job: Job | Ranks) -> None:
    """Until the run has logged so many steps.

    Raises:
        AssertionError: with what it said, if it ended first or took too long.
    """
    began = time.monotonic()
    processes = [job.process] if isinstance(job, Job) else job.processes
    while rows_of(run) < rows:
        over = (
            all((one.exitcode if isinstance(one, BaseProcess) else one.poll()) is not None for one in processes)
            or time.monotonic() - began > PATIENCE
        )
        assert not over or rows_of(run) >= rows, f"no step {rows}: {job.said}"
        time.sleep(0.005)
