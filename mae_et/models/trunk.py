"""What heads for boxes, masks and dense labels stand on: a network of timm's with maps of several strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.helpers import to_2tuple
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork

from mae_et.curriculum.stage import format_size
from mae_et.models.backbones import multiply_adds, stride, without_data
from mae_et.models.pyramid import LEVELS, ChannelNorm, SimplePyramid, pyramid_scales
from mae_et.models.vit_features import ViTFeatures, check_vit, spread
from mae_et.models.windows import keep_windows

Kind = Literal["pyramid", "map"]
Taps = Literal["last", "spread"]
Size = tuple[int, int]
Features = Callable[[Any, Tensor], list[Tensor]]


class Trunk(nn.Module):
    """A network of timm's that gives maps [N, channels, H / stride, W / stride], finest first.

    Parameters that get no gradient from the maps, such as those of the network's own head, require none.

    Args:
        net: of normalised images; its parameters keep timm's names, behind `net.`.
        features: (net, images) to the network's own maps.
        levels: the network's maps to as many as there are strides.
        channels: of every map.
        strides: px per cell of each map, finest first.
        grain: what H and W of images must be multiples of, in px.
        frozen_norm: keep every BatchNorm of the network as it is, statistics and affine parameters, in training too.
    """

    def __init__(
        self,
        net: nn.Module,
        features: Features,
        levels: nn.Module,
        channels: int,
        strides: Sequence[int],
        grain: int,
        frozen_norm: bool,
    ):
        super().__init__()
        self.net, self.features, self.levels = net, features, levels
        self.channels, self.strides, self.grain = channels, tuple(strides), grain
        self.frozen_norm = frozen_norm
        for norm in self._norms() if frozen_norm else ():
            norm.requires_grad_(False)
        self.train(self.training)

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.net.modules() if isinstance(module, _BatchNorm)]

    def train(self, mode: bool = True) -> Trunk:
        """Frozen BatchNorm stays as in evaluation."""
        super().train(mode)
        for norm in self._norms() if self.frozen_norm else ():
            norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images, float [N, C, H, W].

        Raises:
            ValueError: H or W is no multiple of `grain`.
        """
        size = (images.shape[2], images.shape[3])
        if any(side % self.grain for side in size):
            raise ValueError(f"images of {format_size(size)} px do not fit the model: choose multiples of {self.grain}")
        return self.levels(self.features(self.net, images))


@dataclass(frozen=True)
class TimmFeatures:
    """Maps of any timm network that knows `forward_intermediates`.

    Attributes:
        indices: of `feature_info`, finest first.
        norm: whether maps are behind the network's final norm.
    """

    indices: tuple[int, ...]
    norm: bool

    def __call__(self, net: Any, images: Tensor) -> list[Tensor]:
        """The maps [N, channels of the level, h, w] of normalised images [N, C, H, W]."""
        return net.forward_intermediates(
            images, indices=list(self.indices), norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )


class FeaturePyramid(nn.Module):
    """torchvision's feature pyramid (arXiv 1612.03144) over the stages of a network.

    Args:
        widths: channels of the stages, finest first.
        channels: of every level.
        norm: put a LayerNorm before each stage's 1x1 convolution. Networks of residual sums that nothing bounds, which
            are those without BatchNorm, need one; Swin's and ConvNeXt's detectors have it, too.
    """

    def __init__(self, widths: Sequence[int], channels: int, norm: bool):
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(width) if norm else nn.Identity() for width in widths)
        self.top_down = FeaturePyramidNetwork(list(widths), channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, channels, h, w], each as large as its stage's map."""
        named = {str(index): norm(stage) for index, (norm, stage) in enumerate(zip(self.norms, maps))}
        return list(self.top_down(named).values())


def build_trunk(
    net: nn.Module,
    *,
    kind: Kind = "pyramid",
    channels: int = 256,
    window: int | None = None,
    global_blocks: int = 4,
    taps: Taps = "last",
    checkpointing: bool = False,
    frozen_norm: bool = True,
    least_stride: int = 1,
    size: Size | None = None,
) -> Trunk:
    """A trunk around a network that has its weights already.

    Plain transformers (all maps of one stride) get ViTDet's simple pyramid, networks with stages a feature pyramid over
    their last four.

    Args:
        net: of timm; ViTs of ours are built with pooling "none".
        kind: "pyramid", or "map" for the network's last map alone, as it is.
        channels: of every level of a pyramid.
        window: side in patches of windowed attention in a ViT (see `ViTFeatures`); None for global attention.
        global_blocks: how many blocks have global attention all the same: the last of each of so many parts.
        taps: "last" makes all levels of the last block's map; "spread" makes each level of another one, the last block
            of each quarter: 2, 5, 8 and 11 of 12, where BEiT's and MAE's UperNet takes 3, 5, 7 and 11.
        checkpointing: compute activations again in the backward pass, block by block.
        frozen_norm: see `Trunk`. Networks that were not pretrained need it off.
        least_stride: px per cell; levels with less are left out of a pyramid, for heads that have no use for them.
        size: (height, width) in px that the network is tried with, without computing anything; None takes the one that
            it was built for.

    Raises:
        ValueError: the network gives no maps, or not at that size, or an argument does not go with it.
    """
    if kind == "map" and taps == "spread":
        raise ValueError('taps="spread" is for the levels of a pyramid: kind="map" takes taps="last"')
    info: list[dict[str, Any]] = [dict(level) for level in getattr(net, "feature_info", [])]
    if not info or not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{_name(net)} gives no maps (`forward_intermediates`): choose another model of timm")
    plain = len({level["reduction"] for level in info}) == 1
    staged = [level for level in info[-LEVELS:] if level["reduction"] >= least_stride]
    used = info[-1:] if plain or kind == "map" else staged
    grain = stride(net)
    scales = [scale for scale in pyramid_scales(grain) if grain / scale >= least_stride]
    if isinstance(net, SwinTransformer):
        keep_windows(net)
    if isinstance(net, VisionTransformer):
        features: Features = _vit_features(net, window, global_blocks, taps, len(scales), checkpointing)
    else:
        features = _timm_features(net, len(info), len(used), plain, window, taps, checkpointing)
    widths = _try_out(net, features, size or _own_size(net))
    strides = [int(level["reduction"]) for level in used]
    if kind == "map":
        return Trunk(net, features, nn.Identity(), widths[-1], strides, grain, frozen_norm)
    if plain:
        strides = [int(grain / scale) for scale in scales]
        return Trunk(
            net, features, SimplePyramid(widths[-1], channels, scales), channels, strides, strides[-1], frozen_norm
        )
    normed = not any(isinstance(module, _BatchNorm) for module in net.modules())
    return Trunk(net, features, FeaturePyramid(widths, channels, normed), channels, strides, grain, frozen_norm)


def check_trunk(trunk: Trunk, sizes: Sequence[Size], channels: int) -> None:
    """Try images of each size (height, width) in px on a trunk without data.

    Raises:
        ValueError: it does not take one of them.
    """
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                without_data(trunk)(torch.empty(2, channels, *size, device="meta"))
        except Exception as error:  # a model may fail in any way on shapes that it was not made for
            raise _refusal(trunk.net, size, error) from error


def trunk_multiply_adds(trunk: Trunk, size: Size, channels: int) -> float:
    """Multiply-adds of a forward pass of one image of `size`, see `mae_et.models.backbones.multiply_adds`."""
    return multiply_adds(trunk, [size], channels)[size]


def _vit_features(
    net: VisionTransformer, window: int | None, global_blocks: int, taps: Taps, levels: int, checkpointing: bool
) -> ViTFeatures:
    """The last block's map, or one for each of the `levels` coarsest of four."""
    check_vit(net, window, global_blocks)
    depth = len(net.blocks)
    numbers = spread(depth, LEVELS)[-levels:] if taps == "spread" else (depth - 1,)
    return ViTFeatures(numbers, window, spread(depth, global_blocks), checkpointing)


def _timm_features(
    net: Any, count: int, used: int, plain: bool, window: int | None, taps: Taps, checkpointing: bool
) -> TimmFeatures:
    """Maps of a network that is no `VisionTransformer`: the last `used` of `count`."""
    if window is not None:
        raise ValueError(f"window={window} is for plain ViTs, and this is {_name(net)}: leave it out")
    if taps == "spread":
        raise ValueError(f'taps="spread" is for plain ViTs, and this is {_name(net)}: leave it out')
    if checkpointing:
        try:
            net.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"{_name(net)} knows no gradient checkpointing: turn it off") from error
    return TimmFeatures(tuple(range(count - used, count)), norm=plain)


def _try_out(net: nn.Module, features: Features, size: Size) -> list[int]:
    """The channels of each map; what the maps do not depend on requires no gradient henceforth.

    DDP waits for the gradients of all parameters that require one. Found by a forward and a backward pass over shapes
    alone.

    Raises:
        ValueError: the network does not give maps of images of `size`.
    """
    empty = without_data(net).eval()
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    try:
        maps = features(empty, torch.empty(1, first.in_channels, *size, device="meta"))
    except Exception as error:  # as above
        raise _refusal(net, size, error) from error
    wanted = {name: parameter for name, parameter in empty.named_parameters() if parameter.requires_grad}
    if wanted:
        total = torch.stack([level.sum() for level in maps]).sum()
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients):
            net.get_parameter(name).requires_grad_(gradient is not None)
    return [level.shape[1] for level in maps]


def _own_size(net: nn.Module) -> Size:
    """The size that a network was built for, where it says one; else timm's for the model."""
    own = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if own is None:
        own = getattr(net, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    height, width = to_2tuple(own)
    return int(height), int(width)


def _refusal(net: nn.Module, size: Size, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return ValueError(
        f"{_name(net)} gives no maps of images of {format_size(size)} px: {reason}; choose another size or model"
    )


def _name(net: nn.Module) -> str:
    facts = getattr(net, "pretrained_cfg", None) or {}
    return facts.get("architecture") or type(net).__name__
