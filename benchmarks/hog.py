"""Our HOG targets against the form of MaskFeat's released layer: `python benchmarks/hog.py`."""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timing import medians, report

from mae_et import hog_targets

# images, channels, px, patch: ImageNet at the paper's sizes, and the demo.
CASES = [(64, 3, 96, 16), (64, 3, 160, 16), (64, 3, 224, 16), (256, 1, 28, 2)]


def as_convolution(images: torch.Tensor, patch_size: int, bins: int = 9) -> torch.Tensor:
    """Sobel as a convolution, angles by atan2, one-hot magnitudes, pooled by summing."""
    cell = 2 if patch_size == 2 else patch_size // 2
    pixels = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    channels = images.shape[1]
    kernels = torch.stack([kernel, kernel.T])[:, None].repeat(channels, 1, 1, 1)
    gradients = F.conv2d(pixels, kernels, groups=channels)
    gx, gy = gradients[:, 0::2], gradients[:, 1::2]
    index = (torch.atan2(gx, gy) * bins / math.pi).floor().long() % bins
    spread = F.one_hot(index, bins) * torch.hypot(gx, gy)[..., None]
    cells = rearrange(spread, "n c (h i) (w j) b -> n c b h w i j", i=cell, j=cell).sum((-2, -1))
    k = patch_size // cell
    return rearrange(F.normalize(cells, dim=2), "n c b (h i) (w j) -> n (h w) (c b i j)", i=k, j=k)


def main() -> None:
    """Compare over sizes; the first of the two is the unit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for count, channels, side, patch_size in CASES:
        images = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8)
        rivals = {
            "ours": partial(hog_targets, images, patch_size),
            "convolution and one-hot": partial(as_convolution, images, patch_size),
        }
        report(f"[{count}, {channels}, {side}, {side}], patch {patch_size}", medians(rivals, rounds=5))


if __name__ == "__main__":
    main()
