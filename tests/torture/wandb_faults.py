"""W&B absent, logged out, unreachable, slow, wrong, frozen, killed, out of space: training does not notice.

Each function of FAULTS(folder) trains a tiny run in a process of its own beside one real fault, and raises
AssertionError unless the weights, the rows of metrics.jsonl and the exit code are those of a run without W&B, no step
waited for it, its end came within the stated limits, people were told once, and no process is left.

Servers are on 127.0.0.1, and all that W&B writes stays in `folder`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from mae_et.tracking.wandb import FINISH_GRACE, MAX_WAITING, START_GRACE
from tests.end_to_end.tiny import arguments, history, run_here, weights
from tests.torture.processes import MARK, left_behind
from tests.torture.runs import Skipped
from tests.torture.wandb_child import FAULT_STEP, LIMITS
from tests.tracking.wandb_server import FakeWandbServer

REPOSITORY = Path(__file__).resolve().parents[2]
STEP_SECONDS = 0.5  # what a step may wait for W&B: 0.1 ms is usual, but the machine may be busy with other tests
GONE_SECONDS = 15.0
SWITCHED_OFF = "is off for the rest of this run"
OFFLINE = "W&B logs this run offline"
UNSENT = "W&B has not taken everything"


@dataclass(frozen=True)
class Outcome:
    """A run beside a fault.

    Attributes:
        run: its folder.
        code: its exit code.
        seconds: spent in W&B's tracker: "start", "log" (the longest one), "finish" (not for a killed run); "gone":
            from the end of training until no process of it was left.
        said: what it printed to stderr.
    """

    run: Path
    code: int
    seconds: Mapping[str, float]
    said: str


def write_photos(folder: Path) -> Path:
    """45 small PNGs."""
    photos = folder / "photos"
    if not photos.exists():
        photos.mkdir(parents=True)
        generator = np.random.default_rng(0)
        for index in range(45):
            coarse = generator.integers(0, 255, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((28, 24)).save(photos / f"{index:02}.png")
    return photos


@cache
def without_wandb(*changes: str) -> tuple[list[dict[str, Any]], str]:
    """(rows, hash of the weights) of the run without W&B."""
    with TemporaryDirectory() as folder:
        run = run_here(write_photos(Path(folder)), Path(folder) / "run", *changes)
        return history(run), weights(run)


def trained(
    folder: Path,
    *changes: str,
    mode: str = "online",
    environment: Mapping[str, str] = {},
    at_fault: Callable[[subprocess.Popen[str]], None] | None = None,
    **child: Any,
) -> Outcome:
    """Train in a process of its own; `at_fault` is called with it while it waits at FAULT_STEP.

    Args:
        folder: gets the run, W&B's files, and the photos.
        changes: of the tiny run's configuration.
        mode: tracking.wandb.
        environment: further variables of the process.
        at_fault: does the damage.
        child: see wandb_child.py.
    """
    run = folder / "run"
    options = {**child, "pause": at_fault is not None}
    keys = arguments(write_photos(folder), run, f"tracking.wandb={mode}", *changes)
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with (folder / "stderr.txt").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.wandb_child", json.dumps(options), *keys],
            **{"cwd": REPOSITORY, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True},
            env={**isolated(folder), **environment, MARK: mark},
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            if at_fault is not None:
                assert process.stdout.readline() == "ready\n", (folder / "stderr.txt").read_text()
                at_fault(process)
            output = process.communicate("go on\n", timeout=120)[0]
        finally:
            process.kill()
            process.wait()
    gone = check_nothing_left(process.pid, mark)
    lines = output.splitlines()
    seconds = {**(json.loads(lines[-1]) if lines and process.returncode == 0 else {}), "gone": gone}
    return Outcome(run, process.returncode, seconds, (folder / "stderr.txt").read_text())


def isolated(folder: Path) -> dict[str, str]:
    """An environment in which W&B finds neither a key nor the user's files, and trains on one thread."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    places = ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR")
    return {
        **kept,
        **{f"WANDB_{name}": str(home / name.lower()) for name in places},
        **{"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_ERROR_REPORTING": "false"},
        "OMP_NUM_THREADS": "1",
    }


def check_nothing_left(session: int, mark: str) -> float:
    """No process of the run may live on for more than GONE_SECONDS. Returns how long one did.

    With wandb 0.31, the helper of a killed run looks for it once a second, and the process that watches the machine
    looks for a killed helper every five.
    """
    begin = time.monotonic()
    while (left := left_behind(session, mark)) and time.monotonic() - begin < GONE_SECONDS:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"left behind: {left}"
    return time.monotonic() - begin


def check(outcome: Outcome, *changes: str, warning: str | None = SWITCHED_OFF) -> None:
    """The run has the bits, rows and exit code of one without W&B, in its limits, and said so once (or nothing)."""
    assert outcome.code == 0, f"exit code {outcome.code}: {outcome.said}"
    rows, hashed = without_wandb(*changes)
    assert history(outcome.run) == rows, "the rows of metrics.jsonl differ from those without W&B"
    assert weights(outcome.run) == hashed, "the weights differ from those without W&B"
    assert outcome.seconds["log"] < STEP_SECONDS, outcome.seconds
    assert outcome.seconds["start"] < LIMITS["init_timeout"] + START_GRACE, outcome.seconds
    assert outcome.seconds["finish"] < LIMITS["finish_timeout"] + 3 * FINISH_GRACE, outcome.seconds
    warnings = [line for line in outcome.said.splitlines() if line.startswith("warning:")]
    assert len(warnings) == (warning is not None), outcome.said
    assert warning is None or warning in warnings[0], outcome.said
    assert "Traceback" not in outcome.said, outcome.said


@contextmanager
def serving() -> Iterator[tuple[FakeWandbServer, dict[str, str]]]:
    """A server that works, and the environment that names it."""
    server = FakeWandbServer()
    try:
        yield server, {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
    finally:
        server.close()


def helper_of(process: subprocess.Popen[str]) -> int:
    """The id of the run's wandb-core."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"wandb-core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("wandb-core is not running")


def no_install(folder: Path, content: str) -> Outcome:
    """`import wandb` finds this; an empty module is what a folder of W&B's files in a working folder gives."""
    stub = folder / "stub" / "wandb"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(content)
    outcome = trained(folder, environment={"PYTHONPATH": str(folder / "stub")})
    check(outcome)
    assert "W&B failed to start" in outcome.said
    return outcome


def logged_out(folder: Path) -> Outcome:
    """No key, and no terminal to ask at: the run is logged offline."""
    outcome = trained(folder)
    check(outcome, warning=OFFLINE)
    return outcome


def bad_key(folder: Path) -> Outcome:
    """A key that is no key."""
    outcome = trained(folder, environment={"WANDB_API_KEY": "not-a-key", "WANDB_BASE_URL": "http://127.0.0.1:9"})
    check(outcome, warning=OFFLINE)
    return outcome


def refused_key(folder: Path) -> Outcome:
    """The server answers 401 to everything."""
    with serving() as (server, environment):
        server.status = 401
        outcome = trained(folder, environment=environment)
    check(outcome, warning=OFFLINE)
    return outcome


def unreachable(folder: Path, answers: bool) -> Outcome:
    """The connection is refused, or (`answers`) accepted by something that never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen(64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        outcome = trained(folder, environment={"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40})
    check(outcome, warning=OFFLINE)
    return outcome


def broken_server(folder: Path, at_start: bool = False, **fault: Any) -> Outcome:
    """The server turns slow (`delay` seconds), fails (`status`), or talks `rubbish`, at once or in mid-run."""

    def turn(_process: object = None) -> None:
        for name, value in fault.items():
            setattr(server, name, value)

    with serving() as (server, environment):
        if at_start:
            turn()
        outcome = trained(folder, environment=environment, at_fault=None if at_start else turn)
    # It takes an answer of 200 for one, whatever is in it; and a slow start is a start.
    told = None if "rubbish" in fault and not at_start else UNSENT
    check(outcome, warning=OFFLINE if OFFLINE in outcome.said else told)
    return outcome


def dying_server(folder: Path) -> Outcome:
    """The server dies in mid-run."""
    with serving() as (server, environment):
        outcome = trained(folder, environment=environment, at_fault=lambda _process: server.close())
    check(outcome, warning=UNSENT)
    return outcome


def signalled_helper(folder: Path, number: int, flood: int = 0, mode: str = "offline") -> Outcome:
    """wandb-core is killed or stopped in mid-run, with `flood` more rows to mirror than training has."""
    outcome = trained(folder, mode=mode, at_fault=lambda child: os.kill(helper_of(child), number), flood=flood)
    check(outcome)
    return outcome


def signalled_helper_online(folder: Path, number: int) -> Outcome:
    """The same, with a server."""
    with serving() as (_, environment):
        outcome = trained(folder, environment=environment, at_fault=lambda child: os.kill(helper_of(child), number))
    check(outcome)
    return outcome


def full_disk(folder: Path) -> Outcome:
    """WANDB_DIR is on a small disk that fills up in mid-run (needs root, to mount it)."""
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk]).returncode:
        raise Skipped("needs the right to mount a tmpfs")

    def fill(_process: object) -> None:
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(2**20)):
                pass

    try:
        outcome = trained(folder, mode="offline", environment={"WANDB_DIR": str(disk)}, at_fault=fill)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    check(outcome)
    assert "MiB are left on the disk" in outcome.said
    return outcome


def unwritable(folder: Path) -> Outcome:
    """WANDB_DIR cannot be made: below a file."""
    (folder / "file").write_text("")
    outcome = trained(folder, mode="offline", environment={"WANDB_DIR": str(folder / "file" / "wandb")})
    check(outcome)
    return outcome


def raising(folder: Path, call: str, error: str = "ConnectionResetError") -> Outcome:
    """W&B raises at one of its calls."""
    changes = ("tracking.pictures=true",) if call == "Image" else ()
    outcome = trained(folder, *changes, mode="offline", raising=call, error=error)
    check(outcome, *changes)
    return outcome


def killed_training(folder: Path) -> Outcome:
    """kill -9 of training while W&B is online: the next start continues the same W&B run, from the last step."""
    with serving() as (server, environment):
        killed = trained(folder, "saving.steps=1", environment=environment, at_fault=lambda child: child.kill())
        assert killed.code == -signal.SIGKILL, killed
        before = [row["step"] for row in history(killed.run)]
        assert before == list(range(1, FAULT_STEP + 1))
        outcome = trained(folder, "saving.steps=1", environment=environment)
        runs = {name: [row.get("step") for row in run["rows"]] for name, run in server.runs.items()}
    check(outcome, warning=None)
    # The row of a step is written before its checkpoint is.
    assert f"at step {FAULT_STEP - 1} of" in outcome.said, outcome.said
    (steps,) = runs.values()
    assert list(runs) == [(outcome.run / "run_id.txt").read_text().strip()], runs
    assert steps[-1] == len(history(outcome.run)), steps
    assert sorted(set(steps)) == sorted(steps), f"rows that W&B got twice: {steps}"
    return outcome


BROKEN_INSTALLS = {
    "install missing": "raise ImportError('no wandb')",
    "install empty": "",
    "install rubbish": "this is not Python",
    "install exits": "raise SystemExit(3)",
    "install interrupts": "raise KeyboardInterrupt",
    "install broken": "def __getattr__(name): raise OSError('libwandb.so: file too short')",
}
CALLS = ("setup", "init", "define_metric", "log", "Image", "finish")

FAULTS: dict[str, Callable[[Path], Outcome]] = {
    **{name: partial(no_install, content=content) for name, content in BROKEN_INSTALLS.items()},
    "logged out": logged_out,
    "bad key": bad_key,
    "refused key": refused_key,
    "connection refused": partial(unreachable, answers=False),
    "black hole": partial(unreachable, answers=True),
    "server dies": dying_server,
    "server answers 500": partial(broken_server, status=500),
    "server answers 500 from the start": partial(broken_server, at_start=True, status=500),
    "server slow": partial(broken_server, delay=3.0),
    "server slow from the start": partial(broken_server, at_start=True, delay=1.5),
    "server talks rubbish": partial(broken_server, rubbish=b"<html>\xff\x00 sign in"),
    "server talks rubbish from the start": partial(broken_server, at_start=True, rubbish=b"<html>\xff\x00 sign in"),
    "helper killed": partial(signalled_helper, number=signal.SIGKILL),
    "helper killed online": partial(signalled_helper_online, number=signal.SIGKILL),
    "helper stopped": partial(signalled_helper, number=signal.SIGSTOP),
    "helper stopped online": partial(signalled_helper_online, number=signal.SIGSTOP),
    "helper stopped under many rows": partial(signalled_helper, number=signal.SIGSTOP, flood=2 * MAX_WAITING),
    "disk full": full_disk,
    "folder unwritable": unwritable,
    "training killed": killed_training,
    **{f"{call} raises": partial(raising, call=call) for call in CALLS},
    **{f"{call} exits": partial(raising, call=call, error="SystemExit") for call in CALLS},
}
