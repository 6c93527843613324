"""What has become of a run, in its folder: `status.json`, for scripts, and so that no run begins anew unnoticed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mae_et.engine.run_folder import RunFolderError, write_text_atomic
from mae_et.tracking.tracker import warn

State = Literal["running", "complete", "time is up", "stopped", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """A run between its first start and its end.

    Attributes:
        state: "running" also of a run that was killed, which cannot say so; "complete"; "time is up" of a race against
            the clock; "stopped" where it was told to (`until`); "interrupted" by a signal, saved; "failed".
        saved_step: of the last checkpoint, None before the first.
        reason: of the last two states, the signal or the error.
        requeued: whether SLURM was asked, and agreed, to start the job again.
    """

    state: State
    saved_step: int | None = None
    reason: str | None = None
    requeued: bool = False


class StatusFile:
    """The file, kept up to date by the main rank.

    Args:
        path: of the file.
        saved_step: of the checkpoint that the run goes on from, None for a new run.
        writes: whether this is the main rank.
    """

    def __init__(self, path: Path, saved_step: int | None, writes: bool):
        self.path, self.writes = path, writes
        self.status = Status("running", saved_step)

    def update(self, **changes: Any) -> None:
        """Change fields of `Status` and write it, atomically; that the disk has no room for it is a warning."""
        self.status = replace(self.status, **changes)
        if not self.writes:
            return
        try:
            write_text_atomic(self.path, json.dumps(asdict(self.status), indent=1) + "\n")
        except OSError as error:
            warn(f"{self.path} could not be written: {error.strerror or error}")


def saved_before(path: Path) -> int | None:
    """Step of the last checkpoint that a run had; None of a run that had none.

    Raises:
        RunFolderError: the file is damaged, so that nobody knows.
    """
    try:
        values = json.loads(path.read_text())
        step = values["saved_step"]
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise ValueError(f"saved_step is {step!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is damaged ({type(error).__name__}: {error}), and the folder holds no checkpoint: whether there "
            "was one cannot be told. Put checkpoints/ back, or choose another folder with run=..."
        ) from None
    return step
