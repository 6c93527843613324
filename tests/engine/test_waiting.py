"""The step never asks the device for a number: on a GPU the host would wait for all that it has queued."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mae_et.config import PretrainConfig
from mae_et.data.loader import Batch
from mae_et.engine.distributed import Ranks
from mae_et.engine.step import train_step
from mae_et.engine.tasks import Reconstruction
from mae_et.planning import build_plan
from mae_et.pretraining import build_state
from mae_et.running import downsample_on_device

aten = torch.ops.aten
# What needs a value, or a size that depends on values, on the host.
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.is_nonzero)


class Watch(TorchDispatchMode):
    """Notes every operation that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func.overloadpacket in WAITS:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


def watch_step(changes: dict[str, dict[str, object]], accumulation: int = 1) -> Watch:
    config = PretrainConfig()
    config.data.size, config.data.channels, config.data.mean, config.data.std = 32, 3, None, None
    for section, values in {"model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 4}, **changes}.items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    config.model.decoder_width, config.model.decoder_depth, config.model.decoder_heads = 16, 1, 2
    plan = build_plan(config, images=10_000)
    state = build_state(config, Ranks(0, 1, torch.device("cpu")))
    task = Reconstruction(downsample_on_device(config.data.downsample))
    now = plan.at(0)
    size = (32, 32) if config.data.downsample.startswith("fourier") else now.bandwidth

    def batches():
        while True:
            images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)
            yield Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.arange(4))

    train_step(state, batches(), now, task, accumulation, config.optim.clip)  # fills what is made once
    with Watch() as watch:
        train_step(state, batches(), now, task, accumulation, config.optim.clip)
    return watch


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": {"kind": "norm_pixel"}},
        {"optim": {"clip": 1.0}},
        {"data": {"downsample": "fourier"}},
        {"engine": {"precision": "fp32"}},
    ],
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_of_pretraining_waits_for_nothing(changes, accumulation):
    watch = watch_step(changes, accumulation)
    assert watch.calls > 300
    assert not watch.waits


def test_a_wait_would_be_seen(monkeypatch):
    whole = Reconstruction.loss

    def curious(*arguments):
        loss = whole(*arguments)
        return loss if loss > 0 else -loss

    monkeypatch.setattr(Reconstruction, "loss", curious)
    assert watch_step({}).waits == ["aten._local_scalar_dense.default"]
