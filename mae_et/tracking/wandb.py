"""Weights & Biases as a view of the metrics file: the same numbers on axes of cost, and never a reason to stop.

Whatever becomes of W&B (no key, no network, a dead helper process), training goes on and metrics.jsonl has every
row. The library is imported when a run with tracking starts, and not before.

Time. All calls of the library run on a thread of their own, in order, because some of them have no end: with
wandb 0.31, `run.log` blocks for good once a stopped helper process has 300 rows unread, and `finish` without a limit.
What W&B can cost a run is bounded by this:
- a step: nothing but a place in a queue. A mirror that is MAX_WAITING rows behind is switched off.
- the start: `init_timeout` and START_GRACE seconds (LOGIN_SECONDS more where a person is asked for a key).
- the end: `finish_timeout` and three times FINISH_GRACE seconds. A helper process that is left by then is killed.

So that this holds, W&B does not get what a run prints (it would sit in every `print` of the training thread), unless
WANDB_CONSOLE=auto asks for it.

Axes. Every metric is drawn against `compute/fraction` (u, the fraction of the compute budget) by default, so that a
curriculum and its baseline line up at equal fractions. To compare at equal cost, pick another axis in the dashboard:
the x-axis menu of a panel (pencil icon, "X axis"), or of the whole workspace ("Settings", "Line plots", "X axis"),
and there `compute/flops`, `time/hours` or `images_seen`.
"""

from __future__ import annotations

import os
import queue
import re
import secrets
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_et.tracking.tracker import plain_number, warn

MODES = ("online", "offline", "disabled")
AXES = ("compute/fraction", "compute/flops", "time/hours", "images_seen")
RUN_ID_FILE = "run_id.txt"
_LONGEST_ID = 128  # W&B takes no longer ones

MAX_WAITING = 4096  # rows; a stopped mirror keeps no more of them in memory
LOGIN_SECONDS = 60  # for a person at a terminal who is asked for a key; an unattended prompt must not hold a run
START_GRACE = 40.0  # seconds, on top of init_timeout: importing, looking up the key's user, falling back to offline
FINISH_GRACE = 5.0  # seconds for each of: rows that still wait, a full queue, the end of the helper process
MIN_FREE_BYTES = 8 * 2**20  # wandb 0.31 says nothing of a full disk, and leaves holes in its log

_Call = tuple[str, Callable[[], None], threading.Event]
"""What is being done, for messages; how; and what is set when it has been done."""


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
        finish_timeout: seconds that `finish` may take to send what is pending. What was not sent is kept for
            `wandb sync`.

    Raises: ValueError for an unknown mode. Nothing else is raised here or later: what fails is reported once on
    stderr, at the start by falling back to offline, afterwards by switching the mirror off. So is a disk with less
    than MIN_FREE_BYTES left.
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
        self._is_off = self.mode == "disabled"
        if self._is_off:
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
        self._helper: subprocess.Popen[bytes] | None = None
        self._switch = threading.Lock()
        self._calls: queue.Queue[_Call | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name="mae_et-wandb", daemon=True)
        self._thread.start()
        self._hand_over("start", self._start, init_timeout + START_GRACE + (LOGIN_SECONDS if _is_attended() else 0))

    @property
    def run_id(self) -> str | None:
        """The W&B run's id, for checkpoints and for runs that name this one as their parent; None without one."""
        return self._run_id

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Mirror one row, a little later; non-finite numbers arrive as such."""
        if self._is_off:
            return
        try:
            row = {**{name: plain_number(name, value) for name, value in metrics.items()}, "step": int(step)}
        except Exception as error:
            self._switch_off("log", error)
        else:
            self._hand_over("log", lambda: self._log(row))

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Upload pictures, placed on the axes where the last row was; the files are read a little later."""
        if not self._is_off:
            copied = dict(pictures)
            self._hand_over("log pictures", lambda: self._log_pictures(copied, step))

    def finish(self, exit_code: int) -> None:
        """Send what is pending, for at most `finish_timeout`, and close the W&B run with this exit code."""
        if self.mode == "disabled" or not self._thread.is_alive():
            return
        limit = self._limits["finish_timeout"] + FINISH_GRACE
        if not self._is_off:
            self._hand_over("finish", lambda: self._finish(exit_code), limit)
        with suppress(queue.Full):
            self._calls.put(None, timeout=FINISH_GRACE)
        # Switched off, it may still be closing what failed.
        self._thread.join(FINISH_GRACE)
        self._kill_helper()

    def _hand_over(self, action: str, call: Callable[[], None], seconds: float | None = None) -> None:
        """Queue a call for the thread, and wait for its end if it has a limit; the mirror is off where that passes."""
        done = threading.Event()
        try:
            self._calls.put_nowait((action, call, done))
        except queue.Full:
            self._give_up(action, f"it is {MAX_WAITING} rows behind")
        else:
            if seconds is not None and not done.wait(seconds):
                self._give_up(action, f"no answer within {seconds:g} s")

    def _work(self) -> None:
        """The thread: what was handed over, in order. Nothing of W&B runs anywhere else."""
        for action, call, done in iter(self._calls.get, None):
            try:
                if not self._is_off:
                    call()
            except BaseException as error:  # wandb exits, too: `teardown` calls sys.exit
                self._switch_off(action, error)
            if self._is_off:
                self._close()
            done.set()
        self._close()

    def _log(self, row: dict[str, float | int | str]) -> None:
        self._check_space()
        self._axes.update((name, row[name]) for name in AXES if name in row)
        # No step= here: W&B drops every row whose step is not above its own counter, as after a resume.
        self._run.log(row)

    def _log_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        assert self._wandb is not None
        self._check_space()
        media = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        self._run.log({**self._axes, "step": int(step), **media})

    def _finish(self, exit_code: int) -> None:
        kept, begin = Path(self._run.dir).parent, time.monotonic()
        self._run.finish(exit_code=exit_code)
        self._is_off = True
        # wandb 0.31 returns after its limit as if all had been sent.
        if time.monotonic() - begin >= self._limits["finish_timeout"]:
            warn(
                f"W&B has not taken everything within {self._limits['finish_timeout']:g} s. metrics.jsonl has every "
                f"row in any case. To send the rest:\n    wandb sync --no-skip-online {shlex.quote(str(kept))}"
            )

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._directory = Path(os.environ.get("WANDB_DIR") or self.folder).resolve()
        self._directory.mkdir(parents=True, exist_ok=True)
        if not os.access(self._directory, os.W_OK):
            # wandb itself would go on in the temporary folder, where nobody looks for it.
            raise PermissionError(f"{self._directory} is not writable; set WANDB_DIR to a folder that is")
        self._check_space()
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
                reason = f"nobody logged in within {LOGIN_SECONDS} s"
            # Its helper process would keep the settings of the failed start.
            wandb.teardown()
            self._report_offline(reason)
        return self._init(wandb, "offline")

    def _init(self, wandb: ModuleType, mode: str) -> Any:
        known = wandb.Settings.model_fields
        login = {"login_timeout": LOGIN_SECONDS} if "login_timeout" in known else {}
        self._helper = _helper_process(wandb.setup(settings=wandb.Settings(**login)))
        wanted = {**self._limits, **({} if "WANDB_CONSOLE" in os.environ else {"console": "off"})}
        return wandb.init(
            **self._arguments,
            # Unsaid, online is the default that an answer to the login prompt may change.
            mode=None if mode == "online" else mode,
            dir=str(self._directory),
            id=self._run_id,
            # Offline, too: without it `wandb sync` lets each later segment of a run overwrite the ones before.
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
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

    def _check_space(self) -> None:
        disk = shutil.disk_usage(self._directory)
        # Some file systems know no size; they report 0 of 0 bytes.
        if disk.total and disk.free < MIN_FREE_BYTES:
            raise OSError(f"{disk.free / 2**20:.1f} MiB are left on the disk of {self._directory}")

    def _give_up(self, action: str, reason: str) -> None:
        """Switch the mirror off while its thread hangs: without the helper process, whatever it waits for fails."""
        self._switch_off(action, TimeoutError(reason))
        self._kill_helper()

    def _kill_helper(self) -> None:
        if self._helper is not None and self._helper.poll() is None:
            with suppress(OSError):
                # It leads a group of its own, with the process that watches the machine.
                if os.getpgid(self._helper.pid) == self._helper.pid:
                    os.killpg(self._helper.pid, signal.SIGKILL)
            self._helper.kill()

    def _close(self) -> None:
        """End the helper process, which has written all of its log by then, and not before."""
        library, self._wandb = self._wandb, None
        if library is not None:
            # It fails where its helper has, but only after it has taken back its hook for the process's exit, which
            # would wait for the helper without limit.
            with suppress(BaseException):
                library.teardown()

    def _switch_off(self, action: str, error: BaseException) -> None:
        with self._switch:
            if self._is_off:
                return
            self._is_off = True
        warn(
            f"W&B failed to {action} ({type(error).__name__}: {error}) and is off for the rest of this run. "
            "Nothing is lost: metrics.jsonl has every row, and training continues"
        )


def _is_attended() -> bool:
    """Whether there is a terminal at which wandb would ask for a key."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _helper_process(library: Any) -> subprocess.Popen[bytes] | None:
    """W&B's helper process, by the private handle of wandb 0.31; None where another version keeps it elsewhere."""
    for name in ("_connection", "_proc", "_process"):
        library = getattr(library, name, None)
    return library if isinstance(library, subprocess.Popen) else None


def _less_sharing(mode: str, other: str) -> str:
    """The one of two modes that shares less; an `other` that is none of ours (or empty) does not count."""
    return max(mode, other, key=MODES.index) if other in MODES else mode


def run_id_of(folder: Path) -> str:
    """The run's id, by which W&B and downstream runs know it: the one kept in its folder, else WANDB_RUN_ID, else new.

    It is kept there, with W&B or without. What is there and is no id is not kept: it would go to a dashboard.
    """
    file = folder / RUN_ID_FILE
    try:
        kept = file.read_bytes()[:_LONGEST_ID].decode().strip() if not file.is_symlink() else ""
    except (OSError, UnicodeDecodeError):
        kept = ""
    if re.fullmatch(r"[\w.-]+", kept):
        return kept
    run_id = os.environ.get("WANDB_RUN_ID") or _new_run_id()
    file.unlink(missing_ok=True)
    file.write_text(run_id + "\n")
    return run_id


def _new_run_id() -> str:
    # W&B's own form: eight lowercase letters and digits. `secrets` leaves the run's seeded generators alone.
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
