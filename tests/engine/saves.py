"""Checkpoints of a tiny run, and whether they come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_et.engine.checkpoint import latest_checkpoint, save_checkpoint


def content(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a tiny run saves at a step; every value depends on the step."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 6, generator=generator)
    tensors = {
        "model": {"blocks.0.weight": weight, "norm.bias": weight[0].clone()},
        "optimizer": {"blocks.0.weight.exp_avg": weight * 1e-3, "norm.bias.step": torch.tensor(float(step))},
    }
    return tensors, {"samples_seen": step * 64, "sampler": {"seed": 1, "position": [step, 0]}, "run_id": "a1"}


def save(folder: Path, step: int, keep: int = 3, seed: int | None = None) -> Path:
    return save_checkpoint(folder, step, *content(step if seed is None else seed), keep=keep)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


def assert_loads(folder: Path, step: int, seed: int | None = None, warn: Callable[[str], None] | None = None):
    found = latest_checkpoint(folder, warn or pytest.fail)
    assert found is not None
    tensors, state = content(step if seed is None else seed)
    assert (found.step, found.state) == (step, state)
    assert found.tensors.keys() == tensors.keys()
    for group, expected in tensors.items():
        assert_same_bits(found.tensors[group], expected)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
