"""Private handles of wandb 0.31, each missed without harm where another version keeps it elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any


def helper_process(library: Any) -> subprocess.Popen[bytes] | None:
    """W&B's helper process, from what `wandb.setup` returns."""
    for name in ("_connection", "_proc", "_process"):
        library = getattr(library, name, None)
    return library if isinstance(library, subprocess.Popen) else None


def kill_helper(helper: subprocess.Popen[bytes] | None) -> None:
    """End it at once, if there is one and it lives."""
    if helper is not None and helper.poll() is None:
        with suppress(OSError):
            # It leads a group of its own, with the process that watches the machine.
            if os.getpgid(helper.pid) == helper.pid:
                os.killpg(helper.pid, signal.SIGKILL)
        helper.kill()


def stop_polling(run: Any) -> None:
    """Stop what asks the helper for news of an online run: its thread dies with a traceback once the helper is gone."""
    checker = getattr(run, "_run_status_checker", None)
    if checker is not None:
        checker.stop()
