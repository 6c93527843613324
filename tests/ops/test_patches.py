"""Patches in MAE's order: against a loop, and there and back."""

from __future__ import annotations

import pytest
import torch

from mae_et.ops import patchify, unpatchify


def patches_by_loop(images: torch.Tensor, p: int) -> torch.Tensor:
    n, c, height, width = images.shape
    tokens = torch.zeros(n, (height // p) * (width // p), p * p * c, dtype=images.dtype)
    for row in range(height):
        for column in range(width):
            for channel in range(c):
                token = (row // p) * (width // p) + column // p
                index = ((row % p) * p + column % p) * c + channel
                tokens[:, token, index] = images[:, channel, row, column]
    return tokens


@pytest.mark.parametrize(
    ("shape", "patch_size"), [((2, 3, 8, 12), 4), ((1, 1, 6, 4), 2), ((2, 5, 9, 3), 3), ((1, 3, 4, 6), 1)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_order_and_round_trip(shape, patch_size, dtype):
    # Up to 288 values of which few repeat, so that a misplaced one shows.
    images = torch.randperm(shape[0] * shape[1] * shape[2] * shape[3]).view(shape).to(dtype)
    tokens = patchify(images, patch_size)
    assert torch.equal(tokens, patches_by_loop(images, patch_size))
    grid = (shape[2] // patch_size, shape[3] // patch_size)
    assert torch.equal(unpatchify(tokens, grid, patch_size, shape[1]), images)


def test_indivisible_images_are_refused_with_a_size_that_works():
    with pytest.raises(ValueError, match=r"100x97 do not divide into patches of 16 px.*96x96"):
        patchify(torch.zeros(1, 3, 100, 97), 16)


def test_images_need_four_axes():
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], got \[3, 32, 32\]"):
        patchify(torch.zeros(3, 32, 32), 16)


@pytest.mark.parametrize("shape", [(2, 5, 48), (2, 6, 16), (6, 48)])
def test_tokens_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"do not make 2x3 patches of 4 px with 3 channels.*\[N, 6, 48\]"):
        unpatchify(torch.zeros(shape), (2, 3), 4, 3)
