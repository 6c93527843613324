"""The way to a detector's input and back, in evaluation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mae_et.data import detection_transforms
from mae_et.data.detection_transforms import FitTransform, paste_masks, unfit_boxes
from mae_et.data.views import FILL

SHAPES = [(60, 80), (97, 41), (31, 200), (240, 320), (1, 300), (64, 64)]
SIZES = [(64, 64), (48, 96), (130, 70)]


@pytest.mark.parametrize(("shape", "size"), list(product(SHAPES, SIZES)))
def test_fit_and_back(shape, size):
    boxes = np.array([[shape[1] // 5, shape[0] // 4, shape[1] - shape[1] // 3, shape[0]]])
    image = torch.zeros(1, *shape, dtype=torch.uint8)
    image[:, boxes[0, 1] : boxes[0, 3], boxes[0, 0] : boxes[0, 2]] = 255
    view, inner = FitTransform()(image, size)
    assert view.shape == (1, *size)
    assert any(side == limit for side, limit in zip(inner, size))
    # Whole px: each side to within a half, or to 1 px at least.
    scale = min(size[0] / shape[0], size[1] / shape[1])
    assert all(abs(side - max(1, whole * scale)) <= 0.5 for side, whole in zip(inner, shape))
    outside = torch.ones(size, dtype=torch.bool)
    outside[: inner[0], : inner[1]] = False
    assert (view[:, outside] == FILL).all()
    rows, columns = np.nonzero(view[0, : inner[0], : inner[1]].numpy() >= 128)
    found = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
    # What is found is rounded to px of the view; half of one, in px of the original.
    coarse = np.array([shape[1] / inner[1], shape[0] / inner[0]] * 2)
    assert (np.abs(unfit_boxes(found, inner, shape).numpy() - boxes) <= 0.6 * coarse).all()
    corners = torch.tensor([[0.0, 0.0, inner[1], inner[0]], [-9.0, -9.0, size[1] + 9.0, size[0] + 9.0]])
    expected = np.array([[0.0, 0.0, shape[1], shape[0]]] * 2)
    np.testing.assert_allclose(unfit_boxes(corners, inner, shape).numpy(), expected, rtol=1e-6)
    assert unfit_boxes(corners[:0], inner, shape).shape == (0, 4)


def test_fit_of_a_size_that_it_has_is_the_image():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view, inner = FitTransform()(image, (40, 60))
    assert inner == (40, 60)
    assert torch.equal(view, image)


def pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Probability at the centre of each px, fp64: bilinear between cells' centres, the last ones go on, 0 outside."""
    x1, y1, x2, y2 = box.astype(np.float64)
    cells = len(mask)
    out = np.zeros(size)
    for row, column in product(range(size[0]), range(size[1])):
        y, x = (row + 0.5 - y1) / (y2 - y1), (column + 0.5 - x1) / (x2 - x1)
        if not (0 <= y < 1 and 0 <= x < 1):
            continue
        v, u = (min(max(share * cells - 0.5, 0), cells - 1) for share in (y, x))
        top, left = min(int(v), cells - 2), min(int(u), cells - 2)
        upper, lower = (mask[r, left] * (left + 1 - u) + mask[r, left + 1] * (u - left) for r in (top, top + 1))
        out[row, column] = upper * (top + 1 - v) + lower * (v - top)
    return out


@pytest.mark.parametrize("size", [(30, 40), (64, 20)])
def test_paste_against_reference(size, monkeypatch):
    generator = np.random.default_rng(0)
    masks = generator.random((6, 28, 28)).astype(np.float32)
    corners = generator.random((6, 2)) * 20 - 5
    boxes = np.concatenate([corners, corners + generator.random((6, 2)) * 40 + 0.3], 1).astype(np.float32)
    monkeypatch.setattr(detection_transforms, "_PASTED", 2 * size[0] * size[1])  # three chunks
    result = paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), size)
    assert (result.dtype, result.shape) == (torch.uint8, (6, *size))
    for mask, box, one in zip(masks, boxes, result.numpy()):
        expected = pasted(mask, box, size)
        # float32 positions are off by 1e-6 of a box of 28 cells, which moves a probability by less than 1e-4.
        clear = np.abs(expected - 0.5) > 1e-4
        np.testing.assert_array_equal(one[clear], (expected >= 0.5)[clear])
    assert 0 < result.float().mean() < 1


def test_paste_of_a_full_mask_fills_its_box():
    boxes = [[10, 10, 20, 20], [3, 4, 6, 9], [0, 0, 40, 30], [39, 29, 40, 30]]
    result = paste_masks(torch.ones(4, 28, 28), torch.tensor(boxes).float(), (30, 40))
    expected = torch.zeros_like(result)
    for mask, (x1, y1, x2, y2) in zip(expected, boxes):
        mask[y1:y2, x1:x2] = 1
    assert torch.equal(result, expected)
    assert paste_masks(torch.ones(1, 28, 28), torch.tensor([[-9.0, -9, -2, -2]]), (30, 40)).sum() == 0
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (30, 40)).shape == (0, 30, 40)


def test_paste_agrees_with_torchvision_on_large_boxes():
    """Of which torchvision's rounding to whole px takes little: 1 px on a side of 200."""
    cells = torch.arange(28) - 13.5
    disc = torch.sigmoid(9 - (cells[:, None] ** 2 + cells**2).sqrt())[None]
    boxes = torch.tensor([[20.0, 10.0, 260.0, 210.0]])
    ours = paste_masks(disc, boxes, (240, 300))[0].bool()
    theirs = paste_masks_in_image(disc[:, None], boxes, (240, 300))[0, 0] >= 0.5
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97
