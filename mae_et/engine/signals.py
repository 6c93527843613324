"""Signals: to save and stop, to follow a launcher that died, and to ask SLURM for another start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from mae_et.data.parents import when_parent_dies

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REPEATS_SECONDS = 2.0

_SCONTROL_SECONDS = 60  # a busy controller answers late; SLURM's own default for a message is 10


class StopSignal:
    """Remembers SIGTERM, SIGINT, SIGUSR1 or SIGHUP; a second one ends the process at once.

    One that follows within `REPEATS_SECONDS` is the same event told twice: by a terminal or a scheduler to all
    processes of a job and by torchrun to its ranks, or by the system for each thread of a launcher that dies (two
    SIGTERM, 66 to 90 ms apart). Where SIGHUP is ignored, as under nohup, it stays so.

    Once there was one, the handlers stay in force after the block, when the run has still to say goodbye: to W&B, in
    status.json, to SLURM.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in STOPPING:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def hear(self, number: int) -> None:
        """Take note of a signal, maybe one that another rank received."""
        if self.received is None:
            self.received, self._first = number, time.monotonic()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.hear(number)
        elif time.monotonic() - self._first > REPEATS_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def follow_launcher() -> None:
    """Let a rank of torchrun get SIGTERM when its launcher dies, so that it saves and leaves.

    A launcher that is killed takes no rank with it: with torch 2.14 the ranks trained on as orphans after SIGUSR1 or
    SIGKILL to torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        when_parent_dies(signal.SIGTERM)


def slurm_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job's name for `scontrol`, of an array its task's; None outside of SLURM."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID") or None


def requeue(job: str) -> str | None:
    """Ask SLURM to start the job again, under the same number.

    Returns:
        None when SLURM agreed, else what went wrong.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job],
            capture_output=True, text=True, check=False, timeout=_SCONTROL_SECONDS, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol: {error}"
    return None if done.returncode == 0 else f"scontrol requeue {job}: {(done.stderr or done.stdout).strip()}"
