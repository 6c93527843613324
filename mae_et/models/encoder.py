"""The vision transformer that is pretrained: timm's parameter names, visible patches only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_et.models.masking import gather_tokens
from mae_et.models.posembed import PositionKind, sincos_positions
from mae_et.ops.patches import check_divisible


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the epsilon of ViT and MAE."""

    def __init__(self, width: int, eps: float = 1e-6, **factory: Any):
        super().__init__(width, eps=eps, **factory)


class PatchEmbed(nn.Module):
    """A linear projection of patches, stored as the convolution that timm has (`proj.weight` [D, C, p, p])."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """Embed patches of images [N, C, H, W], all of them or those at ids [N, V]: [N, L or V, D]."""
        p = self.patch_size
        patches = rearrange(images, "n c (h p) (w q) -> n (h w) (c p q)", p=p, q=p)
        if ids is not None:
            patches = gather_tokens(patches, ids)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """ViT with fixed sin-cos positions for any grid.

    Its state dict loads with `strict=True` into timm's `VisionTransformer` of the same size (`num_classes=0`), and
    the other way round: `pos_embed` is the embedding of the final grid. Learned positions that are loaded so hold at
    that grid only; others keep sin-cos.

    Args:
        size: final (height, width) in px.
        patch_size: px.
        channels: of the images.
        width, depth, heads, mlp_ratio: of the blocks.
        positions: kind of positions at grids other than the final one (see `sincos_positions`).
    """

    pos_embed: Tensor

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        positions: PositionKind = "from_final",
    ):
        super().__init__()
        self.size, self.patch_size, self.width = size, patch_size, width
        self.positions: PositionKind = positions
        self.final_grid = (size[0] // patch_size, size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(self.final_grid, width, kind=positions)[None])
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self._positions_by_grid: dict[tuple[int, int], Tensor] = {}

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [1, 1 + rows * columns, D] of a grid, on the encoder's device and in its dtype."""
        if grid == self.final_grid:
            return self.pos_embed
        known = self._positions_by_grid.get(grid)
        if known is None or known.device != self.pos_embed.device or known.dtype != self.pos_embed.dtype:
            known = sincos_positions(grid, self.width, self.final_grid, self.positions)[None].to(self.pos_embed)
            self._positions_by_grid[grid] = known
        return known

    def forward(self, images: Tensor, visible_ids: Tensor | None = None, levels: list[Tensor] | None = None) -> Tensor:
        """Normalised features of the class token and of patches.

        Args:
            images: normalised float [N, C, H, W]; H and W are multiples of the patch.
            visible_ids: int64 [N, V], patches to encode; None encodes all.
            levels: takes 1 + depth tensors as the result: what each block is given, and the result itself.

        Returns:
            [N, 1 + V, D], the class token first.

        Raises:
            ValueError: the patch does not divide H or W.
        """
        check_divisible(images, self.patch_size)
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        positions = self.positions_for(grid)
        patches = positions[:, 1:] if visible_ids is None else gather_tokens(positions[:, 1:], visible_ids)
        x = self.patch_embed(images, visible_ids) + patches
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x.to(cls.dtype)], dim=1)
        for block in self.blocks:
            if levels is not None:
                levels.append(x)
            x = block(x)
        x = self.norm(x)
        if levels is not None:
            levels.append(x)
        return x
