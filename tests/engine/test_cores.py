"""The cores that a process may use, and its part of them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from mae_et.engine import cores
from mae_et.engine.distributed import Ranks
from mae_et.running import choose_workers


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_cores_that_are_another_jobs_do_not_count():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert cores.usable_cores() == len(allowed)


@pytest.mark.parametrize(
    ("usable", "machine", "gpus", "started", "workers"),
    [
        (64, 64, 8, None, 7),  # one of eight GPUs
        (64, 64, 8, 8, 7),
        (8, 64, 8, None, 7),  # SLURM has bound the process to its part already
        (4, 64, 1, None, 3),  # a container
        (16, 128, 4, 4, 3),  # torchrun in one
        (64, 64, 1, None, 16),
        (1, 64, 1, None, 1),
    ],
)
def test_a_process_on_a_gpu_has_a_worker_for_each_spare_core(monkeypatch, usable, machine, gpus, started, workers):
    monkeypatch.setattr(cores, "usable_cores", lambda: usable)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: machine)
    monkeypatch.setattr(cores.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(started))
    config = SimpleNamespace(data=SimpleNamespace(workers=None))
    assert choose_workers(config, Ranks(0, 1, torch.device("cuda", 0))) == workers
