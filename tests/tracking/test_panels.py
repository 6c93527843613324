"""Pictures for people: glyphs lie along edges, masked patches are grey, pixels are those that the model saw."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_et.tracking.panels import (
    HogSample,
    PixelSample,
    grey_masked,
    hog_cells,
    hog_glyphs,
    pixel_panel,
    stage_panel,
)


def sobel_hog(image: np.ndarray, cell: int = 8, bins: int = 9) -> np.ndarray:
    """HOG cells [C, bins, rows, cols] of a uint8 image [H, W, C] in fp64: SlowFast's HOGLayerC, re-derived.

    3 x 3 Sobel gradients (left minus right, upper minus lower; reflect padding), phi = atan2(gx, gy), hard bins
    floor(bins * phi / pi) mod bins weighted by magnitude, summed over cells, each cell's bins on unit length.
    """
    height, width, channels = image.shape
    hog = np.zeros((channels, bins, height // cell, width // cell))
    for channel in range(channels):
        x = np.pad(image[..., channel].astype(np.float64), 1, mode="reflect")
        gx = sum(w * (x[d : d + height, :-2] - x[d : d + height, 2:]) for d, w in enumerate((1, 2, 1)))
        gy = sum(w * (x[:-2, d : d + width] - x[2:, d : d + width]) for d, w in enumerate((1, 2, 1)))
        index = np.floor(np.arctan2(gx, gy) * bins / np.pi).astype(int) % bins
        rows, cols = np.indices((height, width)) // cell
        np.add.at(hog[channel], (index, rows, cols), np.hypot(gx, gy))
    return hog / np.maximum(np.sqrt(np.square(hog).sum(axis=1, keepdims=True)), 1e-12)


def sample(size=(96, 96), patch=16, channels=3, cell=8, masked=0.75, seed=0) -> HogSample:
    rng = np.random.default_rng(seed)
    height, width = size
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    rows, cols = height // patch, width // patch
    mask = (rng.permutation(rows * cols) < masked * rows * cols).reshape(rows, cols)
    target = sobel_hog(image, cell)
    return HogSample(image, mask, target, rng.random(target.shape) / 3, "train/a photo with a name.jpg")


def orientation(picture: np.ndarray) -> float:
    """The direction of a picture's principal axis, degrees counter-clockwise from the horizontal, in 0..180."""
    rows, cols = picture.shape
    y, x = np.mgrid[:rows, :cols]
    x, y = x - (cols - 1) / 2, (rows - 1) / 2 - y
    weight = picture / picture.sum()
    angle = 0.5 * math.atan2(2 * (weight * x * y).sum(), (weight * (x**2 - y**2)).sum())
    return math.degrees(angle) % 180


def difference_of_angles(left: float, right: float) -> float:
    return abs((left - right + 90) % 180 - 90)


@pytest.mark.parametrize("bins", [9, 18])
@pytest.mark.parametrize("cell_px", [12, 16, 33, 64])
def test_a_bar_lies_at_the_middle_of_its_bin(bins, cell_px):
    for index in range(bins):
        hog = np.zeros((bins, 1, 1))
        hog[index] = 1
        # Antialiasing on a 12 px cell shifts the principal axis by up to 2 degrees; bins are 10 or 20 degrees apart.
        assert difference_of_angles(orientation(hog_glyphs(hog, cell_px)), (index + 0.5) * 180 / bins) < 2


@pytest.mark.parametrize("edge", [5, 30, 50, 65, 90, 115, 130, 150, 170])
def test_a_bar_lies_along_the_edge_of_the_image_it_came_from(edge):
    """A straight edge at `edge` degrees counter-clockwise through an image: the glyph lies along it."""
    y, x = np.mgrid[:32, :32]
    angle = math.radians(edge)
    across = (x - 15.5) * math.sin(angle) + (y - 15.5) * math.cos(angle)
    # A smooth ramp: its gradient has one direction, without the staircase of a hard edge.
    image = np.rint(127.5 + 127.5 * np.tanh(across / 4)).astype(np.uint8)[..., None]
    glyph = hog_glyphs(sobel_hog(image, cell=32), 64)
    # Half a bin is 10 degrees: the most by which a bar at the middle of its bin can be off. Sobel's own error and
    # rounding to integers add some.
    assert difference_of_angles(orientation(glyph), edge) <= 12


def test_a_horizontal_edge_draws_more_along_the_horizontal_and_a_vertical_one_along_the_vertical():
    rows = np.zeros((16, 16, 1), np.uint8)
    rows[8:] = 255
    for image, axis in ((rows, 1), (rows.transpose(1, 0, 2), 0)):
        glyph = hog_glyphs(sobel_hog(image, cell=16), 32).astype(float)
        spread = [np.ptp(np.flatnonzero(glyph.sum(axis=1 - along))) for along in (0, 1)]
        assert spread[axis] > 3 * spread[1 - axis]


def test_brightness_and_length_grow_with_the_value():
    hog = np.zeros((9, 1, 5))
    hog[4, 0] = [0.0, 0.1, 0.4, 0.7, 1.0]
    cells = hog_glyphs(hog, 32).reshape(32, 5, 32).transpose(1, 0, 2)
    assert cells[0].max() == 0
    brightness = [int(cell.max()) for cell in cells]
    # The antialiased centre of a bar that is 1 px from full width reaches its value.
    np.testing.assert_allclose(brightness, 255 * hog[4, 0], atol=0.51)
    lengths = [np.count_nonzero(cell.any(axis=1)) for cell in cells]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 5
    assert 30 <= lengths[-1] <= 32


def test_channels_are_averaged_and_cells_stay_in_place():
    hog = np.zeros((3, 9, 2, 3))
    hog[:, 4, 1, 2] = [1.0, 0.5, 0.0]
    glyphs = hog_glyphs(hog, 16)
    assert glyphs.shape == (32, 48)
    assert glyphs.dtype == np.uint8
    np.testing.assert_array_equal(glyphs, hog_glyphs(hog.mean(axis=0), 16))
    assert glyphs[16:, 32:].any()
    assert not glyphs[:16].any()
    assert not glyphs[:, :32].any()


def test_values_outside_of_the_scale_are_drawn_as_its_ends():
    hog = np.zeros((9, 1, 4))
    hog[4, 0] = [-0.5, math.nan, 7.0, math.inf]
    clipped = np.zeros((9, 1, 4))
    clipped[4, 0] = [0, 0, 1, 1]
    np.testing.assert_array_equal(hog_glyphs(hog, 16), hog_glyphs(clipped, 16))


@pytest.mark.parametrize(("channels", "k", "grid"), [(3, 2, (4, 5)), (1, 1, (3, 3)), (1, 2, (2, 7))])
def test_tokens_become_cells_in_place(channels, k, grid):
    rows, cols = grid
    cells = np.random.default_rng(0).random((channels, 9, rows * k, cols * k))
    tokens = np.zeros((rows * cols, channels * 9 * k * k))
    for c, b, y, x in np.ndindex(cells.shape):
        tokens[(y // k) * cols + x // k, (c * 9 + b) * k * k + (y % k) * k + x % k] = cells[c, b, y, x]
    np.testing.assert_array_equal(hog_cells(tokens, grid, channels), cells)


@pytest.mark.parametrize(("shape", "grid"), [((36, 108), (6, 5)), ((36, 100), (6, 6)), ((36, 54), (6, 6))])
def test_tokens_that_fit_no_grid_are_refused(shape, grid):
    with pytest.raises(ValueError, match="do not fit"):
        hog_cells(np.zeros(shape), grid, channels=3)


@pytest.mark.parametrize("channels", [1, 3])
def test_masked_patches_are_grey_and_visible_ones_untouched(channels):
    given = sample(channels=channels)
    masked = grey_masked(given.image, given.mask)
    for row, col in np.ndindex(given.mask.shape):
        patch = np.s_[16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
        expected = np.full((16, 16, channels), 128) if given.mask[row, col] else given.image[patch]
        np.testing.assert_array_equal(masked[patch], expected)
    assert masked.dtype == np.uint8


def find(panel: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """Where a panel shows a tile exactly, as (row, col) of its corner."""
    tile = tile if tile.shape[2] == 3 else tile.repeat(3, axis=2)
    height, width = tile.shape[:2]
    # The brightest pixel, and then a diagonal through the tile, rule out nearly every place at little cost.
    anchor = np.unravel_index(tile.sum(axis=2).argmax(), (height, width))
    candidates = np.argwhere((panel == tile[anchor]).all(axis=2)) - anchor
    last = np.array(panel.shape[:2]) - (height, width)
    candidates = candidates[((candidates >= 0) & (candidates <= last)).all(axis=1)]
    for place in range(min(height, width)):
        candidates = candidates[(panel[tuple((candidates + place).T)] == tile[place, place]).all(axis=1)]
    return [(int(y), int(x)) for y, x in candidates if np.array_equal(panel[y : y + height, x : x + width], tile)]


def enlarged(image: np.ndarray, factor: int) -> np.ndarray:
    return np.kron(image, np.ones((factor, factor, 1), np.uint8))


@pytest.mark.parametrize(
    ("size", "patch", "cell", "channels", "factor"),
    [
        ((96, 96), 16, 8, 3, 3),
        ((160, 160), 16, 8, 3, 2),
        ((28, 28), 4, 4, 1, 10),
        ((64, 96), 16, 8, 3, 3),
        ((320, 320), 32, 8, 3, 2),
    ],
)
def test_a_stage_panel_shows_exact_pixels_in_equal_tiles(size, patch, cell, channels, factor, tmp_path):
    given = [sample(size, patch, channels, cell, seed=seed) for seed in (0, 1)]
    path = tmp_path / "pictures" / "panel.png"
    stage_panel(path, given, title="step 1,200")
    panel = np.array(Image.open(path))
    assert panel.dtype == np.uint8
    assert panel.shape[2] == 3
    width = size[1] * factor
    rows = []
    for one in given:
        (input_place,) = find(panel, enlarged(one.image, factor))
        (masked_place,) = find(panel, enlarged(grey_masked(one.image, one.mask), factor))
        glyphs = hog_glyphs(one.target, cell * factor)[..., None]
        (target_place,) = find(panel, glyphs)
        assert input_place[0] == masked_place[0] == target_place[0]
        gap = masked_place[1] - input_place[1] - width
        assert target_place[1] - masked_place[1] - width == gap > 0
        assert target_place[1] + 2 * width + gap < panel.shape[1]
        answer = panel[target_place[0] :, target_place[1] + width + gap :][: size[0] * factor, :width]
        check_answer(answer.astype(int), one, patch * factor, cell * factor)
        rows.append(input_place[0])
    assert rows[1] - rows[0] > size[0] * factor


def check_answer(answer: np.ndarray, one: HogSample, patch_px: int, cell_px: int) -> None:
    """Masked patches hold the prediction's bars, in orange on black; visible ones the target's, dimmed, in grey."""
    prediction, target = hog_glyphs(one.prediction, cell_px), hog_glyphs(one.target, cell_px)
    for row, col in np.ndindex(one.mask.shape):
        place = np.s_[row * patch_px : (row + 1) * patch_px, col * patch_px : (col + 1) * patch_px]
        red, blue = answer[place][..., 0], answer[place][..., 2]
        if one.mask[row, col]:
            # Orange is (255, 176, 0): red equals the glyph's brightness.
            np.testing.assert_array_equal(red, prediction[place])
            assert not blue.any()
        else:
            assert red.max() < 140
            assert blue.min() > 40
            # Monotone in the target's glyph: brighter bars stay brighter.
            order = np.argsort(target[place], axis=None)
            assert (np.diff(red.ravel()[order]) >= 0).all()


def test_a_pixel_panel_pastes_the_prediction_among_the_visible_patches(tmp_path):
    base = sample()
    wanted = np.random.default_rng(5).random(base.image.shape) * 1.4 - 0.2
    wanted[0, 0] = math.nan
    given = PixelSample(base.image, base.mask, wanted, base.name)
    pixel_panel(tmp_path / "panel.png", [given])
    panel = np.array(Image.open(tmp_path / "panel.png"))
    expected = base.image.copy()
    mask = base.mask.repeat(16, axis=0).repeat(16, axis=1)
    expected[mask] = np.rint(np.clip(np.nan_to_num(wanted[mask], nan=0.0), 0, 1) * 255)
    (input_place,) = find(panel, enlarged(base.image, 3))
    (place,) = find(panel, enlarged(expected, 3))
    assert place[0] == input_place[0]
    assert place[1] > input_place[1] + 2 * 288


def test_a_long_name_and_title_are_cut_to_the_panel(tmp_path):
    given = replace(sample(), name="a/very/long/folder/" * 40 + "end.jpg")
    stage_panel(tmp_path / "long.png", [given], title="title " * 100)
    stage_panel(tmp_path / "short.png", [sample()], title="title")
    long, short = (np.array(Image.open(tmp_path / name)) for name in ("long.png", "short.png"))
    assert long.shape == short.shape
    for panel in (long, short):
        border = np.concatenate([panel[:8].ravel(), panel[-8:].ravel(), panel[:, :8].ravel(), panel[:, -8:].ravel()])
        assert (border == 255).all()


@pytest.mark.parametrize("masked", [0.0, 1.0])
def test_nothing_or_everything_masked_is_drawn(masked, tmp_path):
    stage_panel(tmp_path / "panel.png", [sample(masked=masked)])
    assert np.array(Image.open(tmp_path / "panel.png")).shape[1] > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((96, 96, 4), np.uint8)}, "1 or 3 channels"),
        ({"image": np.zeros((96, 96, 3), np.float32)}, "uint8"),
        ({"mask": np.zeros((5, 6), bool)}, "square patches"),
        ({"mask": np.zeros((6, 12), bool)}, "square patches"),
        ({"target": np.zeros((3, 9, 12, 11))}, "must both be"),
        ({"target": np.zeros((3, 9, 9, 9)), "prediction": np.zeros((3, 9, 9, 9))}, "evenly"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage_panel(tmp_path / "panel.png", [replace(sample(), **change)])
    assert not list(tmp_path.iterdir())


def test_a_panel_is_of_one_stage(tmp_path):
    with pytest.raises(ValueError, match="one stage"):
        stage_panel(tmp_path / "panel.png", [sample((96, 96)), sample((160, 160))])
    with pytest.raises(ValueError, match="at least one"):
        stage_panel(tmp_path / "panel.png", [])
    base = sample()
    with pytest.raises(ValueError, match="reconstruction"):
        pixel_panel(tmp_path / "p.png", [PixelSample(base.image, base.mask, np.zeros((32, 32, 3)))])


def test_photos_give_a_panel(shared_data, tmp_path):
    """On real photos, of which the target's bars are dense: the mean brightness of glyphs is well above nothing."""
    photos = sorted((shared_data / "pennfudan").rglob("*.jpg"))[:2]
    given = []
    for path in photos:
        image = np.array(Image.open(path).convert("RGB").resize((160, 160)))
        given.append(replace(sample((160, 160)), image=image, target=sobel_hog(image), name=Path(path).name))
    stage_panel(tmp_path / "panel.png", given, title="photos")
    panel = np.array(Image.open(tmp_path / "panel.png"))
    for one in given:
        assert len(find(panel, enlarged(one.image, 2))) == 1
        assert hog_glyphs(one.target, 16).mean() > 10
