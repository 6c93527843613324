"""Forked children, for tests of what a kill leaves behind."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds until a stuck child is ended; a busy machine may need many


def start_child(body: Callable[[], Any]) -> int:
    """Forks a child that runs `body` and leaves without returning to pytest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python >= 3.12 warns of fork beside threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def wait_child(pid: int) -> int:
    """Exit code of the child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def mount_tmpfs(folder: Path, size: int) -> bool:
    """Mount a small disk that this process and its children see, and that goes away with them.

    Returns:
        Whether this machine allows it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private_recursive = 0x20000, (1 << 18) | (1 << 14)  # CLONE_NEWNS; MS_PRIVATE | MS_REC
    failed = (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, private_recursive, None)
        or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode())
    )
    return not failed
