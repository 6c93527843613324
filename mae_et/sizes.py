"""Model sizes in plain numbers, for models and for plans that must not load torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

TargetKind = Literal["hog", "pixel", "norm_pixel"]


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


def default_cell(patch_size: int) -> int:
    """HOG cell in px: half a patch, and the whole of a 2-px one, whose half would hold a single gradient."""
    return patch_size if patch_size == 2 else patch_size // 2


def target_values(kind: TargetKind, patch_size: int, channels: int, cell: int, bins: int) -> int:
    """Values per patch: C * p^2 for pixels, C * bins * (p / cell)^2 for HOG (108 for RGB, 16-px patches, 8-px cells).

    Raises:
        ValueError: unknown kind of target.
    """
    if kind not in get_args(TargetKind):
        raise ValueError(f"unknown target {kind!r}; known: {', '.join(get_args(TargetKind))}")
    return channels * (bins * (patch_size // cell) ** 2 if kind == "hog" else patch_size**2)
