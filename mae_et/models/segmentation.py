"""Semantic segmentation: UperNet or a linear head over the maps of a trunk, and the loss of its logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_et.models.backbones import Size, multiply_adds
from mae_et.models.drop_path import SampleDraws
from mae_et.models.masking import mask_noise
from mae_et.models.normalised import Normalised
from mae_et.models.pyramid import ChannelNorm
from mae_et.models.trunk import Trunk

Norm = Literal["group", "batch"]
KINDS = ("upernet", "linear")
IGNORE = 255
"""Of pixels without a class, in masks; classes are thus 0 to at most 254."""

BINS = (1, 2, 3, 6)
"""Cells along a side of UperNet's pooled maps (PSPNet, arXiv 1612.01105, section 3.2)."""

_AUXILIARY_CHANNELS = 256
_GROUPS = 32
_GROUP_SIZE = 8
# One number for each dropout: with the same, two would drop the same channels; drop path has the seeds as they are.
_HEAD_SALT = int.from_bytes(b"uperhead", "big")
_AUXILIARY_SALT = int.from_bytes(b"fcn head", "big")


class Segmenter(Normalised):
    """A trunk with a head for the class of every pixel.

    All that is random in training is drawn from the samples' seeds: drop path of the trunk (see `SampleDraws`) and
    dropout of the heads.

    Args:
        trunk: gives maps, finest first.
        head: (maps, seeds) to logits.
        auxiliary: the same, of a second loss; None for none.
        mean, std: per channel, for pixels in [0, 1].
    """

    def __init__(
        self,
        trunk: Trunk,
        head: UperHead | LinearHead,
        auxiliary: AuxiliaryHead | None,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__(mean, std)
        self.trunk, self.head, self.auxiliary = trunk, head, auxiliary
        self.draws = SampleDraws(trunk)

    def forward(self, images: Tensor, seeds: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits of every pixel.

        Args:
            images: uint8, or float in [0, 1], [N, C, H, W]; H and W are multiples of the trunk's grain.
            seeds: int64 [N], of the samples; without them nothing is dropped. Where activations are computed again in
                the backward pass, make it before the next forward pass.

        Returns:
            In evaluation float32 [N, classes, H, W]. In training "logits" float32 [N, classes, h, w] of the head's own
            resolution, and "auxiliary" of its own, where there is such a head: `segmentation_loss` enlarges them.

        Raises:
            ValueError: BatchNorm is to be trained on a single image, whose pooled map has one value a channel.
        """
        if self.training and len(images) == 1 and any(type(module) is nn.BatchNorm2d for module in self.head.modules()):
            raise ValueError(
                "norm=batch cannot train on one image at a time: take two or more a rank and micro-batch, or norm=group"
            )
        seeds = seeds if self.training else None
        self.draws.hand_out(seeds)
        maps = self.trunk(self.normalise(images))
        self.draws.rewind()
        logits = self.head(maps, seeds).float()
        if not self.training:
            return _resize(logits, (images.shape[2], images.shape[3]))
        if self.auxiliary is None:
            return {"logits": logits}
        return {"logits": logits, "auxiliary": self.auxiliary(maps, seeds).float()}


class UperHead(nn.Module):
    """UperNet's head (arXiv 1807.10221, section 3.1): pyramid pooling, top-down pathway, fusion of all levels.

    The coarsest map is pooled to 1, 2, 3 and 6 cells a side, and a 3x3 convolution joins these with the map. That is
    added to the next finer map, and so on; a 3x3 convolution follows on each level. All levels are enlarged to the
    finest one and joined by another. As in mmsegmentation's UPerHead.

    Args:
        width: channels of the trunk's maps.
        levels: how many maps.
        classes: outputs.
        channels: of all maps within.
        norm: see `build_segmenter`.
        dropout: share of the fused map's channels that a sample loses.
    """

    def __init__(self, width: int, levels: int, classes: int, channels: int, norm: Norm, dropout: float):
        super().__init__()
        self.pooled = nn.ModuleList(_convolution(width, channels, 1, norm) for _ in BINS)
        self.pooling = _convolution(width + len(BINS) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(_convolution(width, channels, 1, norm) for _ in range(levels - 1))
        self.smoothing = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in range(levels - 1))
        self.fusion = _convolution(levels * channels, channels, 3, norm)
        self.classifier = _classifier(channels, classes)
        self.dropout = dropout

    def forward(self, maps: Sequence[Tensor], seeds: Tensor | None) -> Tensor:
        """Logits [N, classes, h, w] at the finest map's resolution."""
        *fine, coarsest = maps
        size = _size(coarsest)
        pooled = [_resize(layer(F.adaptive_avg_pool2d(coarsest, bins)), size) for bins, layer in zip(BINS, self.pooled)]
        above = self.pooling(torch.cat([coarsest, *pooled], dim=1))
        levels = [above]
        for level, lateral, smooth in reversed(list(zip(fine, self.laterals, self.smoothing))):
            above = lateral(level) + _resize(above, _size(level))
            levels.append(smooth(above))
        finest = _size(maps[0])
        fused = self.fusion(torch.cat([_resize(level, finest) for level in reversed(levels)], dim=1))
        return self.classifier(_drop_channels(fused, seeds, self.dropout, _HEAD_SALT))


class LinearHead(nn.Module):
    """One linear layer a cell, behind a normalisation over channels ("group") or over the batch ("batch").

    The latter is what DINOv2's linear segmentation (arXiv 2304.07193, section 7.4) has in its released code.

    Args:
        width: channels of the trunk's only map.
        classes: outputs.
        norm: see `build_segmenter`.
    """

    def __init__(self, width: int, classes: int, norm: Norm):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if norm == "batch" else ChannelNorm(width)
        self.classifier = _classifier(width, classes)

    def forward(self, maps: Sequence[Tensor], seeds: Tensor | None) -> Tensor:
        """Logits [N, classes, h, w]; the seeds are not needed."""
        (only,) = maps
        return self.classifier(self.norm(only))


class AuxiliaryHead(nn.Module):
    """A 3x3 convolution and a linear layer on the level before the coarsest one, of stride 16 where those are 4 to 32.

    mmsegmentation's FCNHead of one convolution, which its UperNet recipes train beside the head with weight 0.4.

    Args:
        width: channels of the trunk's maps.
        classes, norm, dropout: as of `UperHead`.
    """

    def __init__(self, width: int, classes: int, norm: Norm, dropout: float):
        super().__init__()
        self.convolution = _convolution(width, _AUXILIARY_CHANNELS, 3, norm)
        self.classifier = _classifier(_AUXILIARY_CHANNELS, classes)
        self.dropout = dropout

    def forward(self, maps: Sequence[Tensor], seeds: Tensor | None) -> Tensor:
        """Logits [N, classes, h, w] at that level's resolution."""
        features = self.convolution(maps[-2])
        return self.classifier(_drop_channels(features, seeds, self.dropout, _AUXILIARY_SALT))


def build_segmenter(
    trunk: Trunk,
    kind: str,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 512,
    norm: Norm = "group",
    auxiliary: float = 0.0,
    dropout: float = 0.1,
) -> Segmenter:
    """A segmenter with a head drawn anew.

    Args:
        trunk: with several maps for "upernet", with one for "linear".
        kind: one of `KINDS`.
        classes: outputs, 2 to 255.
        mean, std: per channel, for pixels in [0, 1].
        channels: of UperNet's maps.
        norm: "group" sees each image by itself, so that training does not depend on how a batch is divided; "batch" is
            what the published recipes have, synchronised over ranks, and needs two images at a time.
        auxiliary: weight of the auxiliary head's loss; 0 for no such head.
        dropout: of UperNet and the auxiliary head.

    Raises:
        ValueError: an unknown name, a number out of range, or a trunk that does not go with the head.
    """
    levels = len(trunk.strides)
    if kind not in KINDS:
        raise ValueError(f"head {kind!r} is unknown: there are {', '.join(KINDS)}")
    if norm not in ("group", "batch"):
        raise ValueError(f"norm={norm!r} is unknown: there are group and batch")
    if not 2 <= classes <= IGNORE:
        raise ValueError(f"{classes} classes: a segmenter tells 2 to {IGNORE} apart")
    if not 0 <= dropout < 1 or auxiliary < 0 or channels < 1:
        raise ValueError(
            f"dropout={dropout}, auxiliary={auxiliary}, channels={channels}: choose a dropout in [0, 1), a weight of 0 "
            f"or more, and at least one channel"
        )
    if kind == "linear":
        if levels != 1:
            raise ValueError(f"a linear head reads one map, and this trunk has {levels}: build it with kind='map'")
        if auxiliary:
            raise ValueError(f"auxiliary={auxiliary}: a linear head has no level for an auxiliary one; set it to 0")
        return Segmenter(trunk, LinearHead(trunk.channels, classes, norm), None, mean, std)
    if levels < 2:
        raise ValueError("UperNet reads several maps, and this trunk has one: build it with kind='pyramid'")
    head = UperHead(trunk.channels, levels, classes, channels, norm, dropout)
    second = AuxiliaryHead(trunk.channels, classes, norm, dropout) if auxiliary else None
    return Segmenter(trunk, head, second, mean, std)


def segmentation_loss(outputs: Mapping[str, Tensor], masks: Tensor, auxiliary: float = 0.0) -> Tensor:
    """Cross-entropy of logits enlarged to the masks, averaged over all pixels; ignored ones count as 0.

    All pixels, and not the labelled ones alone, are what it is divided by, as in mmsegmentation: every labelled pixel
    then weighs the same, and the mean over ranks and micro-batches is the mean over the batch however it is divided.
    A crop without any label gives 0.

    Args:
        outputs: of a `Segmenter` in training.
        masks: uint8 [N, H, W], 255 for ignored pixels.
        auxiliary: weight of the auxiliary head's loss; of no effect without that head.

    Returns:
        float32 scalar.
    """
    truth = masks.long()

    def loss(logits: Tensor) -> Tensor:
        # Without reduction: summed by the kernel itself, a GPU's loss would differ from run to run. (Gradients there
        # still do: those of enlarging are added up in any order.)
        enlarged = _resize(logits, (masks.shape[1], masks.shape[2]))
        return F.cross_entropy(enlarged, truth, ignore_index=IGNORE, reduction="none").mean()

    total = loss(outputs["logits"])
    return total + auxiliary * loss(outputs["auxiliary"]) if "auxiliary" in outputs else total


def segmenter_multiply_adds(segmenter: Segmenter, size: Size) -> float:
    """Multiply-adds of a forward pass in evaluation of one image of (height, width) px.

    Products and convolutions, see `mae_et.models.backbones.multiply_adds`; neither enlarging nor the auxiliary head.
    """
    return multiply_adds(segmenter, [size], len(segmenter.mean))[size]


def _convolution(inputs: int, outputs: int, kernel: int, norm: Norm) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    normalisation = nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(_groups(outputs), outputs)
    return nn.Sequential(convolution, normalisation, nn.ReLU())


def _groups(channels: int) -> int:
    """At most 32 groups of at least 8 channels.

    A map pooled to one cell has no other values to be normalised by: in a group of one channel it would become 0.
    """
    fitting = [n for n in range(1, _GROUPS + 1) if channels % n == 0 and channels // n >= _GROUP_SIZE]
    return max(fitting, default=1)


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _drop_channels(x: Tensor, seeds: Tensor | None, rate: float, salt: int) -> Tensor:
    """x [N, C, H, W] without a share of each sample's channels (arXiv 1411.4280), drawn from its seed int64 [N]."""
    if seeds is None or rate == 0:
        return x
    # The 24 high bits are a uniform number in [0, 1) that float32 holds exactly.
    uniform = ((mask_noise(seeds ^ salt, x.shape[1]) >> 40) & 0xFFFFFF).float() * 2.0**-24
    return x * ((uniform >= rate).to(x.dtype) / (1 - rate))[:, :, None, None]


def _resize(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False) if _size(maps) != size else maps


def _size(maps: Tensor) -> Size:
    return maps.shape[2], maps.shape[3]
