"""How alike two representations of the same images are: linear centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear CKA of two feature matrices whose rows are the same images.

    |Y'X|^2 / (|X'X| * |Y'Y|), Frobenius norms of the centred X and Y. Rotations, reflections, shifts and scaling by
    one number change nothing; linear maps that stretch directions unevenly do. Computed in float64. With few images
    for many dimensions it is biased upwards: unrelated Gaussian features of N images and D dimensions have about
    1 / (1 + N / D). Take several times as many images as dimensions.

    Args:
        first, second: [N, D1] and [N, D2] of any floating type.

    Returns:
        In [0, 1]; 1 for features that are equal up to the maps above.

    Raises:
        ValueError: the numbers of images differ, or all images have the same features.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3 and Table 1.
    """
    return float(cka_table([first], [second])[0, 0])


def cka_table(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    """`linear_cka` of every pair: float64 [len(first), len(second)]; see there."""
    columns = [(y, _norm(y)) for y in map(_centred, second)]
    table = np.empty((len(first), len(second)))
    for row, x in enumerate(map(_centred, first)):
        norm = _norm(x)
        for column, (y, other) in enumerate(columns):
            if len(x) != len(y):
                raise ValueError(f"features of {len(x)} and of {len(y)} images: give those of the same images")
            table[row, column] = _squared(x, y) / (norm * other)
    return table


def _centred(features: np.ndarray) -> np.ndarray:
    if not np.ptp(features, axis=0).any():
        raise ValueError("all images have the same features, and a similarity to those is not defined")
    values = features.astype(np.float64)
    return values - values.mean(axis=0)


def _norm(x: np.ndarray) -> float:
    """|X'X| of centred features."""
    return float(np.sqrt(_squared(x, x)))


def _squared(x: np.ndarray, y: np.ndarray) -> float:
    """|Y'X|^2 = <XX', YY'>, whichever has the smaller matrices."""
    images, width = len(x), max(x.shape[1], y.shape[1])
    if images < width:
        return float(np.sum((x @ x.T) * (y @ y.T)))
    return float(np.sum((y.T @ x) ** 2))
