"""Frozen features of a labelled set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from mae_et.data.loader import RequestDataset, build_loader
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source
from mae_et.data.transforms import EvalTransform


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


class _InOrder(Sampler[list[SampleRequest]]):
    """Requests for given indices, in batches."""

    def __init__(self, indices: list[int], size: tuple[int, int], batch: int):
        self.indices, self.size, self.batch = indices, size, batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for start in range(0, len(self.indices), self.batch):
            yield [SampleRequest(index, self.size, 0.0, 0) for index in self.indices[start : start + self.batch]]


def extract_features(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    indices: list[int],
    size: tuple[int, int],
    crop_fraction: float = 0.875,
    batch: int = 256,
    workers: int = 0,
) -> Features:
    """Features of centre crops.

    Args:
        embed: uint8 [N, C, H, W] to features [N, D] of any dtype.
        source: labelled images.
        indices: which of them.
        size: (height, width) in px of the crop.
        crop_fraction: share of the resized image that the crop keeps.
        batch, workers: of the loader.

    Raises:
        ValueError: an image has no label.
    """
    dataset = RequestDataset(source, EvalTransform(size, crop_fraction))
    loader = build_loader(dataset, _InOrder(indices, size, batch), workers, pin_memory=False)
    features, labels = [], []
    for images in loader:
        with torch.no_grad():
            features.append(embed(images.images).float().cpu())
        labels.append(images.labels)
    targets = torch.cat(labels).numpy()
    if (targets < 0).any():
        unlabelled = indices[int(np.argmax(targets < 0))]
        raise ValueError(
            f"{source.name} has no label for {source.describe(unlabelled)}: scores need a labelled set; "
            "set evaluation.source and evaluation.root, or evaluation.every=null"
        )
    return Features(torch.cat(features).numpy(), targets)


def pool(tokens: Tensor, pooling: str) -> Tensor:
    """[N, 1 + L, D] encoder output to [N, D]: the "mean" of the patches, or the class token ("cls")."""
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)
