"""HOG targets against a NumPy rewrite in float64, scikit-image's histogram, and pictures with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from mae_et.ops import hog, hog_cells, hog_targets
from mae_et.sizes import target_values

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# A bin adds up to 256 magnitudes in float32, 6e-8 each, and is divided by a norm: 1.5e-7 seen, far less than a pixel.
TOLERANCE = 1e-5

# (H, W), patch, cell, channels, bins
CASES = [
    ((96, 96), 16, 8, 3, 9),
    ((160, 160), 16, 8, 3, 9),
    ((224, 224), 16, 8, 3, 9),
    ((98, 98), 14, 7, 3, 9),
    ((224, 224), 14, 7, 3, 9),
    ((28, 28), 4, 2, 1, 9),
    ((28, 28), 2, 2, 1, 9),
    ((48, 112), 16, 8, 3, 18),
    ((64, 32), 16, 4, 5, 9),
    ((32, 48), 16, 16, 1, 18),
    ((32, 32), 8, 4, 3, 12),
]


@pytest.fixture(params=["adding", "comparing"])
def either_pool(request, monkeypatch):
    """Both ways to pool, on a CPU: there it adds; other devices and compiled code compare."""
    if request.param == "comparing":
        monkeypatch.setattr(hog, "_pool_by_adding", hog._pool_by_comparing)


def photo_batch(shape: tuple[int, int], channels: int) -> torch.Tensor:
    """Crops of scikit-learn's two photos as uint8 `[2, channels, H, W]`."""
    stacked = np.concatenate([np.moveaxis(image, -1, 0) for image in load_sample_images().images])
    crops = [
        stacked[:channels, 150 : 150 + shape[0], 60 : 60 + shape[1]],
        stacked[-channels:, -shape[0] :, -shape[1] :],
    ]
    return torch.from_numpy(np.stack(crops))


def gradients(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    left = x[..., :-2, :-2] + 2 * x[..., 1:-1, :-2] + x[..., 2:, :-2]
    right = x[..., :-2, 2:] + 2 * x[..., 1:-1, 2:] + x[..., 2:, 2:]
    above = x[..., :-2, :-2] + 2 * x[..., :-2, 1:-1] + x[..., :-2, 2:]
    below = x[..., 2:, :-2] + 2 * x[..., 2:, 1:-1] + x[..., 2:, 2:]
    return left - right, above - below


def reference(images: np.ndarray, patch: int, cell: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets in float64, and which of them hold a pixel whose direction is an edge's to within rounding."""
    n, channels, height, width = images.shape
    gx, gy = gradients(images)
    turn = bins * np.arctan2(gx, gy) / np.pi
    image, channel, row, column = np.indices(images.shape)
    bin_index = np.floor(turn).astype(int) % bins
    histogram = np.zeros((n, channels, bins, height // cell, width // cell))
    np.add.at(histogram, (image, channel, bin_index, row // cell, column // cell), np.hypot(gx, gy))
    histogram /= np.maximum(np.sqrt((histogram**2).sum(2, keepdims=True)), 1e-12)
    # The reflected border makes many gradients exactly 0 along one axis: those are no matter of rounding.
    close = (np.abs(turn - np.round(turn)) < 1e-5) & (gx != 0) & (gy != 0)
    doubtful = close.reshape(n, channels, 1, height // cell, cell, width // cell, cell).any((4, 6))
    doubtful = np.broadcast_to(doubtful, histogram.shape)
    return by_patch(histogram, patch // cell), by_patch(doubtful, patch // cell)


def by_patch(cells: np.ndarray, k: int) -> np.ndarray:
    """`[N, C, bins, H, W]` of cells, k x k to a patch, as tokens in the documented order."""
    n, channels, bins, height, width = cells.shape
    tokens = np.zeros((n, height * width // k**2, channels * bins * k * k), dtype=cells.dtype)
    for c, b, cy, cx in np.ndindex(channels, bins, k, k):
        tokens[:, :, (c * bins + b) * k * k + cy * k + cx] = cells[:, c, b, cy::k, cx::k].reshape(n, -1)
    return tokens


@pytest.mark.usefixtures("either_pool")
@pytest.mark.parametrize(("shape", "patch", "cell", "channels", "bins"), CASES)
def test_photos(shape, patch, cell, channels, bins):
    images = photo_batch(shape, channels)
    targets = hog_targets(images, patch, cell, bins)
    expected, _ = reference(images.numpy(), patch, cell, bins)
    assert targets.shape == expected.shape
    assert targets.shape[-1] == target_values("hog", patch, channels, cell, bins)
    assert targets.dtype == torch.float32
    assert np.abs(targets.numpy() - expected).max() <= TOLERANCE


@pytest.mark.parametrize(("shape", "patch", "cell", "channels", "bins"), CASES)
def test_floats_are_used_unrounded(shape, patch, cell, channels, bins):
    images = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(1))
    targets = hog_targets(images, patch, cell, bins).numpy()
    expected, doubtful = reference(images.numpy(), patch, cell, bins)
    # A pixel on an edge to within rounding may fall on either side of it, and says nothing.
    assert doubtful.mean() < 0.02
    assert np.abs(targets - expected)[~doubtful].max() <= TOLERANCE


@pytest.mark.parametrize("bins", [4, 9, 12, 18])
def test_every_gradient_of_an_8_bit_image_gets_the_right_bin(bins):
    # All pairs of Sobel sums of 8-bit values: 4 million, the ones on an axis or a diagonal included.
    values = np.arange(-1020, 1021)
    gx, gy = (g.ravel() for g in np.meshgrid(values, values))
    expected = np.floor(bins * np.arctan2(gx, gy) / np.pi) % bins
    index = hog._direction_bins(torch.from_numpy(gx).float(), torch.from_numpy(gy).float(), bins).numpy()
    assert np.array_equal(index[(gx != 0) | (gy != 0)], expected[(gx != 0) | (gy != 0)])


@pytest.mark.parametrize("bins", [4, 8, 9, 12, 18])
@pytest.mark.parametrize("error", [-(2.0**-22), 2.0**-22])
def test_a_division_that_errs_in_its_last_places_changes_no_bin(bins, error):
    """By 2 to 4 units of a float32's last place: CUDA's approximate division, which compiled code uses, errs by 2."""
    values = torch.arange(-1020.0, 1021.0)
    gx, gy = torch.meshgrid(values, values, indexing="ij")
    assert torch.equal(hog._direction_bins(gx, gy * (1 + error), bins), hog._direction_bins(gx, gy, bins))


@pytest.mark.parametrize(("patch", "cell"), [(16, 8), (14, 7), (8, 4), (4, 2), (2, 2)])
def test_default_cell(patch, cell):
    images = photo_batch((112, 112), 3)
    assert torch.equal(hog_targets(images, patch), hog_targets(images, patch, cell))


def test_length_of_an_rgb_patch():
    assert hog_targets(torch.zeros(1, 3, 96, 96)).shape == (1, 36, 108)
    assert target_values("hog", 16, 3) == 108


def test_pictures_with_a_known_answer():
    ramp = torch.arange(16, dtype=torch.uint8).expand(1, 1, 16, 16)
    flat, across, down = (hog_targets(i, 16).view(9, 2, 2) for i in (ramp * 0, ramp, ramp.mT))
    one_bin = torch.eye(9)
    # Brighter to the right is a quarter turn, the middle bin of nine; brighter downwards is no turn, the first.
    assert torch.equal(flat, torch.zeros(9, 2, 2))
    torch.testing.assert_close(across, one_bin[4][:, None, None].expand(9, 2, 2))
    torch.testing.assert_close(down, one_bin[0][:, None, None].expand(9, 2, 2))


def test_normalised_images_equal_their_integers():
    images = photo_batch((96, 96), 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = hog_targets(images)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        normalised = ((images / 255 - mean) / std).to(dtype)
        assert torch.equal(hog_targets(normalised, mean=MEAN, std=STD), expected), dtype
    assert torch.equal(hog_targets(images, mean=MEAN, std=STD), expected)


def test_autocast_changes_nothing():
    images = photo_batch((96, 96), 3)
    for batch in (images, images.bfloat16()):
        expected = hog_targets(batch)
        with torch.autocast("cpu", torch.bfloat16):
            targets = hog_targets(batch)
        assert targets.dtype == torch.float32
        assert torch.equal(targets, expected)


def test_layout_of_the_batch_changes_nothing():
    images = photo_batch((96, 96), 3)
    expected = hog_targets(images)
    assert torch.equal(hog_targets(images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(hog_targets(torch.cat([images] * 20))[-2:], expected), "parts of a batch"


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (9, 3, 224, 224), (33, 3, 96, 160)])
def test_number_of_threads_changes_nothing(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(hog_targets(images, 4))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_traces_into_one_graph():
    images = photo_batch((32, 48), 3)
    compiled = torch.compile(lambda x: hog_targets(x, mean=MEAN, std=STD), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), hog_targets(images))


def test_carries_no_gradient():
    assert not hog_targets(torch.rand(1, 1, 16, 16, requires_grad=True)).requires_grad


def test_agrees_with_scikit_image_on_our_gradients():
    compiled = pytest.importorskip("skimage.feature._hoghistogram")
    images = photo_batch((96, 160), 3)
    cells = hog_cells(images, 8)
    gx, gy = gradients(images.numpy())
    for i, c in np.ndindex(2, 3):
        histogram = np.zeros((12, 20, 9))
        # Its angle is atan2 of the second argument over the first, in degrees; it returns means over cells.
        compiled.hog_histograms(gy[i, c].copy(), gx[i, c].copy(), 8, 8, 160, 96, 20, 12, 9, histogram)
        expected = np.moveaxis(histogram * 64, -1, 0)
        norm = np.sqrt((expected**2).sum(0))
        assert np.abs((cells[i, c].numpy() - expected) / np.maximum(norm, 1e-12)).max() <= TOLERANCE


@pytest.mark.parametrize("patch", [1, 5])
def test_patch_without_a_default_cell_is_refused(patch):
    with pytest.raises(ValueError, match=rf"patch_size {patch} is not a multiple of cell {patch // 2}"):
        hog_targets(torch.zeros(1, 1, 20, 20), patch)


def test_mistakes_are_refused():
    images = torch.zeros(1, 3, 100, 96)
    with pytest.raises(ValueError, match=r"100x96 do not divide into patches of 16 px.*96x96"):
        hog_targets(images)
    with pytest.raises(ValueError, match=r"100x96 do not divide into cells of 8 px"):
        hog_cells(images, 8)
    with pytest.raises(ValueError, match=r"patch_size 16 is not a multiple of cell 6"):
        hog_targets(images, 16, cell=6)
    with pytest.raises(ValueError, match="give both mean and std"):
        hog_cells(images, 4, mean=MEAN)
    with pytest.raises(ValueError, match=r"3 channels, mean has 1 numbers"):
        hog_cells(images, 4, mean=(0.5,), std=(0.5,))
