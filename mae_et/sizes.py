"""Model sizes in plain numbers, for models and for plans that must not load torch."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Literal, NamedTuple, get_args

TargetKind = Literal["hog", "pixel", "norm_pixel"]
DecoderKind = Literal["mae", "crossmae"]


class EncoderSize(NamedTuple):
    """Width, depth and attention heads of a vision transformer."""

    width: int
    depth: int
    heads: int


ENCODER_SIZES = {
    "vit_tiny": EncoderSize(192, 12, 3),
    "vit_small": EncoderSize(384, 12, 6),
    "vit_base": EncoderSize(768, 12, 12),
    "vit_large": EncoderSize(1024, 24, 16),
    "vit_huge": EncoderSize(1280, 32, 16),
}


def hog_cell(patch_size: int, cell: int | None = None) -> int:
    """HOG cell in px: the given one, or half a patch, or the whole of a 2-px one, whose half holds a single gradient.

    Raises:
        ValueError: the cell does not divide the patch.
    """
    if cell is None:
        cell = 2 if patch_size == 2 else patch_size // 2
    if cell < 1 or patch_size % cell:
        raise ValueError(
            f"patch_size {patch_size} is not a multiple of cell {cell}: give a `cell` that divides the patch"
        )
    return cell


def target_values(kind: TargetKind, patch_size: int, channels: int, cell: int | None = None, bins: int = 9) -> int:
    """Values per patch: C * p^2 for pixels, C * bins * (p / cell)^2 for HOG (108 for RGB, 16-px patches, 8-px cells).

    Raises:
        ValueError: unknown kind of target, or a HOG cell that does not divide the patch.
    """
    if kind not in get_args(TargetKind):
        raise ValueError(f"unknown target {kind!r}; known: {', '.join(get_args(TargetKind))}")
    if kind == "hog":
        return channels * bins * (patch_size // hog_cell(patch_size, cell)) ** 2
    return channels * patch_size**2


def predicted_patches(tokens: int, visible: int, prediction_ratio: float | None = None) -> int:
    """How many masked patches of an image are predicted: ceil(tokens * prediction_ratio), no more than are masked.

    The ratio is CrossMAE's (arXiv 2401.14391), of all patches: its 0.25 is 49 of 196, a third of those that a mask
    ratio of 0.75 hides. Rounded up as in its released code, in exact arithmetic.

    Args:
        tokens, visible: patches of the image, and those that the encoder sees.
        prediction_ratio: in (0, 1]; None predicts all that are masked.
    """
    masked = tokens - visible
    return masked if prediction_ratio is None else min(masked, ceil(tokens * Fraction(str(prediction_ratio))))
