"""Linear CKA against its definition by kernels, values that are known, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest

from mae_et.evaluation.similarity import cka_table, linear_cka

RNG = np.random.default_rng(0)
SHAPES = [(50, 8, 8), (50, 8, 3), (20, 30, 5), (20, 5, 30), (12, 40, 50), (3, 1, 2)]
# A few thousand products in float64, of numbers near 1.
ERROR = 1e-12


def by_kernels(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = XX', L = YY', centred as kernels are (arXiv 1905.00414)."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    kernels = [z.astype(np.float64) @ z.T.astype(np.float64) for z in (x, y)]

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ centre @ b @ centre) / (n - 1) ** 2

    return hsic(*kernels) / np.sqrt(hsic(kernels[0], kernels[0]) * hsic(kernels[1], kernels[1]))


def features(images: int, width: int, other: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets that share a part, far from zero mean."""
    shared = RNG.standard_normal((images, max(width, other)))
    x, y = (shared[:, :d] + 0.7 * RNG.standard_normal((images, d)) + 3 for d in (width, other))
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize(("images", "width", "other"), SHAPES)
def test_equals_the_definition(images, width, other):
    x, y = features(images, width, other)
    assert linear_cka(x, y) == pytest.approx(by_kernels(x, y), abs=ERROR)
    assert linear_cka(x, x) == pytest.approx(1, abs=ERROR)
    assert 0 <= linear_cka(x, y) < 0.999


def test_known_values():
    a, b = np.array([1.0, -1, 1, -1]), np.array([1.0, 1, -1, -1])  # centred, orthogonal, of one length
    assert linear_cka(a[:, None], b[:, None]) == pytest.approx(0, abs=ERROR)
    # One dimension each: the squared correlation, here (3/5)^2.
    assert linear_cka(a[:, None], (3 * a + 4 * b)[:, None]) == pytest.approx(0.36, abs=ERROR)
    # One of two equal dimensions: 1 / (sqrt(2) * 1).
    assert linear_cka(np.stack([a, b], axis=1), a[:, None]) == pytest.approx(1 / np.sqrt(2), abs=ERROR)


@pytest.mark.parametrize(("images", "width", "other"), SHAPES[:5])
def test_rotations_scale_and_shifts_change_nothing_and_stretching_does(images, width, other):
    x, y = (z.astype(np.float64) for z in features(images, width, other))
    expected = linear_cka(x, y)
    turn, _ = np.linalg.qr(RNG.standard_normal((other, other)))
    order = RNG.permutation(images)
    assert linear_cka(x, y @ turn) == pytest.approx(expected, abs=ERROR)
    assert linear_cka(7.5 * x, -0.01 * y) == pytest.approx(expected, abs=ERROR)
    assert linear_cka(x + 4, y - RNG.standard_normal(other)) == pytest.approx(expected, abs=ERROR)
    assert linear_cka(x[order], y[order]) == pytest.approx(expected, abs=ERROR)
    assert linear_cka(y, x) == pytest.approx(expected, abs=ERROR)
    assert abs(linear_cka(x, y * np.geomspace(1, 100, other)) - expected) > 1e-3
    assert linear_cka(x[order], y) < expected


def test_unrelated_features_are_as_alike_as_documented():
    x, y = RNG.standard_normal((2, 900, 300))
    # The mean over draws is N D^2 / (N^2 D + N D^2) to first order; draws of this size lie within a hundredth of it.
    assert linear_cka(x, y) == pytest.approx(1 / (1 + 900 / 300), abs=0.01)


def test_a_table_holds_every_pair():
    first = [RNG.standard_normal((15, d)) for d in (3, 20)]
    second = [RNG.standard_normal((15, d)) for d in (4, 5, 30)]
    table = cka_table(first, second)
    expected = [[linear_cka(x, y) for y in second] for x in first]
    np.testing.assert_allclose(table, expected, atol=ERROR)
    assert len(set(table.ravel())) == 6


def test_refusals():
    with pytest.raises(ValueError, match="features of 4 and of 5 images"):
        linear_cka(np.eye(4), np.eye(5))
    with pytest.raises(ValueError, match="same features"):
        linear_cka(np.eye(3), np.full((3, 2), 0.1))  # whose mean is rounded
