"""Locality in a vision transformer: a depth-wise convolution over the grid of patches in each feed-forward layer."""

from __future__ import annotations

from typing import Any, cast

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

# In a state dict, what only networks with locality have.
CONVOLUTION = "blocks.0.mlp.conv.weight"


class LocalFeedForward(nn.Module):
    """The feed-forward layer of LocalViT (arXiv 2104.05707) as "1 GPU, 24 hours" (arXiv 2211.05187) trains it.

    A linear layer, h-swish, a 3x3 depth-wise convolution, h-swish, a linear layer; none of them with a bias, and
    neither BatchNorm nor squeeze-and-excitation. Class and register tokens have no place in the grid: their output is
    zero, so that behind the residual sum they stay as they were.

    Linear layers start as timm's (normal of deviation 0.02, truncated), the convolution as torch's: uniform within
    +-1/3, one over the root of its 9 inputs, where the code of both papers leaves it.

    Args:
        width: of the tokens.
        hidden: channels of the convolution.
        prefix_tokens: how many class and register tokens stand before the patches.
    """

    def __init__(self, width: int, hidden: int, prefix_tokens: int):
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.conv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [N, prefix_tokens + rows * columns, width] to as many, patches in rows of the grid."""
        hidden = F.hardswish(self.fc1(tokens[:, self.prefix_tokens :]))
        hidden = F.hardswish(self.conv(hidden.transpose(1, 2).unflatten(2, grid)))
        patches = self.fc2(hidden.flatten(2).transpose(1, 2))
        return F.pad(patches, (0, 0, self.prefix_tokens, 0))


class GridOfImages:
    """The (rows, columns) of the images that a network sees, from the input of its patch embedding: a forward hook.

    One for all blocks of a network; a copy of the network has a copy of its own.
    """

    def __init__(self) -> None:
        self.size = (0, 0)

    def __call__(self, embedding: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        """Remember the grid of `arguments[0]` [N, C, H, W]."""
        self.size = embedding.dynamic_feat_size(arguments[0].shape[-2:])  # pyright: ignore[reportCallIssue]


class LocalBlock(Block):
    """timm's block, with the grid for its feed-forward layer."""

    mlp: LocalFeedForward
    grid: GridOfImages

    def __call__(self, tokens: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`forward`, or what `compile` made of it.

        What is compiled takes the grid as an argument, so that one graph serves all grids. A number that it read from a
        module would be a constant of the graph: after a few sizes torch would no longer compile.
        """
        return super().__call__(tokens, attn_mask, is_causal, self.grid.size)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Tokens [N, prefix_tokens + rows * columns, width] to as many; the grid is (rows, columns)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid)))


def add_locality(net: nn.Module) -> VisionTransformer:
    """Replace the feed-forward layers of a plain ViT by `LocalFeedForward`, in place; new weights are drawn for them.

    Everything else stays timm's, and every size that the network took it still takes. Blocks whose activations are
    recomputed in the backward pass find the grid of the last forward pass: make both before the size changes.

    Args:
        net: timm's `VisionTransformer` itself, with plain blocks; returned.

    Raises:
        ValueError: the network is another, or parts of it drop or normalise what the convolution needs.
    """
    blocks: list[Any] = list(net.blocks) if type(net) is VisionTransformer else []
    if not blocks or any(type(block) is not Block for block in blocks):
        raise ValueError(
            "model.locality=true replaces the feed-forward layers of a plain ViT (vit_*, timm/deit_*, timm/vit_*); "
            f"this is a {type(net).__name__}, leave it out"
        )
    vit = cast(VisionTransformer, net)
    if not isinstance(vit.patch_drop, nn.Identity) or not isinstance(blocks[0].mlp.norm, nn.Identity):
        raise ValueError("model.locality=true goes neither with patch_drop_rate nor with scale_mlp_norm: leave one out")
    grid = GridOfImages()
    vit.patch_embed.register_forward_hook(grid)
    for block in blocks:
        old = block.mlp
        block.__class__ = LocalBlock
        block.grid = grid
        block.mlp = LocalFeedForward(old.fc1.in_features, old.fc1.out_features, vit.num_prefix_tokens)
    return vit
