"""Weights & Biases as a view of the metrics file: the same numbers on axes of cost, and never a reason to stop.

Whatever becomes of W&B (no key, no network, a dead helper process), training goes on and metrics.jsonl has every
row. The library is imported when a run with tracking starts, and not before.

Axes. Every metric is drawn against `compute/fraction` (u, the fraction of the compute budget) by default, so that a
curriculum and its baseline line up at equal fractions. To compare at equal cost, pick another axis in the dashboard:
the x-axis menu of a panel (pencil icon, "X axis"), or of the whole workspace ("Settings", "Line plots", "X axis"),
and there `compute/flops`, `time/hours` or `images_seen`.
"""

from __future__ import annotations

import os
import secrets
import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_et.tracking.tracker import plain_number, warn

MODES = ("online", "offline", "disabled")
AXES = ("compute/fraction", "compute/flops", "time/hours", "images_seen")
RUN_ID_FILE = "run_id.txt"

_LOGIN_SECONDS = 60  # for a person at a terminal who is asked for a key; an unattended prompt must not hold a run


class WandbTracker:
    """Mirrors metrics and pictures to a W&B run.

    Args:
        mode: "online", "offline" (a local log, sent later by `wandb sync`) or "disabled" (does nothing, imports
            nothing). A WANDB_MODE in the environment that shares less than `mode` wins over it.
        folder: the run folder. W&B's files go to its subfolder wandb/, unless WANDB_DIR names another place.
        project, name, group, job_type, entity, tags: as in `wandb.init`.
        config: the run's configuration, shown in the dashboard.
        run_id: the W&B run to continue. None takes the one that an earlier start kept in the folder
            (run_id.txt), else WANDB_RUN_ID, else a new one. It is kept, so a resumed run continues its W&B run.
        init_timeout: seconds that the server has to answer before the run is logged offline (wandb 0.31 takes
            10 s more before it counts them, to look up the key's user).
        finish_timeout: seconds that `finish` may take to send what is pending, where the installed wandb can limit it
            (0.31 can). What was not sent is kept for `wandb sync`.

    Raises: ValueError for an unknown mode. Nothing else is raised here or later: what fails is reported once on
    stderr, at the start by falling back to offline, afterwards by switching the mirror off.
    """

    def __init__(
        self,
        mode: str,
        folder: Path | str,
        *,
        project: str = "mae_et",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        init_timeout: float = 20.0,
        finish_timeout: float = 30.0,
    ):
        if mode not in MODES:
            raise ValueError(f"tracking.wandb={mode!r} is not a mode: use one of {', '.join(MODES)}")
        self.mode = _less_sharing(mode, os.environ.get("WANDB_MODE", ""))
        self.folder = Path(folder)
        self._axes: dict[str, float | int | str] = {}
        self._run: Any = None
        self._wandb: ModuleType | None = None
        self._run_id = run_id
        self._limits = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        if self.mode == "disabled":
            return
        self._arguments = {
            "project": project,
            "name": name,
            "group": group,
            "job_type": job_type,
            "entity": entity,
            "tags": list(tags),
            "config": dict(config or {}),
        }
        try:
            self._start()
        except Exception as error:
            self._switch_off("start", error)

    @property
    def run_id(self) -> str | None:
        """The W&B run's id, for checkpoints and for runs that name this one as their parent; None without one."""
        return self._run_id

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Mirror one row; non-finite numbers arrive as such."""
        if self._run is None:
            return
        try:
            row = {**{name: plain_number(name, value) for name, value in metrics.items()}, "step": int(step)}
            self._axes.update((name, row[name]) for name in AXES if name in row)
            # No step= here: W&B drops every row whose step is not above its own counter, as after a resume.
            self._run.log(row)
        except Exception as error:
            self._switch_off("log", error)

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Upload pictures, placed on the axes where the last row was."""
        if self._run is None or self._wandb is None:
            return
        try:
            media = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
            self._run.log({**self._axes, "step": int(step), **media})
        except Exception as error:
            self._switch_off("log pictures", error)

    def finish(self, exit_code: int) -> None:
        """Send what is pending, for at most `finish_timeout`, and close the W&B run with this exit code."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
            self._run = None
        except Exception as error:
            self._switch_off("finish", error)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._directory = Path(os.environ.get("WANDB_DIR") or self.folder).resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self._directory, os.W_OK):
            # wandb itself would go on in the temporary folder, where nobody looks for it.
            raise PermissionError(f"{self._directory} is not writable; set WANDB_DIR to a folder that is")
        self._run_id = self._run_id or run_id_of(self.folder)
        (self.folder / RUN_ID_FILE).write_text(self._run_id + "\n")
        import wandb

        self._wandb = wandb
        self._run = self._open_run(wandb)
        self._define_axes()

    def _open_run(self, wandb: ModuleType) -> Any:
        """Start the W&B run in the mode asked for; where that is online and fails, offline."""
        if self.mode == "online":
            try:
                run = self._init(wandb, "online")
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if getattr(run, "offline", False):
                    self._report_offline("as you told wandb")
                    return run
                if not getattr(run, "disabled", False):
                    return run
                # wandb answers a login prompt that nobody answers with a run that records nothing.
                reason = f"nobody logged in within {_LOGIN_SECONDS} s"
            # Its helper process would keep the settings of the failed start.
            wandb.teardown()
            self._report_offline(reason)
        return self._init(wandb, "offline")

    def _init(self, wandb: ModuleType, mode: str) -> Any:
        known = wandb.Settings.model_fields
        if "login_timeout" in known:
            wandb.setup(settings=wandb.Settings(login_timeout=_LOGIN_SECONDS))
        return wandb.init(
            **self._arguments,
            # Unsaid, online is the default that an answer to the login prompt may change.
            mode=None if mode == "online" else mode,
            dir=str(self._directory),
            id=self._run_id,
            # Offline, too: without it `wandb sync` lets each later segment of a run overwrite the ones before.
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(**{name: value for name, value in self._limits.items() if name in known}),
        )

    def _define_axes(self) -> None:
        for name in ("step", *AXES):
            # Hidden: no chart of an axis against itself. It stays in the menus of x-axes.
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric=AXES[0])

    def _report_offline(self, reason: str) -> None:
        self.mode = "offline"
        segments = f"{shlex.quote(str(self._directory / 'wandb'))}/offline-run-*-{self._run_id}"
        warn(
            f"W&B logs this run offline ({reason}). metrics.jsonl has every row in any case. "
            f"To send the run later, and before it is resumed online:\n    wandb sync {segments}"
        )

    def _switch_off(self, action: str, error: Exception) -> None:
        self._run = None
        warn(
            f"W&B failed to {action} ({type(error).__name__}: {error}) and is off for the rest of this run. "
            "Nothing is lost: metrics.jsonl has every row, and training continues"
        )


def _less_sharing(mode: str, other: str) -> str:
    """The one of two modes that shares less; an `other` that is none of ours (or empty) does not count."""
    return max(mode, other, key=MODES.index) if other in MODES else mode


def run_id_of(folder: Path) -> str:
    """The run's id, by which W&B and downstream runs know it: the one kept in its folder, else WANDB_RUN_ID, else new.

    It is kept there, with W&B or without.
    """
    file = folder / RUN_ID_FILE
    kept = file.read_text().strip() if file.is_file() else ""
    run_id = kept or os.environ.get("WANDB_RUN_ID") or _new_run_id()
    if not kept:
        file.write_text(run_id + "\n")
    return run_id


def _new_run_id() -> str:
    # W&B's own form: eight lowercase letters and digits. `secrets` leaves the run's seeded generators alone.
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
