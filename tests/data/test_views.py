from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.data.views import FILL, Window, clip_boxes, draw_window, view_boxes, view_image, view_masks


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    ("box", "inner"), [((3, 5, 40, 50), (17, 20)), ((0, 9, 60, 30), (64, 48)), ((7, 0, 9, 80), (1, 8))]
)
def test_image_is_pils_antialiased_resize_of_the_box(box, inner, mirrored, innermost):
    """Nothing from outside of the box gets in; what PIL and torch round differs by one level."""
    image = noise(60, 80, 3).permute(2, 0, 1)
    top, left, height, width = box
    cut = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[top : top + height, left : left + width])
    expected = np.asarray(Image.fromarray(cut).resize(inner[::-1], Image.Resampling.BILINEAR)).astype(int)
    if mirrored:
        expected = expected[:, ::-1]
    view = view_image(image if innermost else image.contiguous(), Window(box, inner, mirrored), (64, 50))
    assert np.abs(view[:, : inner[0], : inner[1]].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert (view[:, inner[0] :] == FILL).all()
    assert (view[:, :, inner[1] :] == FILL).all()


def test_masks_of_the_whole_at_their_own_size_are_themselves():
    masks = noise(2, 9, 7)
    whole = Window((0, 0, 9, 7), (9, 7), mirrored=False)
    view = view_masks(masks, whole, (9, 7), fill=1)
    assert torch.equal(view, masks)
    view.zero_()
    assert masks.any()  # a copy
    assert torch.equal(view_masks(masks, whole._replace(mirrored=True), (9, 7), fill=1), masks.flip(-1))
    assert torch.equal(view_masks(masks, whole._replace(inner=(18, 14)), (18, 14), 1)[:, ::2, 1::2], masks)


def test_the_box_is_the_canvas():
    window = Window((10, 20, 30, 40), (60, 100), mirrored=False)
    boxes = torch.tensor([[20.0, 10, 60, 40], [30, 10, 40, 25], [0, 0, 20, 10]])
    expected = torch.tensor([[0.0, 0, 100, 60], [25, 0, 50, 30], [-50, -20, 0, 0]])
    assert torch.equal(view_boxes(boxes, window), expected)
    mirrored = torch.tensor([[0.0, 0, 100, 60], [50, 0, 75, 30], [100, -20, 150, 0]])
    assert torch.equal(view_boxes(boxes, window._replace(mirrored=True)), mirrored)
    assert view_boxes(boxes[:0], window).shape == (0, 4)


def test_clipping():
    boxes = torch.tensor([[-3.0, -4, 5, 6], [2, 1, 99, 98]])
    assert clip_boxes(boxes, (20, 30)).tolist() == [[0, 0, 5, 6], [2, 1, 30, 20]]


@pytest.mark.parametrize(
    ("scale", "draws", "expected"),
    [
        (0.5, (0.9, 0.9), Window((0, 0, 40, 80), (20, 40), mirrored=False)),
        (1.0, (0.0, 0.999), Window((0, 16, 40, 64), (40, 64), mirrored=False)),
        (4.0, (0.0, 0.999), Window((0, 64, 16, 16), (64, 64), mirrored=False)),
        (4.0, (0.5, 0.0), Window((12, 0, 16, 16), (64, 64), mirrored=False)),
        (0.001, (0.5, 0.5), Window((0, 0, 40, 80), (1, 1), mirrored=False)),
        (1000.0, (0.5, 0.5), Window((20, 40, 1, 1), (64, 64), mirrored=False)),
    ],
)
def test_windows(scale, draws, expected):
    """An image of 40 x 80 px on a canvas of 64 x 64; every offset, the last one too, is as likely."""
    assert draw_window((40, 80), scale, (64, 64), mirrored=False, draws=iter(draws)) == expected
