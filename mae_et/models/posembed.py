"""Fixed sin-cos position embeddings, built for each patch grid."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

PositionKind = Literal["from_final", "native", "interp"]


def sincos(coordinates: Tensor, width: int) -> Tensor:
    """[sin | cos] of float64 coordinates [L] at MAE's frequencies 10000^(-k / (width/2)): [L, width]."""
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(coordinates, frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(
    grid: tuple[int, int], width: int, final_grid: tuple[int, int] | None = None, kind: PositionKind = "from_final"
) -> Tensor:
    """Position embeddings of a class token and a grid of patches, as MAE lays them out.

    The first half of the channels encodes the column, the second the row; the class token's row is zero
    (facebookresearch/mae, issue 18, on the order). At `grid == final_grid` all kinds are MAE's own embedding.

    Args:
        grid: (rows, columns) of patches.
        width: channels, a multiple of 4.
        final_grid: the grid of the last stage; None takes `grid`.
        kind: where patch i of g lies: "from_final" in the final grid's coordinates, (i + 0.5) * G/g - 0.5, so that
            a patch that covers the same part of the picture has the same position at every B; "native" at i;
            "interp" resamples the final grid's embedding (bicubic, antialiased).

    Returns:
        float32 [1 + rows * columns, width].

    Raises:
        ValueError: `width` is not a multiple of 4, or the kind is unknown.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4; got {width}")
    if kind not in get_args(PositionKind):
        raise ValueError(f"unknown kind of positions {kind!r}; known: {', '.join(get_args(PositionKind))}")
    final_grid = final_grid or grid
    if kind == "interp":
        final = sincos_positions(final_grid, width)
        resampled = resample_abs_pos_embed(final[None], list(grid), list(final_grid), num_prefix_tokens=1)
        return resampled[0]

    def coordinates(count: int, final_count: int) -> Tensor:
        index = torch.arange(count, dtype=torch.float64)
        return index if kind == "native" else (index + 0.5) * final_count / count - 0.5

    rows, columns = (coordinates(g, final) for g, final in zip(grid, final_grid))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    patches = torch.cat([sincos(column.flatten(), width // 2), sincos(row.flatten(), width // 2)], dim=1)
    return torch.cat([patches.new_zeros(1, width), patches]).float()
