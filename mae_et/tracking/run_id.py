"""The id of a run, by which W&B and downstream runs know it."""

from __future__ import annotations

import os
import re
import secrets
import string
from pathlib import Path

RUN_ID_FILE = "run_id.txt"
_LONGEST_ID = 128  # W&B takes no longer ones


def run_id_of(folder: Path) -> str:
    """The run's id: the one kept in its folder, else WANDB_RUN_ID, else new.

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
