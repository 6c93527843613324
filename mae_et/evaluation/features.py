"""Frozen features of a labelled set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Sampler

from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source
from mae_et.data.transforms import EvalTransform

EmbedOne = Callable[[Tensor], Tensor]
EmbedMany = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Features:
    """float32 features [N, D] and int64 labels [N] of N images."""

    features: np.ndarray
    labels: np.ndarray


def subset_indices(images: int, count: int | None, seed: int = 0) -> list[int]:
    """`count` of `images` indices, drawn once per seed and in rising order; None takes all."""
    if count is None or count >= images:
        return list(range(images))
    drawn = np.random.Generator(np.random.Philox(key=[seed, images])).choice(images, count, replace=False)
    return sorted(int(index) for index in drawn)


class InOrder(Sampler[list[SampleRequest]]):
    """Requests for given indices, in batches."""

    def __init__(self, indices: list[int], size: tuple[int, int], batch: int):
        self.indices, self.size, self.batch = indices, size, batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for start in range(0, len(self.indices), self.batch):
            yield [SampleRequest(index, self.size, 0.0, 0) for index in self.indices[start : start + self.batch]]


@overload
def stream_features(
    embed: EmbedOne,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Iterator[Features]: ...
@overload
def stream_features(
    embed: EmbedMany,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Iterator[dict[str, Features]]: ...
def stream_features(
    embed: EmbedOne | EmbedMany,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Iterator[Features] | Iterator[dict[str, Features]]:
    """Features of centre crops, a batch at a time: nothing is kept.

    Args:
        embed: uint8 [N, C, H, W] to features [N, D] of any dtype, or to several of them by name.
        source: labelled images.
        indices: which of them.
        size: (height, width) in px of the crop.
        crop_fraction: share of the resized image that the crop keeps.
        batch, workers: of the loader.

    Raises:
        ValueError: an image has no label.
    """
    dataset = RequestDataset(source, EvalTransform(size, crop_fraction))
    loader = build_loader(dataset, InOrder(indices, size, batch), workers, pin_memory=False)
    with batches_of(loader) as batches:
        for images in batches:
            labels = images.labels.numpy()
            if (labels < 0).any():
                unlabelled = int(images.indices[int(np.argmax(labels < 0))])
                raise ValueError(
                    f"{source.name} has no label for {source.describe(unlabelled)}: scores need a labelled set; "
                    "set evaluation.source and evaluation.root, or evaluation.every=null"
                )
            with torch.no_grad():
                embedded = embed(images.images)
            if isinstance(embedded, Tensor):
                yield Features(_to_numpy(embedded), labels)
            else:
                yield {name: Features(_to_numpy(features), labels) for name, features in embedded.items()}


@overload
def extract_features(
    embed: EmbedOne,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Features: ...
@overload
def extract_features(
    embed: EmbedMany,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> dict[str, Features]: ...
def extract_features(
    embed: EmbedOne | EmbedMany,
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Features | dict[str, Features]:
    """Features of centre crops, all of them in memory; the arguments and errors are those of `stream_features`.

    An `embed` that returns several features by name gives one `Features` per name, from one pass over the images.
    """
    one = False
    arrays: dict[str, np.ndarray] = {}
    labels = np.empty(len(indices), np.int64)
    done = 0
    chunks: Iterator[Any] = stream_features(embed, source, indices, size, crop_fraction, batch, workers)
    for chunk in chunks:
        one = isinstance(chunk, Features)
        parts: dict[str, Features] = {"": chunk} if one else chunk
        end = done + len(next(iter(parts.values())).labels)
        for name, part in parts.items():
            if name not in arrays:  # filled in place: joining parts at the end would hold everything twice
                arrays[name] = np.empty((len(indices), part.features.shape[1]), np.float32)
            arrays[name][done:end], labels[done:end] = part.features, part.labels
        done = end
    named = {name: Features(array, labels) for name, array in arrays.items()}
    return named[""] if one else named


def _to_numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()


def pool(tokens: Tensor, pooling: str) -> Tensor:
    """[N, 1 + L, D] encoder output to [N, D]: the "mean" of the patches, or the class token ("cls")."""
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)


def vit_features(net: nn.Module, images: Tensor, layers: int = 4) -> dict[str, Tensor]:
    """Class tokens and mean patch tokens of the last blocks, or the pooled features of a net that is no ViT.

    Tokens of every block pass the net's own final norm, as in DINOv2 (arXiv 2304.07193, released code's
    `get_intermediate_layers(norm=True)`). Where that norm follows the pooling (timm's `fc_norm`), patch tokens are
    averaged before it, so that "mean[-1]" is what the net's head sees.

    Args:
        net: a timm model in eval mode.
        images: normalised float [N, C, H, W].
        layers: how many of the last blocks.

    Returns:
        "cls[-i]" (where there is a class token) and "mean[-i]" [N, D] for i = `layers` .. 1, 1 being the last block;
        for other models "pooled" [N, D], what their classifier sees.

    Raises:
        ValueError: the net has fewer blocks.
    """
    if not isinstance(net, VisionTransformer):
        model: Any = net  # timm's models share these methods, but no base class
        return {"pooled": model.forward_head(model.forward_features(images), pre_logits=True).flatten(1)}
    if not 1 <= layers <= len(net.blocks):
        raise ValueError(f"layers={layers}: the network has {len(net.blocks)} blocks; take 1 to that many")
    found: Any = net.forward_intermediates(
        images, layers, return_prefix_tokens=True, stop_early=True, output_fmt="NLC", output_dict=True,
        intermediates_only=True,
    )  # fmt: skip
    prefixes = found.get("image_intermediates_prefix") if net.has_class_token else None
    pieces = {}
    for i, patches in enumerate(found["image_intermediates"]):
        if prefixes is not None:
            pieces[f"cls[{i - layers}]"] = net.fc_norm(net.norm(prefixes[i][:, 0]))
        pieces[f"mean[{i - layers}]"] = net.fc_norm(net.norm(patches).mean(dim=1))  # one of the two norms is identity
    return pieces


def linear_kinds(pieces: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What a linear probe may see, as concatenations of the pieces that `vit_features` names.

    DINOv2's choice: the class tokens of the last block or of all given blocks, with and without the last block's mean
    patch token ("cls1", "cls1+mean", "cls4", "cls4+mean"). Without a class token the means take its place ("mean1",
    "mean4"); any other piece is a kind of its own.
    """
    names = list(pieces)
    classes, means = ([name for name in names if name.startswith(kind)] for kind in ("cls[", "mean["))
    tokens, kind = (classes, "cls") if classes else (means, "mean")
    kinds: dict[str, tuple[str, ...]] = {}
    for count in dict.fromkeys([1, len(tokens)]) if tokens else ():
        kinds[f"{kind}{count}"] = tuple(tokens[-count:])
        if classes and means:
            kinds[f"cls{count}+mean"] = (*tokens[-count:], means[-1])
    kinds |= {name: (name,) for name in names if name not in classes and name not in means}
    return kinds
