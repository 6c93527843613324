"""Pixels in [0, 1], or uint8, to what a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pixel_statistics(
    channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of pixels in [0, 1]: those given, else ImageNet's for 3 channels, else 0.5, 0.25.

    Raises:
        ValueError: not one number for each channel.
    """
    mean = tuple(mean or (IMAGENET_MEAN if channels == 3 else (0.5,) * channels))
    std = tuple(std or (IMAGENET_STD if channels == 3 else (0.25,) * channels))
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean {mean} and std {std} must be one number for each of {channels} channels")
    return mean, std


class Normalised(nn.Module):
    """A model that normalises the images it is given.

    Args:
        mean, std: per channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 1], [N, C, H, W] to the network's input."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return (pixels - self.mean) / self.std
