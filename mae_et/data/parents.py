"""Processes that do not outlive the one that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def when_parent_dies(number: int) -> None:
    """Have the system send this process a signal when the one that started it dies, however that ends.

    Linux alone has such a thing; elsewhere nothing happens. The setting is not inherited.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os.kill(os.getpid(), number)  # it died before the system was told
    if parent is not None and parent.pid != os.getppid():
        # To the system, a fork server's child is the server's, which lives on.
        threading.Thread(target=_follow, args=(parent, number), daemon=True).start()


def _follow(parent: Any, number: int) -> None:
    parent.join()
    os.kill(os.getpid(), number)
