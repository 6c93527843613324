"""Sin-cos positions against a NumPy rewrite in float64, and interpolation against timm and a matrix of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from mae_et.models.posembed import sincos_positions

# Computed in float64 and rounded once: half a unit in the last place of values up to 1 is 3e-8.
TOLERANCE = 6e-8

GRIDS = [(14, 14), (6, 6), (10, 10), (3, 5), (5, 3), (1, 7), (16, 4), (1, 1)]
PAIRS = [((6, 6), (14, 14)), ((10, 10), (14, 14)), ((3, 8), (5, 9)), ((8, 3), (5, 9)), ((4, 6), (6, 4))]


def mae_layout(rows: Sequence[float], columns: Sequence[float], width: int) -> np.ndarray:
    """MAE's table, number by number: [sin x, cos x, sin y, cos y], each of a quarter of the width."""
    quarter = width // 4
    table = np.zeros((1 + len(rows) * len(columns), width))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            for k in range(quarter):
                frequency = 1 / 10000 ** (k / quarter)
                entry = table[1 + i * len(columns) + j]
                entry[k], entry[quarter + k] = math.sin(x * frequency), math.cos(x * frequency)
                entry[2 * quarter + k], entry[3 * quarter + k] = math.sin(y * frequency), math.cos(y * frequency)
    return table


def integers(grid: tuple[int, int], width: int) -> np.ndarray:
    return mae_layout(range(grid[0]), range(grid[1]), width)


def deviation(table: torch.Tensor, expected: np.ndarray) -> float:
    assert table.shape == expected.shape
    assert table.dtype == torch.float32
    return float(np.abs(table.double().numpy() - expected).max())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [4, 24, 192])
@pytest.mark.parametrize("kind", ["from_final", "native", "interp"])
def test_final_grid_has_the_layout_of_mae(grid, width, kind):
    expected = integers(grid, width)
    assert deviation(sincos_positions(grid, width, grid, kind), expected) <= TOLERANCE
    assert deviation(sincos_positions(grid, width, None, kind), expected) <= TOLERANCE


@pytest.mark.parametrize(("grid", "final"), PAIRS)
@pytest.mark.parametrize("kind", ["from_final", "native", "interp"])
def test_class_token_is_zero(grid, final, kind):
    assert torch.equal(sincos_positions(grid, 32, final, kind)[0], torch.zeros(32))


@pytest.mark.parametrize(("grid", "final"), PAIRS)
def test_from_final_has_the_stated_coordinates(grid, final):
    rows, columns = ([(i + 0.5) * G / g - 0.5 for i in range(g)] for g, G in zip(grid, final))
    assert deviation(sincos_positions(grid, 32, final, "from_final"), mae_layout(rows, columns, 32)) <= TOLERANCE


def test_from_final_names_a_place_in_the_picture():
    # The middle patch of three covers the place of the one patch: at an odd ratio centres fall on centres.
    fine = sincos_positions((9, 15), 32)[1:].view(9, 15, 32)
    coarse = sincos_positions((3, 5), 32, (9, 15))[1:].view(3, 5, 32)
    torch.testing.assert_close(coarse, fine[1::3, 1::3], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("grid", "final"), PAIRS)
def test_native_counts_its_own_patches(grid, final):
    assert deviation(sincos_positions(grid, 32, final, "native"), integers(grid, 32)) <= TOLERANCE


@pytest.mark.parametrize(("grid", "final"), PAIRS)
def test_interp_is_the_resampling_of_timm(grid, final):
    table = torch.from_numpy(integers(final, 32)).float()[None]
    expected = resample_abs_pos_embed(table, list(grid), list(final), num_prefix_tokens=1)[0]
    # The two tables may differ in the last place; cubic weights add up to 1.6 in size over the two axes.
    torch.testing.assert_close(sincos_positions(grid, 32, final, "interp"), expected, rtol=0, atol=2e-7)


def cubic_weights(count: int, final: int) -> np.ndarray:
    """Antialiased bicubic interpolation (a = -1/2) of `final` samples at `count` half-pixel centres, as a matrix."""
    scale = final / count
    distance = np.abs(np.arange(final) + 0.5 - (np.arange(count)[:, None] + 0.5) * scale) / max(scale, 1)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("grid", "final"), [((6, 6), (14, 14)), ((3, 8), (5, 9)), ((4, 6), (6, 4))])
def test_interp_is_antialiased_bicubic(grid, final):
    table = integers(final, 32)[1:].reshape(*final, 32)
    rows, columns = (cubic_weights(g, G) for g, G in zip(grid, final))
    expected = np.einsum("ih,jw,hwd->ijd", rows, columns, table).reshape(-1, 32)
    patches = sincos_positions(grid, 32, final, "interp")[1:].double().numpy()
    # torch computes weights and sums in float32: up to 13 samples an axis, 1e-7 each.
    assert np.abs(patches - expected).max() <= 2e-6


@pytest.mark.parametrize("width", [2, 6, 30, 193])
def test_width_must_divide_by_four(width):
    with pytest.raises(ValueError, match=rf"multiple of 4; got {width}"):
        sincos_positions((2, 2), width)


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'learned'; known: from_final, native, interp"):
        sincos_positions((2, 2), 8, kind="learned")  # pyright: ignore[reportArgumentType]
