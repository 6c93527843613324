"""CrossMAE's decoder: masked patches read what they need from visible ones, and not from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers.config import use_fused_attn
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from mae_et.models.encoder import LayerNorm
from mae_et.models.masking import gather_tokens


class CrossAttention(nn.Module):
    """Attention of queries to a source of another width.

    Args:
        width: of the queries and of the result.
        source_width: of the features that give keys and values.
        heads: that divide `width`.
    """

    def __init__(self, width: int, source_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.fused_attn = use_fused_attn()  # timm's name, which `choose_attention` sets
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Queries [N, P, width] and a source [N, S, source width] to [N, P, width]."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            read = F.scaled_dot_product_attention(q, k, v)
        else:
            read = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v
        return self.proj(read.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each after a LayerNorm and added to its input (CrossMAE, Figure 4b).

    Args:
        width, heads, mlp_ratio: of the block.
        source_width: of the features that it attends to.
        norm_source: whether those still want a LayerNorm.
    """

    def __init__(self, width: int, source_width: int, heads: int, mlp_ratio: float, norm_source: bool):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.source_norm = LayerNorm(source_width) if norm_source else nn.Identity()
        self.attn = CrossAttention(width, source_width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Mask tokens [N, P, width] that have read from a source [N, S, source width]: [N, P, width]."""
        x = x + self.attn(self.norm1(x), self.source_norm(source))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Blocks of cross-attention from mask tokens to encoded ones (CrossMAE, arXiv 2401.14391).

    There is no attention between mask tokens, so that what one is predicted to be does not depend on which others are
    predicted. Keys and values come straight from the encoder's width, its class token among them, and positions are
    added to mask tokens alone (Figure 4 and the released code, TonyLianLong/CrossMAE, models_cross.py).

    With `inter_block`, every block attends to a mixture of its own of the encoder's levels (Figure 4c): the embedded
    patches and what each of its blocks gives, as the released recipe has it (`--weight_fm --use_input`). The mixture
    has free weights, normal at first with a variance of 1 / levels, and a LayerNorm. One thing differs from the
    released code: the last level is the encoder's output after its final LayerNorm, and not before, since that
    LayerNorm leaves with the encoder and must be trained.

    Args:
        encoder_width, encoder_depth: of the encoder.
        outputs: values predicted per patch.
        width, depth, heads, mlp_ratio: of the blocks.
        inter_block: whether each attends to a mixture of all levels, and not to the encoder's output alone.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_depth: int,
        outputs: int,
        width: int = 512,
        depth: int = 12,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        inter_block: bool = True,
    ):
        super().__init__()
        self.width = width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.level_weights = nn.Parameter(torch.zeros(depth, 1 + encoder_depth)) if inter_block else None
        self.blocks = nn.ModuleList(
            CrossBlock(width, encoder_width, heads, mlp_ratio, norm_source=inter_block) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def reset_level_weights(self) -> None:
        """CrossMAE's initialisation of the mixtures, from torch's global generator."""
        if self.level_weights is not None:
            nn.init.normal_(self.level_weights, std=1 / math.sqrt(self.level_weights.shape[1]))

    def forward(self, levels: Sequence[Tensor], positions: Tensor, predicted_ids: Tensor) -> Tensor:
        """Predictions for chosen patches.

        Args:
            levels: of the encoder, 1 + depth tensors [N, 1 + V, encoder width], its output last.
            positions: [1, 1 + L, width] of the whole grid.
            predicted_ids: int64 [N, P].

        Returns:
            [N, P, outputs], in the order of `predicted_ids`.
        """
        x = self.mask_token + gather_tokens(positions[:, 1:], predicted_ids)
        for block, source in zip(self.blocks, self.sources(levels)):
            x = block(x, source)
        return self.head(self.norm(x))

    def sources(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        """What each block attends to, [N, 1 + V, encoder width]."""
        if self.level_weights is None:
            return [levels[-1]] * len(self.blocks)
        mixed = self.level_weights @ torch.stack(tuple(levels)).flatten(1)
        return mixed.view(-1, *levels[-1].shape).unbind()
