"""One run through random numbers of ranks, started by torchrun, stopped at random: the losses of one process."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mae_et.tracking import read_metrics
from tests.torture.hosts import REPOSITORY, check_losses, losses
from tests.torture.runs import Kind, chance_of, rows_written, wait_until, whole_run

CHANGES = ("engine.precision=fp32", "saving.steps=7", "epochs=16")
KINDS = {layout: Kind(f"elastic_{layout}", (*CHANGES, f"engine.parallel={layout}")) for layout in ("ddp", "fsdp")}
STARTS = 4  # before the one that ends the run
SIZES = (1, 2, 4)


def start(count: int, lines: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A start of the run on so many ranks, by torchrun where there are several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    # Without the last, ranks of an attempt may read addresses of the one before: see docs/launching.md.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    line = [sys.executable, *(launcher if count > 1 else []), "pretrain.py", *lines]
    with log.open("ab") as out:
        return subprocess.Popen(line, cwd=REPOSITORY, env=environment, stdout=out, stderr=subprocess.STDOUT)


def world_sizes(folder: Path, seed: int) -> None:
    """Another number of ranks, another layout, other workers at every start; ended by signals at any time, or by -9."""
    chance, run, log = chance_of("world_sizes", seed), folder / "run", folder / "log.txt"
    whole = whole_run(KINDS["ddp"], folder)
    sizes = [chance.choice(SIZES) for _ in range(STARTS)] + [chance.choice(SIZES)]
    for number, count in enumerate(sizes):
        kind = KINDS[chance.choice(sorted(KINDS))]
        lines = kind.lines(folder, run, f"data.workers={chance.choice((0, 1))}")
        before, last = rows_written(run), number == STARTS
        process = start(count, lines, log)
        if last:
            assert process.wait(240) == 0, f"{sizes}: {log.read_text()[-2000:]}"
            break
        # Somewhere in the start, or some steps into the run.
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0, 8))
        else:
            wait_for_step(run, before + chance.randrange(1, 40), process, f"{sizes}: no step")
        if process.poll() is None:
            process.send_signal(chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)))
        process.wait(90)
        wait_for_the_lock(run)
    check_losses(run, losses(whole.run))
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, whole.run))
    assert [row["images_seen"] for row in ours] == [row["images_seen"] for row in theirs], f"{sizes}: other images"


def wait_for_step(run: Path, goal: int, process: subprocess.Popen[bytes], why: str) -> None:
    """Until the run has logged so many steps, or has ended."""
    wait_until(lambda: rows_written(run) >= goal or process.poll() is not None, 240, why)


def wait_for_the_lock(run: Path) -> None:
    """Ranks whose launcher was killed are still saving; the next start would be refused, as it should be."""
    path = run / ".lock"
    if not path.exists():
        time.sleep(
            10
        )  # a launcher that was killed during the start: its ranks end before they make the folder, or soon
        return

    def free() -> bool:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    wait_until(free, 60, "the run's folder is still locked")


TRIALS = {"world_sizes": world_sizes}
