"""How fast the device multiplies matrices: what a step's rate is a share of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from mae_et.bench.report import Product
from mae_et.engine.precision import DTYPES
from mae_et.rehearsal import timed

SQUARES = (1024, 2048, 4096)
GPU_SQUARES = (8192, 16384)  # smaller ones do not fill it

VIT = ((768, 3072), (3072, 768))
"""k x n of ViT-B's MLP; m are the 196 patches of so many images:"""

VIT_ROWS, GPU_VIT_ROWS = 16 * 196, 256 * 196

SAMPLES = 5
SAMPLE_SECONDS = 0.05
"""Of a sample, at least: of many products in a row where they are short."""


def products(device: torch.device) -> list[tuple[int, int, int]]:
    """Shapes (m, k, n) that are tried, the cheapest first."""
    on_gpu = device.type == "cuda"
    sides, rows = (SQUARES + GPU_SQUARES, GPU_VIT_ROWS) if on_gpu else (SQUARES, VIT_ROWS)
    return sorted(
        [*((side, side, side) for side in sides), *((rows, *shape) for shape in VIT)],
        key=lambda shape: shape[0] * shape[1] * shape[2],
    )


def measure_products(
    shapes: Sequence[tuple[int, int, int]], precision: str, device: torch.device, seconds: float
) -> dict[tuple[int, int, int], float]:
    """FLOP/s of each product: medians over samples after a warm-up, of the slowest rank.

    They are `F.linear`, as in networks. One that takes too long for its share of the seconds is left out, but for the
    first.

    Args:
        shapes: (m, k, n), the cheapest first.
        precision: "bf16", "fp16" or "fp32".
        device: of the products.
        seconds: for all of them.
    """
    found: dict[tuple[int, int, int], float] = {}
    for m, k, n in shapes:
        flops, share = 2.0 * m * k * n, seconds / len(shapes)
        if found and flops / max(found.values()) > share / SAMPLES:
            continue
        left = torch.randn(m, k, device=device).to(DTYPES.get(precision, torch.float32))
        right = torch.randn(n, k, device=device).to(left.dtype)

        def product(left: torch.Tensor = left, right: torch.Tensor = right) -> torch.Tensor:
            return F.linear(left, right)

        timed(product, 2, device, share)  # chooses and loads its kernel
        once = timed(product, 3, device, share / SAMPLES)
        count = max(1, round(max(SAMPLE_SECONDS, share / (2 * SAMPLES)) / once))
        samples = [timed(product, count, device, share / SAMPLES) for _ in range(SAMPLES)]
        found[m, k, n] = flops / statistics.median(samples)
    return found


def ranking(turns: Sequence[dict[tuple[int, int, int], float]]) -> tuple[Product, ...]:
    """Products at their best turn, the fastest last."""
    shapes = {shape: max(turn.get(shape, 0.0) for turn in turns) for turn in turns for shape in turn}
    return tuple(Product(shape, rate) for shape, rate in sorted(shapes.items(), key=lambda item: item[1]))


def copy_rate(device: torch.device, seconds: float) -> float | None:
    """Bytes a second from pinned memory to a GPU; None on other devices."""
    if device.type != "cuda":
        return None
    data = torch.empty(1 << 26, dtype=torch.uint8).pin_memory()
    return data.numel() / min(timed(lambda: data.to(device, non_blocking=True), 8, device, seconds) for _ in range(3))
