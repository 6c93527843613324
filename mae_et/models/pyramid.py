"""ViTDet's simple feature pyramid: maps of several strides from the one stride of a plain transformer."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor, nn

LEVELS = 4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps, as in ViTDet.

    Its output is contiguous, other than that of timm's `LayerNorm2d`: behind one that is not, gradients of 1x1
    convolutions have strides that DDP warns of.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] to the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class SimplePyramid(nn.Module):
    """Four levels, each from one map of a plain transformer (arXiv 2203.16527, section 3).

    A level of scale 4 comes of two transposed convolutions (2x2, stride 2, halving the channels) with LayerNorm and
    GELU between them, of scale 2 of one, of scale 1/2, 1/4, ... of max pooling. Then a 1x1 and a 3x3 convolution
    without bias, each before a LayerNorm. Weights start as torch's.

    Args:
        width: channels of the map.
        channels: of every level.
        scales: cells of a level per cell of the map, along a side (see `pyramid_scales`).
    """

    def __init__(self, width: int, channels: int, scales: Sequence[Fraction]):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(*_level(width, channels, scale)) for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, channels, scale * h, scale * w].

        Args:
            maps: [N, width, h, w]: one for all levels, or one for each.
        """
        sources = list(maps) * len(self.levels) if len(maps) == 1 else maps
        assert len(sources) == len(self.levels), f"{len(maps)} maps for {len(self.levels)} levels"
        return [level(source) for level, source in zip(self.levels, sources)]


def _level(width: int, channels: int, scale: Fraction) -> list[nn.Module]:
    layers: list[nn.Module] = []
    while scale > 1:
        if layers:
            layers += [ChannelNorm(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        width, scale = width // 2, scale / 2
    if scale < 1:
        layers.append(nn.MaxPool2d(scale.denominator))
    return [
        *layers,
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(channels),
    ]


def pyramid_scales(patch_size: int) -> tuple[Fraction, ...]:
    """Scales of the levels for a patch: four powers of two, finest first.

    The finest is the largest of at most 4 whose cells are a whole number of at least 4 px: patches of 16 px get levels
    of 4, 8, 16 and 32 px (ViTDet's), and so do those of 8, 4 and 2 px; patches of 14 px get 7, 14, 28 and 56.
    """
    scale = Fraction(4)
    while (patch_size / scale).denominator > 1 or patch_size / scale < 4:
        scale /= 2
    return tuple(scale / 2**level for level in range(LEVELS))
