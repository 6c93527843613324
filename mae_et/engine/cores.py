"""How many of the machine's cores are there for a process."""

from __future__ import annotations

import os

import torch


def usable_cores() -> int:
    """Cores that this process may use: SLURM, containers and `taskset` may leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_cores() -> int:
    """This process's part of them, at least 1: those that torchrun has started on a machine share them."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def gpu_cores() -> int:
    """The same, and no more than a GPU's part of the machine: there may be processes for the others."""
    return min(process_cores(), max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count())))
