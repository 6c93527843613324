"""Low-frequency views of an image: the exact Fourier crop of EfficientTrain++, and the resizes that stand in for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Phase = Literal["centred", "pixel0"]
Method = Literal["fourier", "fourier_pixel0", "lanczos", "bicubic", "bilinear", "nearest"]

PHASES = ("centred", "pixel0")
METHODS = ("fourier", "fourier_pixel0", "lanczos", "bicubic", "bilinear", "nearest")


def low_frequency_crop(images: torch.Tensor, size: int | tuple[int, int], phase: Phase = "centred") -> torch.Tensor:
    """Keep the lowest `size` spatial frequencies of each axis and return them as a smaller image.

    The crop of the centre of the spectrum is linear and separable, so it is done as two small real matrices, one on
    the columns and one on the rows, and no transform is taken. It is not clamped: it rings a little past the input's
    range, as the Fourier crop does.

    Frequencies: an axis of n samples keeps k = -n/2 .. n/2-1 when n is even, -(n-1)/2 .. (n-1)/2 when odd. An even n
    therefore keeps k = -n/2 without its mirror +n/2, which makes the result complex; its real part is returned. Along
    one axis that turns exp(-i*t) into cos(t), the same as sharing the frequency between -n/2 and +n/2. Where both
    axes are even, the frequencies unpaired in both become cos(t + s) and not cos(t)*cos(s): a checkerboard of one
    number per image and channel, which this function includes.

    Phases: with "pixel0", output sample m of n lies at m*N/n of the N input samples, as in the authors' first code.
    With "centred" it lies at (m + 1/2)*N/n - 1/2, where every image resize puts it: the spectrum is multiplied by
    exp(2*pi*i*k*shift/N), shift = (N/n - 1)/2, before the same real part is taken, the unpaired frequency included.

    Args:
        images: `[N, C, H, W]`; uint8 is scaled to 0..1, floating point is used as it is.
        size: side of a square, or (height, width) in pixels; odd, even and non-square sizes are all valid.
        phase: "centred" or "pixel0".

    Returns:
        `[N, C, height, width]`, float64 for float64 images, else float32. On CUDA, `allow_tf32` applies to it.

    Raises:
        ValueError: if `size` exceeds the image, or the shape, the dtype or the phase is not one of the above.

    Source: EfficientTrain++ (arXiv 2405.08768), Proposition 1 and Appendix C; real part and kept frequencies as in
    the authors' first release.
    """
    height, width = _checked_size(images, size)
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: choose one of {', '.join(PHASES)}")
    values = images if images.dtype == torch.float64 else images.float()
    if (height, width) != tuple(images.shape[-2:]):
        rows, row_signs = _axis(images.shape[-2], height, phase, values.device, values.dtype)
        columns, column_signs = _axis(images.shape[-1], width, phase, values.device, values.dtype)
        with torch.autocast(values.device.type, enabled=False):
            product = rows @ (values @ columns.T)
            checkerboard = product[..., -1:, -1:] * row_signs[:, None]
            values = torch.addcmul(product[..., :-1, :-1], checkerboard, column_signs, value=-1)
    return values / 255 if images.dtype == torch.uint8 else values


def downsample(images: torch.Tensor, size: int | tuple[int, int], method: Method) -> torch.Tensor:
    """Shrink images to `size` with the named method, for training on one and for comparing them.

    - "fourier", "fourier_pixel0": `low_frequency_crop` with phase "centred" and "pixel0"; uint8 or float, any device.
    - "lanczos": PIL's Lanczos resize of each channel, rounded and clamped to uint8: the step that EfficientTrain++
      published for ViTs. uint8 on the CPU only; slow.
    - "bicubic", "bilinear": antialiased, half-pixel centred, not clamped; uint8 or float, any device.
    - "nearest": the input pixel under the centre of each output pixel; uint8 or float, any device.

    Args:
        images: `[N, C, H, W]`; uint8 is scaled to 0..1, floating point is used as it is.
        size: side of a square, or (height, width) in pixels.
        method: one of the names above.

    Returns:
        `[N, C, height, width]`, float64 for float64 images, else float32.

    Raises:
        ValueError: if `size` exceeds the image, or the method is unknown or does not take such images.
    """
    if method in ("fourier", "fourier_pixel0"):
        return low_frequency_crop(images, size, "centred" if method == "fourier" else "pixel0")
    target = _checked_size(images, size)
    if method == "lanczos":
        return _lanczos(images, target).float() / 255
    values = images if images.dtype == torch.float64 else images.float()
    with torch.autocast(values.device.type, enabled=False):
        if method == "nearest":
            values = F.interpolate(values, target, mode="nearest-exact")
        elif method in ("bicubic", "bilinear"):
            values = F.interpolate(values, target, mode=method, align_corners=False, antialias=True)
        else:
            raise ValueError(f"unknown down-sampling method {method!r}: choose one of {', '.join(METHODS)}")
    return values / 255 if images.dtype == torch.uint8 else values


@torch.compiler.disable()  # traced, the matrices would be rebuilt at every call
@lru_cache(maxsize=64)
def _axis(
    length: int, size: int, phase: Phase, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The crop of one axis: its `[size + 1, length]` matrix, and the `[size]` signs of its imaginary part.

    The complex matrix of the crop is A = R + i * outer(signs, b): only the unpaired frequency of an even size is not
    real, and its imaginary part alternates in sign from one output sample to the next. The rows of R come first and
    b is the last one. Re(A X A'^T) = R X R'^T - outer(signs, signs') * (b X b'), so the product of the two stacked
    matrices with the image holds both terms.
    """
    shift = (length / size - 1) / 2 if phase == "centred" else 0.0
    frequencies = np.arange(-(size // 2), (size + 1) // 2)
    synthesis = np.exp(2j * np.pi / size * np.outer(np.arange(size), frequencies))
    analysis = np.exp(-2j * np.pi / length * np.outer(frequencies, np.arange(length) - shift)) / length
    matrix = synthesis @ analysis
    stacked = torch.from_numpy(np.concatenate([matrix.real, matrix.imag[:1]]))
    signs = torch.from_numpy(1.0 - 2.0 * (np.arange(size) % 2))
    # A tensor made in inference mode could not be used for a gradient later, and this one outlives the call.
    with torch.inference_mode(False):
        return stacked.to(device, dtype, copy=True), signs.to(device, dtype, copy=True)


def _checked_size(images: torch.Tensor, size: int | tuple[int, int]) -> tuple[int, int]:
    """`size` as (height, width), once images and size are known to be valid."""
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}: add or merge axes")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}: convert them first")
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= images.shape[-2] and 1 <= width <= images.shape[-1]):
        raise ValueError(
            f"cannot crop frequencies of {images.shape[-2]}x{images.shape[-1]} images to {height}x{width}: "
            "the size must be at least 1 and at most the image's; give larger images or a smaller size"
        )
    return height, width


def _lanczos(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.dtype != torch.uint8 or images.device.type != "cpu":
        raise ValueError(
            f"'lanczos' takes uint8 images on the CPU, got {images.dtype} on {images.device}: "
            "use 'bicubic' or 'fourier' for others"
        )
    height, width = size
    result = torch.empty((*images.shape[:2], height, width), dtype=torch.uint8)
    for source, target in zip(images.flatten(0, 1), result.flatten(0, 1), strict=True):
        resized = Image.fromarray(source.numpy()).resize((width, height), Image.Resampling.LANCZOS)
        target.copy_(torch.from_numpy(np.array(resized)))
    return result
