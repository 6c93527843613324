"""torch's fused attention against plain matrix products, forward and backward: `python benchmarks/attention.py`.

What `mae_et.engine.precision.choose_attention` rests on.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from timing import medians, report

# sequences, heads, tokens, width of a head: the demo's encoder and decoder, then a ViT-B's.
SHAPES = [(256, 3, 10, 32), (256, 3, 26, 32), (256, 3, 50, 32), (256, 2, 101, 32), (256, 2, 197, 32)]
SHAPES += [(32, 12, 50, 64), (32, 16, 197, 32)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as timm computes it without the fused kernel."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


def forward_backward(attention, q, k, v) -> None:
    """One pass and its gradients."""
    attention(q, k, v).sum().backward()


def main() -> None:
    """Compare over shapes and types."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            qkv = [torch.randn(shape, dtype=dtype, device=options.device, requires_grad=True) for _ in range(3)]
            rivals = {
                "fused": partial(forward_backward, F.scaled_dot_product_attention, *qkv),
                "plain": partial(forward_backward, plain, *qkv),
            }
            report(f"{str(dtype).removeprefix('torch.')} {shape}", medians(rivals))


if __name__ == "__main__":
    main()
