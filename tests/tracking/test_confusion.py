"""The picture of a confusion matrix: what it shows of few and of many classes, and that nothing is cut off."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_et.tracking.confusion import (
    _percent,
    _shorten,
    confusion_picture,
    merge_blocks,
    most_confused,
    row_shares,
)


def confusion(classes: int, images: int = 40, accuracy: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(classes)
    shares = rng.dirichlet(np.full(classes, 0.1), classes) * (1 - accuracy) + accuracy * np.eye(classes)
    return np.stack([rng.multinomial(images, row / row.sum()) for row in shares])


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB")).astype(int)


NAMES = {
    "plain": lambda i: f"class {i}",
    "long": lambda i: f"n{i:08d}-Some_long_name of {i}",
    "signs": lambda i: f"$\\frac{i}$ %_^ <b>",
    "no glyphs": lambda i: f"手袋 {i}",
}


@pytest.mark.parametrize("classes", [2, 20, 40, 41, 1000])
def test_a_picture_fits_a_screen_with_nothing_at_its_border(classes, tmp_path):
    path = tmp_path / "pictures" / "confusion.png"
    confusion_picture(path, confusion(classes), [NAMES["long"](i) for i in range(classes)], title="a run")
    picture = pixels(path)
    assert max(picture.shape) < 2100
    marked = picture.min(axis=2) < 250
    assert marked.any()
    for border in (marked[:5], marked[-5:], marked[:, :5], marked[:, -5:]):
        assert not border.any()


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_can_be_drawn(kind, tmp_path):
    confusion_picture(tmp_path / "c.png", confusion(3), [NAMES[kind](i) for i in range(3)], title="$")
    assert (pixels(tmp_path / "c.png").min(axis=2) < 250).any()


def coloured(path) -> tuple[int, int]:
    """Pixels in the colours of right (bluish) and of wrong predictions (reddish), without the two scales."""
    picture = pixels(path)
    red, blue = picture[..., 0], picture[..., 2]
    return int((blue - red > 40).sum()), int((red - blue > 40).sum())


@pytest.mark.parametrize("classes", [5, 60, 600])
def test_right_is_blue_and_wrong_is_orange(classes, tmp_path):
    names = [str(i) for i in range(classes)]
    # Every image of class 2i is put in 2i + 1 and the other way round; an odd one out is right.
    swapped = np.zeros((classes, classes), int)
    swapped[np.arange(classes), [min(i ^ 1, classes - 1) for i in range(classes)]] = 10
    confusion_picture(tmp_path / "right.png", 10 * np.eye(classes, dtype=int), names)
    confusion_picture(tmp_path / "wrong.png", swapped, names)
    right, wrong = coloured(tmp_path / "right.png"), coloured(tmp_path / "wrong.png")
    assert right[0] - wrong[0] > 500
    assert wrong[1] - right[1] > 500


@pytest.mark.parametrize("classes", [6, 50])
def test_a_row_without_images_is_grey(classes, tmp_path):
    matrix = confusion(classes)
    counts = []
    for empty in (False, True):
        if empty:
            matrix[3] = 0
        confusion_picture(tmp_path / "c.png", matrix, [str(i) for i in range(classes)])
        counts.append((pixels(tmp_path / "c.png") == [0xD9, 0xDD, 0xE2]).all(axis=2).sum())
    # A row of 6 cells of 50 x 50 px, or of 50 of 11 x 11, less the diagonals' and grid's pixels.
    assert counts[1] - counts[0] > 4000


def test_no_images_at_all_can_be_drawn(tmp_path):
    for classes in (4, 44):
        confusion_picture(tmp_path / "c.png", np.zeros((classes, classes), int), ["x"] * classes)


@pytest.mark.parametrize(("matrix", "names"), [(np.ones((2, 3)), 2), (np.ones((1, 1)), 1), (np.ones((3, 3)), 2)])
def test_what_is_no_confusion_matrix_is_refused(matrix, names, tmp_path):
    with pytest.raises(ValueError, match="a name for each"):
        confusion_picture(tmp_path / "c.png", matrix, ["x"] * names)


def test_the_most_confused_classes_come_in_pairs():
    matrix = 100 * np.eye(9, dtype=int)
    matrix[7, 2], matrix[2, 7] = 3, 3  # 6 images between 2 and 7
    matrix[4, 0] = 5
    matrix[7, 8] = 4
    matrix[1, 3] = 4
    assert most_confused(matrix, 20) == [2, 7, 0, 4, 1, 3, 8]
    assert most_confused(matrix, 6) == [2, 7, 0, 4, 1, 3]
    # A pair that has no room is passed over, not split.
    assert most_confused(matrix, 5) == [2, 7, 0, 4, 8]
    assert most_confused(100 * np.eye(9, dtype=int), 20) == []


def test_shares_are_of_the_row():
    shares = row_shares(np.array([[3, 1, 0], [0, 0, 0], [1, 1, 2]]))
    np.testing.assert_array_equal(shares, [[0.75, 0.25, 0], [np.nan] * 3, [0.25, 0.25, 0.5]])


@pytest.mark.parametrize(("classes", "cells", "block"), [(7, 7, 1), (7, 4, 2), (1000, 275, 4), (301, 275, 2)])
def test_blocks_show_the_largest_error_and_the_mean_of_what_is_right(classes, cells, block):
    rng = np.random.default_rng(0)
    shares = rng.random((classes, classes))
    shares[3] = np.nan
    wrong, right = merge_blocks(shares, cells)
    count = -(-classes // block)
    assert wrong.shape == (count, count)
    assert count <= cells
    off = np.where(np.eye(classes, dtype=bool), 0.0, shares)
    off[3] = np.nan
    for row, column in [(0, 0), (1, 2), (3 // block, 0), (count - 1, count - 1)]:
        part = off[row * block : (row + 1) * block, column * block : (column + 1) * block]
        expected = part[~np.isnan(part)].max() if (~np.isnan(part)).any() else np.nan
        np.testing.assert_equal(wrong[row, column], expected)
    for row in (0, 3 // block, count - 1):
        diagonal = np.diag(shares)[row * block : (row + 1) * block]
        present = diagonal[~np.isnan(diagonal)]
        # Sums of four float64: their order changes the last bit.
        np.testing.assert_allclose(right[row], present.mean() if len(present) else np.nan, rtol=1e-14)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0001, "<1"), (0.0099, "<1"), (0.01, "1"), (0.506, "51"), (0.99, "99"), (0.9901, ">99"), (1.0, "100")],
)
def test_what_is_nearly_0_or_100_does_not_look_so(share, text):
    assert _percent(share) == text


def test_long_names_keep_both_ends():
    short = _shorten("n02085620-a_very_long_name_of_a_Chihuahua")
    assert len(short) == 24
    assert short.startswith("n02085620")
    assert short.endswith("Chihuahua")
    assert _shorten("x" * 24) == "x" * 24
