"""The faults of W&B in groups, one row of the table each; a trial's seed chooses among a group's faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.torture.wandb_faults import FAULTS

PREFIXES = {
    "wandb_install": ("install",),
    "wandb_keys": ("logged out", "bad key", "refused key"),
    "wandb_server": ("connection", "black hole", "server"),
    "wandb_helper": ("helper",),
    "wandb_disk": ("disk", "folder"),
    "wandb_killed": ("training killed",),
}
REST = "wandb_calls"


def group_of(fault: str) -> str:
    return next((group for group, prefixes in PREFIXES.items() if fault.startswith(prefixes)), REST)


def one_of(faults: Sequence[str], folder: Path, seed: int) -> None:
    fault = faults[seed % len(faults)]
    try:
        FAULTS[fault](folder)
    except AssertionError as error:
        raise AssertionError(f"{fault}: {error}") from error


GROUPS = {group: [name for name in FAULTS if group_of(name) == group] for group in (*PREFIXES, REST)}
TRIALS: dict[str, Callable[[Path, int], None]] = {
    group: partial(one_of, faults) for group, faults in GROUPS.items() if faults
}
