"""What compiled blocks meet before the first step."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mae_et.config import PretrainConfig, load_config
from mae_et.engine import warmup
from mae_et.engine.distributed import Ranks
from mae_et.planning import build_plan


@pytest.mark.parametrize("done", [0, 5, 9])
def test_a_run_that_goes_on_compiles_in_the_order_in_which_it_began(monkeypatch, done):
    stages = "curriculum.stages=[{end: 0.5, bandwidth: 96}, {end: 1, bandwidth: 224}]"
    plan = build_plan(load_config(None, [stages, "optim.batch=8", "optim.accumulation=1"], PretrainConfig), 64)
    met: list[tuple[int, int]] = []
    monkeypatch.setattr(warmup, "micro_step", lambda _state, _batch, now, *_: met.append(now.bandwidth))
    device = torch.device("cpu")
    state: Any = SimpleNamespace(
        step=min(done * plan.total_steps // 10, plan.total_steps - 1),
        device=device,
        statistics=[],
        network=SimpleNamespace(train=nullcontext),
        optimizer=SimpleNamespace(zero_grad=lambda **_: None),
    )
    dataset: Any = SimpleNamespace(__getitems__=lambda requests: None)
    task: Any = None
    warmup.warm_up(state, plan, task, dataset, Ranks(0, 1, device), seed=0, accumulation=1)
    assert met == [(96, 96), (224, 224)]
