"""What a downstream network is made of: settled from a configuration and a checkpoint, and kept with the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from mae_et.config import ConfigError, ImageDataConfig, NetworkConfig
from mae_et.config.plain import parse_json
from mae_et.curriculum.stage import as_size
from mae_et.exchange.records import check_arguments, read_model, read_shape, read_statistics
from mae_et.exchange.weights import Weights
from mae_et.models.backbones import build_backbone
from mae_et.models.locality import CONVOLUTION, add_locality
from mae_et.models.normalised import pixel_statistics
from mae_et.models.vit import Pooling, ViTShape, build_vit
from mae_et.sizes import ENCODER_SIZES

DEFAULT_SIZE = (224, 224)


@dataclass(frozen=True)
class Backbone:
    """One network, in numbers.

    Attributes:
        size: final (height, width) in px.
        channels: of the images.
        mean, std: per channel, for pixels in [0, 1].
        shape: of a plain ViT, at `size`; None for others.
        model: of timm, where it is no plain ViT of ours.
        arguments: for timm's constructor.
        norm_follows_pooling: whether the checkpoint is a ViT that was trained with mean pooling, whose final norm is of
            the mean (`fc_norm`); its frozen features need it.
        locality: whether feed-forward layers of timm's `model` are replaced (`mae_et.models.locality`); `shape` says it
            of a ViT of ours.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: ViTShape | None = None
    model: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    norm_follows_pooling: bool = False
    locality: bool = False

    @property
    def name(self) -> str:
        """For people."""
        base = str(self.model)
        if self.shape is not None:
            base = f"ViT {self.shape.width}x{self.shape.depth}, {self.shape.patch_size}-px patches"
        return f"{base}, with locality" if self.has_locality else base

    @property
    def has_locality(self) -> bool:
        """Whether feed-forward layers hold a convolution."""
        return self.locality if self.shape is None else self.shape.locality

    def build(self, classes: int, pooling: Pooling = "mean", drop_path: float = 0.0) -> nn.Module:
        """The network with timm's initial weights, from torch's global generator.

        Raises:
            ConfigError: timm has no such model, or refuses the arguments.
        """
        if self.shape is not None:
            return build_vit(self.shape, classes, pooling, drop_path)
        try:
            check_arguments(self.arguments)
            net = build_backbone(
                str(self.model),
                classes=classes,
                size=self.size,
                channels=self.channels,
                drop_path=drop_path,
                arguments=self.arguments,
            )
            return add_locality(net) if self.locality else net
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"model.name={self.model}: {error}") from None

    def build_without_data(self, classes: int) -> nn.Module:
        """The network on torch's meta device, for counting."""
        with torch.device("meta"):
            return self.build(classes)

    def to_json(self) -> str:
        """`from_json` is its inverse."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Backbone:
        """A backbone from what `to_json` wrote.

        Raises:
            ValueError: it did not write this.
        """
        try:
            values = parse_json(text)
            shape = None if values["shape"] is None else read_shape(values["shape"])
            mean, std = read_statistics(values, "mean"), read_statistics(values, "std")
            model, arguments = read_model(values)
            numbers = {"size": as_size(values["size"]), "mean": mean, "std": std, "shape": shape}
            found = cls(**{**values, **numbers, "model": model, "arguments": arguments})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it does not describe a backbone ({error!r})") from None
        if type(found.channels) is not int or not len(found.mean or ()) == len(found.std or ()) == found.channels:
            raise ValueError(f"it has {found.channels!r} channels, and not as many of mean and std")
        if shape is None and model is None:
            raise ValueError("it names no network")
        return found


def choose_backbone(model: NetworkConfig, data: ImageDataConfig, weights: Weights | None) -> Backbone:
    """The network that a configuration and a checkpoint come to; what the configuration names wins.

    Raises:
        ConfigError: nothing says which network it is, or sizes that do not fit.
    """
    known = None if weights is None else weights.shape
    try:
        wanted = None if data.size is None else as_size(data.size)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"data.size: {error}") from None
    channels = data.channels or (known.channels if known else 3)
    same_channels = weights is not None and weights.mean is not None and len(weights.mean) == channels
    try:
        mean, std = pixel_statistics(
            channels,
            data.mean or (weights.mean if weights is not None and same_channels else None),
            data.std or (weights.std if weights is not None and same_channels else None),
        )
    except ValueError as error:
        raise ConfigError(f"data.mean, data.std: {error}") from None
    size = wanted or (known.size if known else DEFAULT_SIZE)
    name = model.name or (weights.model if weights is not None and known is None else None)
    locality = settled_locality(model, weights)
    if name is not None and name not in ENCODER_SIZES:
        of_checkpoint = weights.arguments if weights is not None and model.name is None else {}
        arguments = {**of_checkpoint, **model.arguments}
        return Backbone(size, channels, mean, std, None, name, arguments, locality=locality)
    if name is not None:
        shape = replace(configured_shape(model, size, channels), locality=locality)
    elif known is not None:
        shape = replace(known, size=size, channels=channels)
    else:
        raise ConfigError("model.name is not set, and no checkpoint tells it: model.name=vit_base, timm/resnet50, ...")
    if any(side % shape.patch_size for side in size):
        raise ConfigError(f"data.size={size} is not a multiple of the patch of {shape.patch_size} px")
    norm_follows_pooling = weights is not None and "fc_norm.weight" in weights.tensors
    return Backbone(size, channels, mean, std, shape, norm_follows_pooling=norm_follows_pooling)


def settled_locality(model: NetworkConfig, weights: Weights | None) -> bool:
    """Whether feed-forward layers hold a convolution: as in the checkpoint, or from scratch as configured.

    Raises:
        ConfigError: it is asked for, and the checkpoint has layers without.
    """
    if weights is None:
        return model.locality
    in_checkpoint = CONVOLUTION in weights.tensors
    if model.locality and not in_checkpoint:
        raise ConfigError(
            f"model.locality=true: {weights.origin.path} was trained without, and its feed-forward layers do not fit; "
            "leave model.locality out, or train from scratch (checkpoint=null)"
        )
    return in_checkpoint


def configured_shape(model: NetworkConfig, size: tuple[int, int], channels: int) -> ViTShape:
    """The shape of one of our named sizes, with the numbers that the configuration changes.

    Raises:
        ConfigError: a width that its heads do not divide.
    """
    named = ENCODER_SIZES[str(model.name)]
    width, heads = model.width or named.width, model.heads or named.heads
    if width % heads:
        raise ConfigError(f"model.width={width} must be a multiple of its {heads} heads")
    return ViTShape(size, model.patch_size, channels, width, model.depth or named.depth, heads, model.mlp_ratio)
