"""Random masks by count, from a seed per sample."""

from __future__ import annotations

import torch
from torch import Tensor

# Multipliers of the splitmix64 generator (Steele, Lea, Flood 2014), as signed 64-bit numbers. Integer products wrap
# around in two's complement on CPU and GPU alike, so that a mask has the same bits on every device.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own shifts copies of the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mask_noise(seeds: Tensor, tokens: int) -> Tensor:
    """Random sort keys for every patch of every sample, a pure function of the sample's seed.

    One splitmix64 stream per sample. Neither the rank, the worker nor the device changes a bit of it.

    Args:
        seeds: int64 [N].
        tokens: patches per sample.

    Returns:
        int64 [N, tokens], uniform over the 64-bit integers.
    """
    counter = torch.arange(1, tokens + 1, dtype=torch.int64, device=seeds.device)
    x = seeds[:, None] + counter * GOLDEN_GAMMA
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)


def split_by_noise(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Which patches stay visible and which are masked: those with the lowest noise stay (MAE, section 3).

    Args:
        noise: [N, L], any sortable dtype; ties go to the earlier patch.
        visible: patches to keep per sample.

    Returns:
        int64 ids [N, visible] and [N, L - visible], each in order of rising noise.
    """
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, :visible], order[:, visible:]


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [N, L, D] (or [1, L, D], shared) at ids [N, K]: [N, K, D]."""
    batch, width = ids.shape[0], tokens.shape[-1]
    return tokens.expand(batch, -1, -1).gather(1, ids[:, :, None].expand(-1, -1, width))
