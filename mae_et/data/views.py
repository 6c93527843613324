"""A window of an image, scaled and mirrored, in the top left corner of a canvas: images, masks and boxes go alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.data.transforms import Box, Size

# Grey, the mean of ImageNet's mean colour: close to 0 after normalisation. mmdetection pads jittered images with it.
FILL = 114


class Window(NamedTuple):
    """Which part of an image is seen, and how.

    The part is cut in whole px of the image before it is scaled, so that nothing outside of it is ever resized, and
    pixels do not mix across its edge. Its scale is `inner / box`, exactly, and differs from the one asked for by what
    the rounding of both to whole px makes: boxes must be scaled by this one.

    Attributes:
        box: (top, left, height, width) in px of the image.
        inner: (height, width) in px that the box is resized to.
        mirrored: whether it is then flipped from left to right.
    """

    box: Box
    inner: Size
    mirrored: bool


def draw_window(image: Size, scale: float, size: Size, mirrored: bool, draws: Iterator[float]) -> Window:
    """Draw where a canvas of `size` lies on an image scaled by `scale`; a side that fits is seen whole.

    Args:
        image: (height, width) in px of the image before scaling.
        scale: px of the canvas per px of the image.
        size: (height, width) in px of the canvas.
        mirrored: handed on.
        draws: uniform numbers in [0, 1); two are taken.
    """
    top, height, inner_height = _draw_side(image[0], scale, size[0], next(draws))
    left, width, inner_width = _draw_side(image[1], scale, size[1], next(draws))
    return Window((top, left, height, width), (inner_height, inner_width), mirrored)


def _draw_side(side: int, scale: float, room: int, draw: float) -> tuple[int, int, int]:
    """Offset and length in px of what is seen of a side, and its length on the canvas."""
    scaled = max(1, round(side * scale))
    if scaled <= room:
        return 0, side, scaled
    seen = min(side, max(1, round(room / scale)))
    return int(draw * (side - seen + 1)), seen, room


def view_image(image: Tensor, window: Window, size: Size) -> Tensor:
    """Return what a window sees of an image, resized (bilinear, antialiased, in integers) and padded with `FILL`.

    Args:
        image: uint8 [C, H, W]; fastest with the channels innermost in memory, as sources give it.
        window: a window of H x W px.
        size: (height, width) in px of the canvas, at least `window.inner`.

    Returns:
        uint8 [C, *size], contiguous; padding lies right and below.
    """
    top, left, height, width = window.box
    cut = image[:, top : top + height, left : left + width]
    view = F.interpolate(cut[None], size=window.inner, mode="bilinear", antialias=True)[0]
    return _place(view.flip(-1) if window.mirrored else view, size, FILL)


def view_masks(masks: Tensor, window: Window, size: Size, fill: int) -> Tensor:
    """Return what a window sees of masks, each px taking the value of the source px that its centre falls on.

    Args:
        masks: uint8 [K, H, W].
        window, size: as for `view_image`, with which the result is aligned (centres of px lie at halves in both).
        fill: value of the padding.

    Returns:
        uint8 [K, *size], contiguous.
    """
    top, left, height, width = window.box
    rows, columns = _nearest(height, window.inner[0]), _nearest(width, window.inner[1])
    if window.mirrored:
        columns = columns[::-1]
    # NumPy's gathering, 20 times as fast as torch's on bytes; `F.interpolate` takes 4 times as long, and its float32
    # puts one centre in some thousand on the wrong side of an edge.
    cut = masks.numpy()[:, top : top + height, left : left + width]
    return _place(torch.from_numpy(cut.take(columns, 2).take(rows, 1)), size, fill)


def _nearest(source: int, target: int) -> np.ndarray:
    """For each of `target` px, the one of `source` px that its centre falls on; right or below where it is between."""
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _place(view: Tensor, size: Size, fill: int) -> Tensor:
    if view.shape[1:] == size:
        return view.contiguous()
    canvas = view.new_full((view.shape[0], *size), fill)
    canvas[:, : view.shape[1], : view.shape[2]] = view
    return canvas


def view_boxes(boxes: Tensor, window: Window) -> Tensor:
    """Return boxes in px of the canvas, not clipped: float32 [K, 4] of float [K, 4] in px of the image."""
    (top, left, height, width), inner = window.box, window.inner
    scale = boxes.new_tensor([inner[1] / width, inner[0] / height] * 2)
    seen = (boxes - boxes.new_tensor([left, top] * 2)) * scale
    if window.mirrored:
        x1, y1, x2, y2 = seen.unbind(1)
        seen = torch.stack([inner[1] - x2, y1, inner[1] - x1, y2], 1)
    return seen


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Return boxes float [K, 4] cut off at the edges of an image of (height, width) px."""
    limits = boxes.new_tensor([size[1], size[0]] * 2)
    return boxes.clamp(min=0).minimum(limits)
