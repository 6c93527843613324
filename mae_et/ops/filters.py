"""Ideal low-pass and high-pass filters of an image: the size stays, and frequencies beyond a circle go."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def low_pass(images: Tensor, radius: float) -> Tensor:
    """Keep the frequencies within a circle around zero, the mean of each channel among them.

    Frequencies are counted in cycles over the shorter side, so that the circle is one in cycles per pixel, too: an
    axis of n samples has k = -(n // 2) .. (n - 1) // 2 cycles over itself, and frequency (ky, kx) of a `[H, W]` image
    is kept where (ky / H)^2 + (kx / W)^2 <= (radius / min(H, W))^2. On a square image, that is cycles per image. A
    radius of min(H, W) / 2 leaves out only what is finer than a pixel along the diagonals; at 0.71 * min(H, W) the
    image is whole. The result is not clamped: it rings past the input's range.

    Args:
        images: `[N, C, H, W]` (any leading axes); uint8 is scaled to 0..1, floating point is used as it is.
        radius: cycles over the shorter side, 0 or more.

    Returns:
        The shape of `images`; float64 for float64 images, else float32, also under autocast.

    Raises:
        ValueError: a radius that is negative or not a number, or a dtype that is neither uint8 nor floating point.

    Source: the circular filter of EfficientTrain (arXiv 2211.09703) and EfficientTrain++ (arXiv 2405.08768, Table 2).
    """
    if not radius >= 0:
        raise ValueError(f"the radius of a filter is {radius}: it must be 0 or more cycles per image")
    values = _as_floating(images)
    height, width = values.shape[-2:]
    kept = _disc(height, width, float(radius), values.device, values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return torch.fft.irfft2(torch.fft.rfft2(values) * kept, s=(height, width))


def high_pass(images: Tensor, radius: float) -> Tensor:
    """What `low_pass` takes away: with it, the images are whole again.

    The mean of every channel is 0, and half of the values are negative: to look at it, or to show it to a network of
    natural images, add a grey (0.5, or the mean that the network's normalisation subtracts).

    Args, Returns, Raises: as `low_pass`.
    """
    return _as_floating(images) - low_pass(images, radius)


def _as_floating(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}: convert them first")
    return images if images.dtype == torch.float64 else images.float()


@torch.compiler.disable()  # traced, the disc would be rebuilt at every call
@lru_cache(maxsize=64)
def _disc(height: int, width: int, radius: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1 within the circle and 0 beyond, `[H, W // 2 + 1]` as `rfft2` lays frequencies out."""
    # Times H and W, so that only whole numbers are compared.
    limit = math.inf if radius == math.inf else (radius * max(height, width)) ** 2
    # A tensor made in inference mode could not be used for a gradient later, and this one outlives the call.
    with torch.inference_mode(False):
        rows = torch.arange(height, dtype=torch.float64)
        rows = torch.minimum(rows, height - rows) * width
        columns = torch.arange(width // 2 + 1, dtype=torch.float64) * height
        return (rows[:, None] ** 2 + columns**2 <= limit).to(device, dtype)
