"""Which processes a trial has left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

MARK = "MAE_ET_TORTURE"


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose parents die, so that it can reap them (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def left_behind(session: int, mark: str) -> dict[int, str]:
    """Living processes of a trial, with their command lines.

    Forked ones are found by their session, and those in sessions of their own (torchrun's workers, W&B's service) by
    the mark in the environment that they were started with.
    """
    wanted, found = f"{MARK}={mark}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            # After the command in brackets: state, parent, group, session.
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state in "ZX" or pid == os.getpid():
                continue
            if int(owner) == session or wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[pid] = command.strip()[:100]
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def end_all(pids: dict[int, str]) -> None:
    """Kill what a trial left, each by its number."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
