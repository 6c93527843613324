"""Images to patch tokens and back, in the order that MAE's pixel targets use."""

from __future__ import annotations

import torch
from einops import rearrange


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images into tokens of `patch_size` x `patch_size` pixels.

    Args:
        images: `[N, C, H, W]`, any dtype; H and W may differ.
        patch_size: side of a patch in pixels.

    Returns:
        `[N, L, patch_size * patch_size * C]`; patches run row by row, and within one the order is row, column, channel.

    Raises:
        ValueError: if H or W is not a multiple of `patch_size`.

    Source: MAE (arXiv 2111.06377), pixel targets; order p, q, c of the official code.
    """
    check_divisible(images, patch_size)
    return rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int, channels: int) -> torch.Tensor:
    """Put the tokens of `patchify` back together.

    Args:
        tokens: `[N, rows * columns, patch_size * patch_size * channels]`, any dtype.
        grid: (rows, columns) of patches.
        patch_size: side of a patch in pixels.
        channels: channels of the images.

    Returns:
        `[N, channels, rows * patch_size, columns * patch_size]`.

    Raises:
        ValueError: if the tokens are not of that number or that length.
    """
    rows, columns = grid
    expected = (rows * columns, patch_size * patch_size * channels)
    if tuple(tokens.shape[1:]) != expected:
        raise ValueError(
            f"tokens of shape {list(tokens.shape)} do not make {rows}x{columns} patches of {patch_size} px with "
            f"{channels} channels, which need [N, {expected[0]}, {expected[1]}]: check grid, patch_size and channels"
        )
    return rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", h=rows, w=columns, p=patch_size, q=patch_size)


def check_divisible(images: torch.Tensor, side: int, parts: str = "patches") -> None:
    """Raise ValueError unless images are `[N, C, H, W]` with H and W multiples of `side`, which makes `parts`."""
    if images.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], got {list(images.shape)}: add or merge axes")
    height, width = images.shape[-2:]
    if height % side or width % side:
        near = [max(side, length // side * side) for length in (height, width)]
        raise ValueError(
            f"images of {height}x{width} do not divide into {parts} of {side} px: "
            f"resize or crop them, for example to {near[0]}x{near[1]}"
        )
