"""MAE's decoder: a narrow transformer that predicts the target of masked patches."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_et.models.encoder import LayerNorm
from mae_et.models.masking import gather_tokens


class Decoder(nn.Module):
    """Transformer over encoded and mask tokens (MAE, section 3; defaults of its Table 1: 8 blocks of 512).

    Args:
        encoder_width: width of the features that come in.
        outputs: values predicted per patch.
        width, depth, heads, mlp_ratio: of the blocks.
    """

    def __init__(
        self,
        encoder_width: int,
        outputs: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, encoded: Tensor, positions: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """Predictions for masked patches.

        Attention does not care about the order of its tokens, so they stay as they come: class token, visible,
        masked. That spares the scatter back to picture order, and the head runs on the masked tail only.

        Args:
            encoded: [N, 1 + V, encoder width].
            positions: [1, 1 + L, width] of the whole grid.
            visible_ids, masked_ids: int64 [N, V] and [N, M].

        Returns:
            [N, M, outputs], in the order of `masked_ids`.
        """
        x = self.embed(encoded)
        place = positions[:, 1:]
        visible = x[:, 1:] + gather_tokens(place, visible_ids)
        masked = self.mask_token + gather_tokens(place, masked_ids)
        x = torch.cat([(x[:, :1] + positions[:, :1]).to(masked.dtype), visible.to(masked.dtype), masked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, encoded.shape[1] :]))
