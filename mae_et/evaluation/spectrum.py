"""What a network makes of filtered images: accuracy by the frequencies that are left in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from mae_et.evaluation.features import Features
from mae_et.evaluation.knn import knn_accuracy
from mae_et.evaluation.probe import FittedProbe
from mae_et.ops.filters import high_pass, low_pass

Kind = Literal["none", "low", "high"]
Embed = Callable[[Tensor], Tensor]


class Filter(NamedTuple):
    """A circular filter: its kind, and its radius in cycles over the image's shorter side (None: no filter)."""

    kind: Kind
    radius: float | None


def default_radii(size: tuple[int, int], count: int = 8) -> list[float]:
    """At most `count` whole radii from 2 to half the shorter side of (height, width) px, in equal ratios."""
    half = max(min(size) // 2, 2)
    return sorted({float(round(radius)) for radius in np.geomspace(2, half, count)})


def filters(radii: Sequence[float]) -> list[Filter]:
    """No filter, then a low-pass and a high-pass filter of each radius."""
    return [Filter("none", None), *(Filter(kind, radius) for kind in ("low", "high") for radius in radii)]


def filtered(images: Tensor, how: Filter, mean: Tensor) -> Tensor:
    """Images as a filter leaves them.

    Args:
        images: uint8, or float in [0, 1], [N, C, H, W].
        how: the filter.
        mean: of the network's normalisation, [C, 1, 1]. High-pass images, whose own mean is gone, get this one: the
            network then sees zeros where they are flat, and learns nothing of how bright the image was.

    Returns:
        float32 [N, C, H, W] on the same scale, not clamped; without a filter, the images as they came.
    """
    if how.kind == "none" or how.radius is None:
        return images
    return low_pass(images, how.radius) if how.kind == "low" else high_pass(images, how.radius) + mean


def embed_filtered(embed: Embed, wanted: Sequence[Filter], mean: Tensor, images: Tensor) -> dict[str, Tensor]:
    """What a network gives for one batch [N, C, H, W] under each filter, by `key`; every image is read once."""
    images = images.to(mean.device, non_blocking=True)
    return {key(how): embed(filtered(images, how, mean)) for how in wanted}


def key(how: Filter) -> str:
    """A filter's name: "none", "low 8", "high 2.5"."""
    return how.kind if how.radius is None else f"{how.kind} {how.radius:g}"


Scores = dict[str, float]


def classifier_scores(logits: Features) -> Scores:
    """Top-1 in [0, 1] of logits [N, K]."""
    return {"top1": float((logits.features.argmax(axis=1) == logits.labels).mean())}


class FrozenScores:
    """Scores of a frozen encoder on other images than those that its classifiers learn from.

    Args:
        train: features and labels of unfiltered images; kNN searches them, and the logistic probe is fitted to them.
        neighbours: values of k.
        probe: whether there is a probe.
    """

    def __init__(self, train: Features, neighbours: Sequence[int], probe: bool) -> None:
        self.train, self.neighbours = train, neighbours
        self.probe = FittedProbe(train) if probe else None

    def __call__(self, test: Features) -> Scores:
        """`{"knn20": accuracy, ..., "probe": accuracy}` in [0, 1]."""
        scores = {f"knn{k}": value for k, value in knn_accuracy(self.train, test, self.neighbours).items()}
        return scores if self.probe is None else {**scores, "probe": self.probe.accuracy(test)}
