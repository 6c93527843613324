"""Mixup and cutmix of neighbours in a batch, and smoothed labels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Box = tuple[int, int, int, int]


class MixDraw(NamedTuple):
    """How the images of one step are mixed.

    Attributes:
        lam: share of an image's own label, in [0, 1]; the partner has the rest. 1 with no box mixes nothing.
        box: (top, left, height, width) in px of what cutmix takes from the partner; None for mixup.
    """

    lam: float
    box: Box | None


def draw_mix(
    seed: int,
    step: int,
    size: tuple[int, int],
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
) -> MixDraw:
    """Draw how a step mixes its images: a pure function of the run's seed and the step, the same on every rank.

    The law is that of timm's Mixup in its default mode, one draw for a whole batch. timm draws on each rank and for
    each micro-batch; here all of a step share one draw.

    Args:
        seed: of the run.
        step: optimizer step, from 0.
        size: (height, width) in px of the images that will be mixed.
        mixup_alpha: lam ~ Beta(alpha, alpha) for mixup (arXiv 1710.09412); 0 is no mixup.
        cutmix_alpha: likewise for cutmix (arXiv 1905.04899); 0 is no cutmix.
        probability: of mixing at all.
        switch_probability: of cutmix, where both are on.
    """
    # The order of the images has the key (seed, pass) and starts its counter at 0; this one never meets it.
    generator = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, 1]))
    chance, switch, row, column = generator.random(4)
    if chance >= probability or not (mixup_alpha > 0 or cutmix_alpha > 0):
        return MixDraw(1.0, None)
    cut = cutmix_alpha > 0 and (mixup_alpha <= 0 or switch < switch_probability)
    alpha = cutmix_alpha if cut else mixup_alpha
    lam = float(generator.beta(alpha, alpha))
    if not cut:
        return MixDraw(lam, None)
    box = cutmix_box(size, lam, (int(row * size[0]), int(column * size[1])))
    return MixDraw(1 - box[2] * box[3] / (size[0] * size[1]), box)


def cutmix_box(size: tuple[int, int], lam: float, centre: tuple[int, int]) -> Box:
    """The box (top, left, height, width) of 1 - lam of an image's area around a centre, clipped to the image."""
    ratio = math.sqrt(1 - lam)
    spans = []
    for side, middle in zip(size, centre):
        cut = int(side * ratio)
        spans.append((max(0, middle - cut // 2), min(side, middle + (cut + 1) // 2)))
    (top, bottom), (left, right) = spans
    return top, left, bottom - top, right - left


def mix(images: Tensor, labels: Tensor, classes: int, draw: MixDraw, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour, 0 with 1, 2 with 3 and so on, and their labels likewise.

    timm pairs a batch with its reverse. The order of the images is random, so that neighbours are as random a pair;
    but they are the same pair however a batch is divided into ranks and micro-batches of even size. Nothing here waits
    for the device.

    Args:
        images: uint8 or floating point [N, C, H, W], N even; not changed.
        labels: int64 [N], in [0, classes).
        classes: number of classes.
        draw: from `draw_mix`, for images of this size.
        smoothing: see `smooth_targets`.

    Returns:
        float32 images [N, C, H, W] on the scale of the input (uint8: 0..255), and float32 targets [N, classes].

    Raises:
        ValueError: N is odd.
    """
    if images.shape[0] % 2:
        raise ValueError(
            f"{images.shape[0]} images cannot be mixed in pairs; choose a batch whose share per rank and accumulation "
            f"step is even"
        )
    mixed = images.to(torch.float32, copy=True)
    targets = smooth_targets(labels, classes, smoothing)
    if draw.box is not None:
        top, left, height, width = draw.box
        box = mixed[:, :, top : top + height, left : left + width]
        box.copy_(_partners(box))
    elif draw.lam != 1:
        mixed = mixed.mul_(draw.lam).add_(_partners(images), alpha=1 - draw.lam)
    return mixed, targets * draw.lam + _partners(targets) * (1 - draw.lam)


def smooth_targets(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels as float32 distributions [N, classes]: `smoothing` of each is spread evenly over all classes.

    Args:
        labels: int64 [N], in [0, classes).
        classes: number of classes K.
        smoothing: s in [0, 1); the label's class gets 1 - s + s/K, each other one s/K.
    """
    off = smoothing / classes
    targets = torch.full((labels.shape[0], classes), off, dtype=torch.float32, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def _partners(batch: Tensor) -> Tensor:
    """A copy of a batch, [N, ...], in which neighbours have changed places."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
