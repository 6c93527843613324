"""The simple feature pyramid against torch's functions in fp64, and its strides."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from mae_et.models.pyramid import SimplePyramid, pyramid_scales


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        (1, (4, 8, 16, 32)),
        (2, (4, 8, 16, 32)),
        (3, (6, 12, 24, 48)),
        (4, (4, 8, 16, 32)),
        (6, (6, 12, 24, 48)),
        (7, (7, 14, 28, 56)),
        (8, (4, 8, 16, 32)),
        (12, (6, 12, 24, 48)),
        (14, (7, 14, 28, 56)),
        (16, (4, 8, 16, 32)),
        (20, (5, 10, 20, 40)),
        (32, (8, 16, 32, 64)),
    ],
)
def test_strides_of_patches(patch, strides):
    assert tuple(patch / scale for scale in pyramid_scales(patch)) == strides


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over channels, written out."""
    centred = x - x.mean(1, keepdim=True)
    variance = (centred**2).mean(1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-6) * weight[:, None, None] + bias[:, None, None]


def level(x: torch.Tensor, scale: Fraction, given: list[torch.Tensor]) -> torch.Tensor:
    """One level from parameters in their order."""
    take = iter(given)
    if scale == 4:
        x = F.conv_transpose2d(x, next(take), next(take), stride=2)
        x = norm(x, next(take), next(take))
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
    if scale >= 2:
        x = F.conv_transpose2d(x, next(take), next(take), stride=2)
    for _ in range(scale.denominator.bit_length() - 1):
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        x = x.unflatten(3, (columns, 2)).amax(4).unflatten(2, (rows, 2)).amax(3)
    x = norm(F.conv2d(x, next(take)), next(take), next(take))
    x = norm(F.conv2d(x, next(take), padding=1), next(take), next(take))
    assert not list(take)
    return x


@pytest.mark.parametrize("patch", [16, 14, 4, 2])
@pytest.mark.parametrize("one", [True, False])
def test_levels_are_those_of_torchs_functions(patch, one):
    torch.manual_seed(0)
    scales = pyramid_scales(patch)
    pyramid = SimplePyramid(8, 6, scales).double()
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    maps = [torch.randn(2, 8, 16, 32, dtype=torch.float64) for _ in range(1 if one else 4)]
    for index, (found, scale) in enumerate(zip(pyramid(maps), scales)):
        assert found.shape == (2, 6, 16 * scale, 32 * scale)
        assert found.is_contiguous()
        given = list(pyramid.levels[index].parameters())
        # fp64 sums of at most 54 products of normal numbers, twice normalised.
        torch.testing.assert_close(found, level(maps[0 if one else index], scale, given), rtol=1e-9, atol=1e-9)
