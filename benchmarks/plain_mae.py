"""A masked autoencoder as one would write it from the paper: the reference that the speed of ours is measured against.

MAE (arXiv 2111.06377) with normalised pixels, in plain PyTorch and timm's blocks with their defaults. It does what ours
does not need to: convolves all patches, keeps the order of the picture in the decoder and predicts visible patches too.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class PlainMAE(nn.Module):
    """MAE for square images of one size.

    Args:
        size, patch_size: px.
        channels: of the images.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        visible: patches that the encoder sees.
    """

    def __init__(
        self,
        size: int,
        patch_size: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        decoder_width: int,
        decoder_depth: int,
        decoder_heads: int,
        visible: int,
    ):
        super().__init__()
        self.patch_size, self.visible = patch_size, visible
        patches = (size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(channels, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + patches, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(1, 1 + patches, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.head = nn.Linear(decoder_width, channels * patch_size**2)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of normalised images, float [N, C, H, W]."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        count, patches, width = tokens.shape
        order = torch.rand(count, patches, device=images.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        seen = order[:, : self.visible, None].expand(-1, -1, width)
        cls = (self.cls_token + self.positions[:, :1]).expand(count, -1, -1)
        x = torch.cat([cls, tokens.gather(1, seen)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        masked = self.mask_token.expand(count, patches - self.visible, -1)
        spread = torch.cat([x[:, 1:], masked.to(x.dtype)], dim=1)
        spread = spread.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], spread], dim=1) + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.head(self.decoder_norm(x))[:, 1:]
        p = self.patch_size
        target = rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=p, q=p)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (prediction - target).square().mean(-1)
        mask = (restore >= self.visible).float()
        return (loss * mask).sum() / mask.sum()
