"""Weights & Biases as a view of the metrics file: the same numbers on axes of cost, and never a reason to stop.

Whatever becomes of W&B (no key, no network, a dead helper process), training goes on and metrics.jsonl has every
row. The library is imported when a run with tracking starts, and not before.

Time. All calls of the library run on a thread of their own, in order, because some of them have no end: with
wandb 0.31, `run.log` blocks for good once a stopped helper process has 300 rows unread, and `finish` without a limit.
What W&B can cost a run is bounded by this:
- a step: nothing but a place in a queue. A mirror that is MAX_WAITING rows behind is switched off.
- the start: `init_timeout` and START_GRACE seconds (LOGIN_SECONDS more where a person is asked for a key).
- the end: `finish_timeout` and three times FINISH_GRACE seconds (CHECKPOINT_SECONDS more where a checkpoint is sent).
  A helper process that is left by then is killed.

So that this holds, W&B does not get what a run prints (it would sit in every `print` of the training thread), unless
WANDB_CONSOLE=auto asks for it.

Axes. Every metric is drawn against `compute/fraction` (u, the fraction of the compute budget) by default, so that a
curriculum and its baseline line up at equal fractions. To compare at equal cost, pick another axis in the dashboard:
the x-axis menu of a panel (pencil icon, "X axis"), or of the whole workspace ("Settings", "Line plots", "X axis"),
and there `compute/flops`, `time/hours` or `images_seen`. `python -m mae_et workspace` makes a dashboard that does so.

Summary. Of every score of training, W&B keeps the highest and the last value (eval/probe.max, eval/probe.last), and
`tracking.best` gives it the best as plain numbers, with what it had cost: best/eval/probe, best/eval/probe_at_flops.
These come from metrics.jsonl, so that rows which a resumed run takes back do not count.

Alerts. A run that an error ends, and a disk without room, are told to whoever follows the run (mail, Slack).

Files. What W&B would keep in the user's home (artifacts on their way, its own logs) goes below the run's wandb/, unless
WANDB_DATA_DIR or WANDB_CACHE_DIR name another place.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from mae_et.tracking.artifacts import checkpoint_artifact, newest_checkpoint, put_command
from mae_et.tracking.best import SCORES, BestScores
from mae_et.tracking.jsonl import read_metrics
from mae_et.tracking.run_id import RUN_ID_FILE, run_id_of
from mae_et.tracking.tracker import plain_number, warn
from mae_et.tracking.wandb_private import helper_process, kill_helper, stop_polling

MODES = ("online", "offline", "disabled")
AXES = ("compute/fraction", "compute/flops", "time/hours", "images_seen")
_LONGEST_TITLE = 63  # of an alert
_OWN_PLACES = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache"}

MAX_WAITING = 4096  # rows; a stopped mirror keeps no more of them in memory
LOGIN_SECONDS = 60  # for a person at a terminal who is asked for a key; an unattended prompt must not hold a run
START_GRACE = 40.0  # seconds, on top of init_timeout: importing, looking up the key's user, falling back to offline
FINISH_GRACE = 5.0  # seconds for each of: rows that still wait, a full queue, the end of the helper process
CHECKPOINT_SECONDS = 60.0  # to read a checkpoint and to ask the server, before the run is closed without it
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
        metrics: the run's metrics file, whose rows the best scores begin with; None begins with none.
        alerts: whether to tell people of faults.
        checkpoints: the folder of checkpoints whose newest becomes an artifact when the run ends as planned; None
            keeps them to yourself.
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
        metrics: Path | None = None,
        alerts: bool = True,
        checkpoints: Path | None = None,
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
        self._metrics, self._alerts, self._checkpoints = metrics, alerts, checkpoints
        self._best, self._scores = BestScores(), set[str]()
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
        # Path.resolve raises where links go in circles.
        self._directory = Path(os.path.realpath(os.environ.get("WANDB_DIR") or self.folder))
        # Set and unset by the thread that trains: the environment is everybody's.
        self._placed = {name: str(self._directory / "wandb" / sub) for name, sub in _OWN_PLACES.items()}
        self._placed = {name: place for name, place in self._placed.items() if name not in os.environ}
        os.environ.update(self._placed)
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

    def alert(self, title: str, text: str) -> None:
        """Tell people of a fault by W&B's means, a little later; nothing where alerts are off."""
        if not self._is_off and self._alerts:
            self._hand_over("send an alert", lambda: self._alert(title, text))

    def finish(self, exit_code: int) -> None:
        """Send what is pending, for at most `finish_timeout`, and close the W&B run with this exit code.

        Called while an error is on its way up, as in a `finally`, it alerts people to that error.
        """
        if self.mode == "disabled" or not self._thread.is_alive():
            return
        error = sys.exc_info()[1]
        if exit_code and isinstance(error, Exception):
            self.alert(f"Run failed: {type(error).__name__}", str(error))
        # The last checkpoint of a run that ended as planned, and of no other.
        checkpoint = newest_checkpoint(self._checkpoints) if exit_code == 0 and self._checkpoints else None
        limit = self._limits["finish_timeout"] + FINISH_GRACE + (CHECKPOINT_SECONDS if checkpoint else 0)
        if not self._is_off:
            self._hand_over("finish", lambda: self._finish(exit_code, checkpoint), limit)
        with suppress(queue.Full):
            self._calls.put(None, timeout=FINISH_GRACE)
        # Switched off, it may still be closing what failed.
        self._thread.join(FINISH_GRACE)
        kill_helper(self._helper)
        for name in self._placed:
            os.environ.pop(name, None)

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
        for name in row.keys() - self._scores:
            if name.startswith(SCORES):
                # By its name: of two patterns that fit, wandb 0.31 takes any.
                self._run.define_metric(name, step_metric=AXES[0], summary="max,last")
                self._scores.add(name)
        # No step= here: W&B drops every row whose step is not above its own counter, as after a resume.
        self._run.log(row)
        best = self._best.add(row)
        if best:
            self._run.summary.update(best)

    def _log_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        assert self._wandb is not None
        self._check_space()
        media = {_media_key(name): self._wandb.Image(str(path), caption=path.stem) for name, path in pictures.items()}
        self._run.log({**self._axes, "step": int(step), **media})

    def _alert(self, title: str, text: str) -> None:
        with suppress(Exception):  # what is wrong with W&B shows at its next call, and a run needs its end
            self._run.alert(title[:_LONGEST_TITLE], text, level="ERROR")

    def _finish(self, exit_code: int, checkpoint: Path | None) -> None:
        kept = Path(self._run.dir).parent
        if checkpoint is not None:
            # On a thread of its own: while the server is silent it has no end, and the run needs its own.
            sending = threading.Thread(target=self._log_checkpoint, args=(self._wandb, checkpoint), daemon=True)
            sending.start()
            sending.join(CHECKPOINT_SECONDS)
        begin = time.monotonic()
        self._run.finish(exit_code=exit_code)
        self._is_off = True
        # wandb 0.31 returns after its limit as if all had been sent.
        if time.monotonic() - begin >= self._limits["finish_timeout"]:
            also = "" if checkpoint is None else f"\n    {self._put(checkpoint)}"
            warn(
                f"W&B has not taken everything within {self._limits['finish_timeout']:g} s. metrics.jsonl has every "
                f"row in any case. To send the rest:\n    wandb sync --no-skip-online {shlex.quote(str(kept))}{also}"
            )

    def _log_checkpoint(self, wandb: ModuleType, checkpoint: Path) -> None:
        assert self._run_id is not None
        try:
            self._run.log_artifact(checkpoint_artifact(wandb, checkpoint, self._run_id, self._arguments["config"]))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            warn(f"W&B did not take the last checkpoint ({reason}). To send it:\n    {self._put(checkpoint)}")

    def _put(self, checkpoint: Path) -> str:
        return put_command(checkpoint, str(self._run_id), self._arguments["entity"], self._arguments["project"])

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
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
        self._define_metrics()
        if self._metrics is not None and self._metrics.exists():
            self._best = BestScores(read_metrics(self._metrics))
            self._run.summary.update(self._best.summary)

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
        self._helper = helper_process(wandb.setup(settings=wandb.Settings(**login)))
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

    def _define_metrics(self) -> None:
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
            full = f"{disk.free / 2**20:.1f} MiB are left on the disk of {self._directory}"
            if self._run is not None and self._alerts:
                self._alert("Disk full", f"{full}. W&B is off for the rest of this run")
            raise OSError(full)

    def _give_up(self, action: str, reason: str) -> None:
        """Switch the mirror off while its thread hangs: without the helper process, whatever it waits for fails."""
        self._switch_off(action, TimeoutError(reason))
        kill_helper(self._helper)

    def _close(self) -> None:
        """End the helper process, which has written all of its log by then, and not before."""
        library, self._wandb = self._wandb, None
        if library is not None:
            # It fails where its helper has, but only after it has taken back its hook for the process's exit, which
            # would wait for the helper without limit.
            with suppress(BaseException):
                stop_polling(self._run)
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


def _media_key(name: str) -> str:
    """One key for the pictures of all stages, whose panel has a slider over them; their captions tell them apart."""
    return re.sub(r"/stage-\d+-B[^/]*$", "/stages", name)


def _is_attended() -> bool:
    """Whether there is a terminal at which wandb would ask for a key."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _less_sharing(mode: str, other: str) -> str:
    """The one of two modes that shares less; an `other` that is none of ours (or empty) does not count."""
    return max(mode, other, key=MODES.index) if other in MODES else mode
