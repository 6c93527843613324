"""Swin whose windows, masks and relative positions follow B, around one set of parameters of the final size.

EfficientTrain's code builds one Swin per stage, with windows of B / 32 (7 at 224, 3 at 96), and resamples the position
tables, and Adam's moments of them, from stage to stage. Here the tables stay those of the final size and are
resampled in forward, so that parameters, optimizer state and averages outlive every change of B.

All that depends on the inside of timm's Swin is `follow_windows`.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers.helpers import to_2tuple
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

Pair = tuple[int, int]

BLOCKED = -100.0  # Swin's own figure: added to a logit, it leaves a weight of e^-100


def scaled_window(window: Pair, final_grid: Pair, grid: Pair) -> Pair:
    """The window of a feature map that has shrunk (or grown) from `final_grid` to `grid`, by rows and columns.

    It keeps its share of the map: 7 of 56 are 3 of 24. A window that covers the whole final map covers every map.
    A share that is not whole is rounded down; one token is the least.
    """
    rows, columns = (max(1, w * now // final) for w, final, now in zip(window, final_grid, grid))
    return rows, columns


def fitting_window(window: Pair, grid: Pair) -> Pair:
    """The window of any feature map that it fits into; less where the map is less."""
    rows, columns = (min(w, side) for w, side in zip(window, grid))
    return rows, columns


def bicubic_weights(length: int, wanted: int) -> Tensor:
    """What each of `length` samples gives to each of `wanted`, half-pixel centres: float32 [wanted, length]."""
    lines = torch.eye(length, dtype=torch.float64)[None, None]
    return F.interpolate(lines, (length, wanted), mode="bicubic", align_corners=False)[0, 0].T.float()


def resampling(window: Pair, wanted: Pair) -> tuple[Tensor, Tensor] | None:
    """`bicubic_weights` by rows and columns from the table of one window to another's; None between equals."""
    if window == wanted:
        return None
    rows, columns = (bicubic_weights(2 * old - 1, 2 * new - 1) for old, new in zip(window, wanted))
    return rows, columns


def resample_table(table: Tensor, window: Pair, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    """Relative position biases of one window, for another.

    Bicubic; EfficientTrain's code takes the same places bilinearly. Written as products and sums, whose gradient is
    the same at every run; that of `interpolate` is not on a GPU.

    Args:
        table: [(2 * rows - 1) * (2 * columns - 1), heads], of `window`.
        window: (rows, columns) of the table.
        weights: [2 * rows' - 1, 2 * rows - 1] and the same for columns, rows' and columns' of the wanted window (see
            `resampling`); None leaves the table as it is.

    Returns:
        [heads, 2 * rows' - 1, 2 * columns' - 1].
    """
    biases = table.T.reshape(-1, 2 * window[0] - 1, 2 * window[1] - 1)
    if weights is None:
        return biases
    down, across = (weight.to(table.dtype) for weight in weights)
    biases = (down[:, :, None] * biases[:, None]).sum(2)
    return (across * biases[:, :, None]).sum(3)


def spread_biases(biases: Tensor, window: Pair) -> Tensor:
    """The bias of each pair of tokens of a window.

    Args:
        biases: [heads, 2 * rows - 1, 2 * columns - 1]; entry (rows - 1 + i, columns - 1 + j) is of a query i rows
            below and j columns right of its key.
        window: (rows, columns).

    Returns:
        [heads, rows * columns, rows * columns], queries then keys.
    """
    rows, columns = window
    pairs = biases.unfold(1, rows, 1).unfold(2, columns, 1).flip(3, 4)
    return pairs.reshape(-1, rows * columns, rows * columns)


def partition(x: Tensor, window: Pair) -> Tensor:
    """Cut [N, H, W, C] into windows: [N, windows, rows * columns, C]."""
    n, height, width, channels = x.shape
    rows, columns = window
    x = x.reshape(n, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(n, -1, rows * columns, channels)


def join(windows: Tensor, window: Pair, size: Pair) -> Tensor:
    """Undo `partition` for a map of `size` (height, width): [N, H, W, C]."""
    n, _, _, channels = windows.shape
    (height, width), (rows, columns) = size, window
    x = windows.reshape(n, height // rows, width // columns, rows, columns, channels)
    return x.transpose(2, 3).reshape(n, height, width, channels)


def padded(grid: Pair, window: Pair) -> Pair:
    """The least map of whole windows that holds one of `grid` tokens."""
    rows, columns = (-(-side // w) * w for side, w in zip(grid, window))
    return rows, columns


def shift_mask(size: Pair, window: Pair, shift: Pair) -> Tensor:
    """What to add to logits so that tokens which only the cyclic shift brought together do not attend to each other.

    Args:
        size: (height, width) of the map, of whole windows.
        window: (rows, columns).
        shift: tokens that the map was rolled up and left by.

    Returns:
        float32 [windows, rows * columns, rows * columns]: 0, or `BLOCKED` where the pair is of different parts.
    """

    def parts(length: int, extent: int, step: int) -> Tensor:
        position = torch.arange(length)
        return (position >= length - extent).long() + (position >= length - step).long()

    rows, columns = (parts(*axis) for axis in zip(size, window, shift))
    part = partition((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]
    return (part[:, :, None] != part[:, None, :]) * BLOCKED


class Layout(NamedTuple):
    """How a block sees maps of one size."""

    window: Pair
    shift: Pair
    mask: Tensor | None
    weights: tuple[Tensor, Tensor] | None


class WindowAttention(nn.Module):
    """Attention within windows of any size, under timm's parameter names, with the table of `window_size`."""

    def __init__(self, attention: TimmWindowAttention):
        super().__init__()
        rows, columns = attention.window_size
        self.window_size = (int(rows), int(columns))
        self.heads, self.scale = attention.num_heads, attention.scale
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.qkv, self.proj = attention.qkv, attention.proj
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop

    def forward(self, windows: Tensor, layout: Layout) -> Tensor:
        """Attend within each window: [N, windows, rows * columns, C] to the same."""
        n, count, tokens, _ = windows.shape
        qkv = self.qkv(windows).reshape(n, count, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind()
        table = resample_table(self.relative_position_bias_table, self.window_size, layout.weights)
        biases = spread_biases(table, layout.window)
        if layout.mask is not None:
            biases = biases + layout.mask[:, None].to(biases.dtype)
        attention = self.attn_drop((q * self.scale @ k.transpose(-2, -1) + biases).softmax(dim=-1))
        x = (attention @ v).transpose(2, 3).reshape(n, count, tokens, -1)
        return self.proj_drop(self.proj(x))


class WindowBlock(nn.Module):
    """A Swin block whose window and shift come from the map that it is given."""

    def __init__(self, block: SwinTransformerBlock):
        super().__init__()
        rows, columns = to_2tuple(block.input_resolution)
        self.final_grid = (int(rows), int(columns))
        self.shifts = any(block.target_shift_size)
        self.follows = True
        # In timm's order, by which optimizers number parameters.
        self.norm1 = block.norm1
        self.attn = WindowAttention(block.attn)
        self.drop_path1 = block.drop_path1
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.drop_path2 = block.drop_path2
        self._layouts: dict[tuple[Pair, torch.device], Layout] = {}

    def layout(self, grid: Pair, device: torch.device) -> Layout:
        """Window, shift and what follows from them for a map; along a side that one window covers, no shift."""
        if (grid, device) not in self._layouts:
            # Made while evaluating in inference mode, they must serve training too.
            with torch.inference_mode(False):
                self._layouts[grid, device] = self._new_layout(grid, device)
        return self._layouts[grid, device]

    def _new_layout(self, grid: Pair, device: torch.device) -> Layout:
        final = self.attn.window_size
        window = scaled_window(final, self.final_grid, grid) if self.follows else fitting_window(final, grid)
        rows, columns = (w // 2 if self.shifts and w < side else 0 for w, side in zip(window, grid))
        mask = None
        if rows or columns:
            mask = shift_mask(padded(grid, window), window, (rows, columns)).to(device)
        weights = resampling(final, window)
        if weights is not None:
            weights = (weights[0].to(device), weights[1].to(device))
        return Layout(window, (rows, columns), mask, weights)

    def _attend(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        layout = self.layout(grid, x.device)
        size = padded(grid, layout.window)
        # Padding comes after the roll and is attended to, as in timm.
        x = x.roll((-layout.shift[0], -layout.shift[1]), (1, 2))
        x = F.pad(x, (0, 0, 0, size[1] - grid[1], 0, size[0] - grid[0]))
        x = join(self.attn(partition(x, layout.window), layout), layout.window, size)
        return x[:, : grid[0], : grid[1]].roll(layout.shift, (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] to the same."""
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def follow_windows(model: SwinTransformer) -> None:
    """Let a timm Swin, just built at its final size, take other sizes too; its parameters keep names and values.

    Raises:
        ValueError: the model was built with `always_partition`, where windows do not follow the map.
    """
    for stage in model.layers:
        blocks = cast(nn.Sequential, stage.blocks)
        for index, block in enumerate(blocks):
            if block.always_partition:
                raise ValueError("always_partition=True keeps windows from following B: leave it out of the arguments")
            blocks[index] = WindowBlock(cast(SwinTransformerBlock, block))
    cast(PatchEmbed, model.patch_embed).strict_img_size = False


def keep_windows(model: SwinTransformer) -> None:
    """Let a Swin that follows B have the same windows at all sizes, as detectors and segmenters have them.

    What they see differs in size, not in scale: a window should hold as many pixels in each.
    """
    for module in model.modules():
        if isinstance(module, WindowBlock):
            module.follows = False


def load_tables(model: SwinTransformer, source: SwinTransformer) -> None:
    """Give a Swin that follows B the parameters of timm's, whose windows may be others.

    Tables are resampled as in forward, so that a model of 224 px loaded for 192 px is what it was at B=192.
    """
    tensors = source.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention):
            table = f"{name}.relative_position_bias_table"
            rows, columns = to_2tuple(cast(TimmWindowAttention, source.get_submodule(name)).window_size)
            weights = resampling((int(rows), int(columns)), module.window_size)
            tensors[table] = resample_table(tensors[table], (int(rows), int(columns)), weights).flatten(1).T
    model.load_state_dict(tensors)
