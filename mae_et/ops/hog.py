"""Histograms of oriented gradients (HOG) as regression targets, in the form of MaskFeat's released code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange

from mae_et.ops.patches import check_divisible
from mae_et.sizes import hog_cell

# So many pixels at a time keep the intermediate results in a CPU's cache, which is faster for large batches.
CACHE_PIXELS = 2**18


def hog_targets(
    images: torch.Tensor,
    patch_size: int = 16,
    cell: int | None = None,
    bins: int = 9,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """One normalised gradient histogram per cell and channel, gathered by patch: 108 numbers for 16-px RGB patches.

    The histograms of `hog_cells`, each divided by its L2 norm over the bins (by 1e-12 where it is flat). There is no
    normalisation over blocks of cells and no clipping.

    Args:
        images: `[N, C, H, W]` uint8 or floating point, the pixels that the model sees; any C, H and W may differ.
        patch_size: side of a patch in pixels.
        cell: side of a cell in pixels; by default half a patch, and 2 px for 2-px patches.
        bins: directions over half a turn.
        mean, std: per channel; say that floating-point images are 0..1 images normalised so (see `hog_cells`).

    Returns:
        float32 `[N, patches, C * bins * cells]`, cells = k * k with k = patch_size / cell, patches row by row; the
        index in a token is (c * bins + b) * cells + cell_row * k + cell_column. No gradient flows through it.

    Raises:
        ValueError: if H or W is not a multiple of `patch_size`, or `patch_size` of `cell`, or see `hog_cells`.

    Source: MaskFeat (arXiv 2112.09133), section 3.2, and `HOGLayerC` of facebookresearch/SlowFast; used as MAE's target
    in EfficientTrain++ (arXiv 2405.08768), Table 15.
    """
    cell = hog_cell(patch_size, cell)
    check_divisible(images, patch_size)
    histograms = hog_cells(images, cell, bins, mean=mean, std=std)
    # F.normalize is far slower on a CPU: its norm over the bins is not vectorised.
    histograms = histograms / histograms.square().sum(2, keepdim=True).sqrt_().clamp_min_(1e-12)
    cells_per_side = patch_size // cell
    return rearrange(histograms, "n c b (h i) (w j) -> n (h w) (c b i j)", i=cells_per_side, j=cells_per_side)


@torch.no_grad()
def hog_cells(
    images: torch.Tensor,
    cell: int = 8,
    bins: int = 9,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> torch.Tensor:
    """Sum the gradient magnitudes of every cell by direction: one unnormalised histogram per cell and channel.

    Sobel gradients with a reflected border go whole into bin floor(bins * atan2(gx, gy) / pi) mod bins.

    gx == 0 is common in 8-bit images and separates the first bin from the last, so rounding noise there changes
    targets by up to 1. uint8 images are exact. For normalised ones give `mean` and `std`: their integers are recovered
    as round((x * std + mean) * 255), exactly in float32, float16 and bfloat16. Without them floating-point images are
    used unrounded; uint8 images need neither.

    Args:
        images: `[N, C, H, W]` uint8 or floating point.
        cell: side of a cell in pixels.
        bins: directions over half a turn.
        mean, std: per channel, both or neither.

    Returns:
        float32 `[N, C, bins, H / cell, W / cell]`, computed in float32 even under autocast; the same bits for any
        number of threads. No gradient flows through it.

    Raises:
        ValueError: if H or W is not a multiple of `cell`, or `mean` and `std` are not one number per channel each.
    """
    check_divisible(images, cell, "cells")
    # Serial additions win on a CPU; atomic ones on a GPU, and in compiled loops, would not be reproducible.
    on_cpu = images.device.type == "cpu" and not torch.compiler.is_compiling()
    pool = _pool_by_adding if on_cpu else _pool_by_comparing
    parts = images.split(max(1, CACHE_PIXELS // max(1, images[:1].numel()))) if on_cpu else (images,)
    histograms = []
    with torch.autocast(images.device.type, enabled=False):
        for part in parts:
            gx, gy = _sobel(_pixel_values(part, mean, std))
            magnitude = (gx * gx).addcmul_(gy, gy).sqrt_()
            histograms.append(pool(magnitude, _direction_bins(gx, gy, bins), cell, bins))
    return torch.cat(histograms) if len(histograms) > 1 else histograms[0]


def _pixel_values(images: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> torch.Tensor:
    """Images as float32, with their 8-bit values recovered if they are normalised ones."""
    if mean is None and std is None:
        return images.float()
    if mean is None or std is None:
        raise ValueError(f"give both mean and std, or neither: got mean={mean}, std={std}")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"images have {images.shape[1]} channels, mean has {len(mean)} numbers and std {len(std)}: "
            "give one number per channel"
        )
    if images.dtype == torch.uint8:
        return images.float()
    # Python numbers channel by channel: a tensor of them would make the host wait for its copy to a GPU.
    planes = zip(images.float().unbind(1), mean, std, strict=True)
    return torch.stack([plane.mul(255 * s).add_(255 * m) for plane, m, s in planes], dim=1).round_()


def _sobel(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by additions only: a convolution would go through TF32 on a GPU, and is slower on a CPU."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="reflect")
    across = padded[..., :-2] - padded[..., 2:]
    gx = (across[..., :-2, :] + across[..., 2:, :]).add_(across[..., 1:-1, :], alpha=2)
    down = padded[..., :-2, :] - padded[..., 2:, :]
    gy = (down[..., :-2] + down[..., 2:]).add_(down[..., 1:-1], alpha=2)
    return gx, gy


def _direction_bins(gx: torch.Tensor, gy: torch.Tensor, bins: int) -> torch.Tensor:
    """floor(bins * atan2(gx, gy) / pi) mod bins, as whole numbers, by comparing cotangents.

    gy / gx falls as the angle grows and repeats after half a turn. One correctly rounded division tells all gradients
    of 8-bit images from the bin edges; atan2 in float32 does not (with 4 bins it takes 1 in 4000 wrongly). Up to 18
    bins no such ratio but +-1 itself is nearer to an edge than 14 units of its last place, so that the division of
    compiled code on a GPU, which errs by 2, will do.
    """
    # gx == 0 gives +-inf, or nan where the magnitude is 0 too: all of it belongs to bin 0.
    cotangent = (gy / gx).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf)
    # Short integers move least memory; PyTorch's CPU kernels compare faster into floats.
    index = torch.zeros_like(cotangent, dtype=None if gx.device.type == "cpu" else torch.int16)
    passed = torch.empty_like(index)
    for edge in range(1, bins):
        angle = math.pi * edge / bins
        limit = math.cos(angle) / math.sin(angle)
        # Diagonal gradients lie on the edges at 45 and 135 degrees; the next ratio is 1e-3 away.
        limit += 1e-5 if abs(abs(limit) - 1) < 1e-9 else 0.0
        index += torch.le(cotangent, limit, out=passed)
    return index


def _pool_by_adding(magnitude: torch.Tensor, index: torch.Tensor, cell: int, bins: int) -> torch.Tensor:
    """Add each magnitude into its cell's bin: one pass over the pixels, in their order."""
    n, channels, height, width = magnitude.shape
    rows, columns = height // cell, width // cell
    row = torch.arange(height, device=magnitude.device).div_(cell, rounding_mode="floor")
    column = torch.arange(width, device=magnitude.device).div_(cell, rounding_mode="floor")
    cells = (row[:, None] * columns + column).int()
    position = index.int().mul_(rows * columns).add_(cells).long()
    sums = magnitude.new_zeros(n * channels, bins * rows * columns)
    pixels = (n * channels, height * width)
    sums.scatter_add_(1, position.reshape(pixels), magnitude.reshape(pixels))
    return sums.view(n, channels, bins, rows, columns)


def _pool_by_comparing(magnitude: torch.Tensor, index: torch.Tensor, cell: int, bins: int) -> torch.Tensor:
    """Sum the magnitudes of one bin at a time: nothing is written twice, so nothing depends on timing."""
    # A cell's pixels go first, so that the sums run over the slowest axis, which is the fast way for CPUs and GPUs.
    pattern = "n c (h i) (w j) -> (i j) n c h w"
    magnitude = rearrange(magnitude, pattern, i=cell, j=cell)
    index = rearrange(index, pattern, i=cell, j=cell)
    return torch.stack([(magnitude * (index == b)).sum(0) for b in range(bins)], dim=2)
