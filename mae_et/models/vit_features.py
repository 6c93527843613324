"""Maps of features from a plain vision transformer, for images of any size, with or without windowed attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mae_et.models.locality import LocalBlock
from mae_et.models.windows import join, padded, partition

Grid = tuple[int, int]


@dataclass(frozen=True)
class ViTFeatures:
    """How maps are taken from the blocks of a timm `VisionTransformer`; it holds no weights itself.

    Windowed attention is ViTDet's (arXiv 2203.16527, section 3): most blocks attend within windows that do not
    overlap, and a few attend to the whole map, which is how windows learn of each other. A map that is no multiple of
    the window is padded at the bottom and the right. Here, other than in ViTDet's code, nothing attends to the padding,
    since no image holds such tokens and pretraining never met them: a window at the border is a smaller window. A
    window that is larger than the map along a side shrinks to it, so that one which covers the map is global attention.

    All of a block but its attention sees one token at a time, so that a part of blocks takes its tokens window by
    window, [N * windows, T, D], and blocks need to know of nothing. Drop path of `SampleDraws` drops all windows of a
    sample together.

    Attributes:
        taps: numbers of the blocks whose maps are given, ascending; one that is named twice is given twice.
        window: side in patches; None for global attention everywhere.
        global_blocks: numbers of the blocks with global attention where there is a window.
        checkpointing: compute each block's activations again in the backward pass. With drop path, rewind its draws
            after the forward pass (see `SampleDraws`), and make the backward pass before the next forward pass.
    """

    taps: tuple[int, ...]
    window: int | None = None
    global_blocks: tuple[int, ...] = ()
    checkpointing: bool = False

    def __call__(self, net: VisionTransformer, images: Tensor) -> list[Tensor]:
        """One map [N, D, H / patch, W / patch] of each tap, from normalised images float [N, C, H, W].

        The map of the last block is behind the network's final norm; maps of blocks before it are as they are, as in
        BEiT's and MAE's segmentation. Positions are resampled by timm (bicubic) for grids other than the network's own.
        """
        x = net.patch_embed(images)
        grid = (x.shape[1], x.shape[2])
        x = net.norm_pre(net._pos_embed(x))
        last, windows = len(net.blocks) - 1, Windows(grid, self.window, len(images), x.device)
        maps = {}
        for index, block in enumerate(net.blocks):
            if self.window is None or index in self.global_blocks:
                x = self._run(block, windows.leave(x), None)
            else:
                x = self._run(block, windows.enter(x), windows.mask)
            if index in self.taps:
                tokens = windows.whole(x)
                tokens = (net.norm(tokens) if index == last else tokens)[:, net.num_prefix_tokens :]
                maps[index] = tokens.transpose(1, 2).unflatten(2, grid).contiguous()
        return [maps[tap] for tap in self.taps]

    def _run(self, block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, mask, use_reentrant=False)
        return block(x, mask)


class Windows:
    """Tokens of a map between their order by rows and their order by windows.

    Args:
        grid: (rows, columns) of the map.
        window: side in patches; it shrinks to the map along a side that is shorter. None where nothing enters windows.
        samples: N.
        device: of the tokens.

    Attributes:
        mask: bool [N * windows, 1, 1, T], True where a token of a window may be attended to, for timm's attention; None
            without padding, so that the fast kernels serve.
    """

    mask: Tensor | None

    def __init__(self, grid: Grid, window: int | None, samples: int, device: torch.device):
        rows, columns = grid
        self.grid, self.samples, self.inside = grid, samples, False
        self.window = grid if window is None else (min(window, rows), min(window, columns))
        self.size = padded(grid, self.window)
        self.mask = None
        if self.size != grid:
            real = self._cut(torch.ones(1, rows, columns, 1, dtype=torch.bool, device=device))
            self.mask = real[:, None, None, :, 0].repeat(samples, 1, 1, 1)

    def _cut(self, x: Tensor) -> Tensor:
        """[N, rows, columns, D] to [N * windows, T, D], windows of a sample behind each other."""
        x = F.pad(x, (0, 0, 0, self.size[1] - self.grid[1], 0, self.size[0] - self.grid[0]))
        return partition(x, self.window).flatten(0, 1)

    def enter(self, x: Tensor) -> Tensor:
        """Tokens by windows [N * windows, T, D], unless they are so already."""
        if not self.inside:
            x, self.inside = self._cut(x.unflatten(1, self.grid)), True
        return x

    def leave(self, x: Tensor) -> Tensor:
        """Tokens by rows [N, rows * columns, D], unless they are so already."""
        x, self.inside = self.whole(x), False
        return x

    def whole(self, x: Tensor) -> Tensor:
        """What `leave` would give, without leaving."""
        if not self.inside:
            return x
        rows, columns = self.grid
        x = join(x.unflatten(0, (self.samples, -1)), self.window, self.size)
        return x[:, :rows, :columns].flatten(1, 2)


def spread(depth: int, parts: int) -> tuple[int, ...]:
    """The last block of each of `parts` parts of `depth` blocks: 2, 5, 8 and 11 of 12 in 4, as in ViTDet."""
    return tuple(-(-depth * part // parts) - 1 for part in range(1, parts + 1))


def check_vit(net: VisionTransformer, window: int | None, global_blocks: int) -> None:
    """Refuse what a network cannot give.

    Raises:
        ValueError: it drops patches, or there is to be a window and it has class tokens or locality, or numbers that
            are out of range.
    """
    name = type(net).__name__
    if not isinstance(net.patch_drop, torch.nn.Identity):
        raise ValueError(f"patch_drop_rate leaves holes in the maps of {name}: leave it out of the arguments")
    if window is None:
        return
    if window < 1:
        raise ValueError(f"window={window} is a side in patches: choose 1 or more, or null for global attention")
    if not 0 <= global_blocks <= len(net.blocks):
        raise ValueError(f"global_blocks={global_blocks} must be from 0 to the {len(net.blocks)} blocks of {name}")
    if net.num_prefix_tokens:
        raise ValueError(
            f"window={window}: the {net.num_prefix_tokens} class and register tokens of {name} belong to no window; "
            "leave the window out, or take a ViT without them"
        )
    blocks: Sequence[Any] = list(net.blocks)
    if any(isinstance(block, LocalBlock) for block in blocks):
        raise ValueError(f"window={window} cuts the map that the convolutions of locality need whole: leave it out")
