"""The low-frequency crop against a Fourier transform in float64, and against what it is meant to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as tv

from mae_et.ops import downsample, low_frequency_crop
from mae_et.ops.lowfreq import METHODS, PHASES

# float32: two products of a few hundred terms each leave up to 1.6e-6 on pixels in 0..1.
FLOAT32_ERROR = 2e-6

SHAPES = [
    ((224, 224), 96),
    ((224, 224), 128),
    ((224, 224), 160),
    ((224, 224), 192),
    ((256, 256), 33),
    ((96, 160), (48, 64)),
    ((97, 131), (33, 52)),
    ((97, 131), (52, 33)),
    ((64, 64), (63, 64)),
    ((64, 64), (64, 62)),
    ((31, 31), 28),
    ((8, 6), (2, 2)),
    ((5, 7), (1, 1)),
]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def fourier_crop(images: np.ndarray, size: tuple[int, int], phase: str) -> np.ndarray:
    """Shift, cut out the centre of the spectrum, shift back: the textbook way, real part of the result."""
    spectrum = np.fft.fftshift(np.fft.fft2(images.astype(np.float64)), axes=(-2, -1))
    for axis, small in ((-2, size[0]), (-1, size[1])):
        full = images.shape[axis]
        start = full // 2 - small // 2
        spectrum = np.take(spectrum, range(start, start + small), axis=axis)
        if phase == "centred":
            k = np.arange(small) - small // 2
            ramp = np.exp(2j * np.pi * k * ((full / small - 1) / 2) / full)
            spectrum = spectrum * (ramp[:, None] if axis == -2 else ramp)
    spectrum = np.fft.ifftshift(spectrum, axes=(-2, -1))
    scale = size[0] * size[1] / (images.shape[-2] * images.shape[-1])
    return np.fft.ifft2(spectrum).real * scale


def photos(size: int) -> torch.Tensor:
    """Square crops of photos that come with scikit-learn (and scikit-image), as uint8 `[N, 3, size, size]`."""
    pictures = list(load_sample_images().images)
    data = pytest.importorskip("skimage.data")
    pictures += [data.astronaut(), data.coffee(), data.chelsea()]
    crops = [p[s : s + size, s : s + size] for p in pictures for s in (0, min(p.shape[:2]) - size)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def relative_l2(images: torch.Tensor, reference: torch.Tensor) -> float:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = tv.normalize(reference, mean, std)
    return ((tv.normalize(images, mean, std) - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_equals_the_fourier_transform(shape, size, phase):
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    crop = low_frequency_crop(images, size, phase)
    expected = fourier_crop(images.numpy(), pair(size), phase)
    assert crop.shape == expected.shape
    assert crop.dtype == torch.float32
    assert np.abs(crop.numpy() - expected).max() <= FLOAT32_ERROR
    # In float64 only the rounding of the exponentials remains.
    double = low_frequency_crop(images.double(), size, phase)
    assert double.dtype == torch.float64
    assert np.abs(double.numpy() - expected).max() <= 1e-12


@pytest.mark.parametrize("phase", PHASES)
def test_uint8_is_scaled_to_one(phase):
    images = photos(224)[:2]
    expected = fourier_crop(images.numpy() / 255, (96, 96), phase)
    assert np.abs(low_frequency_crop(images, 96, phase).numpy() - expected).max() <= FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_give_float32(dtype):
    images = torch.rand(1, 1, 32, 32).to(dtype)
    assert torch.equal(low_frequency_crop(images, 20), low_frequency_crop(images.float(), 20))


@pytest.mark.parametrize("phase", PHASES)
def test_full_size_is_the_image_itself(phase):
    images = torch.rand(1, 3, 24, 17)
    assert torch.equal(low_frequency_crop(images, (24, 17), phase), images)
    bytes_ = (images * 255).to(torch.uint8)
    assert torch.equal(low_frequency_crop(bytes_, (24, 17), phase), bytes_ / 255)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [32, 33, (20, 45)])
def test_mean_is_preserved(size, phase):
    images = torch.rand(2, 3, 64, 80, dtype=torch.float64)
    difference = low_frequency_crop(images, size, phase).mean((2, 3)) - images.mean((2, 3))
    assert difference.abs().max() <= 1e-13


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("shape", "size"), [((64, 64), (32, 32)), ((60, 90), (25, 40)), ((49, 33), (20, 11))])
def test_band_limited_image_is_sampled_on_the_coarser_grid(shape: tuple[int, int], size: tuple[int, int], phase):
    # A function whose frequencies all lie below half the new rate is known between its samples, so the crop must
    # return its values at the new positions. They are computed here from its formula, without any transform.
    generator = np.random.default_rng(0)
    waves = [
        (generator.integers(0, (size[0] + 1) // 2), sign * generator.integers(0, (size[1] + 1) // 2), a, t)
        for sign, a, t in zip((1, -1) * 10, generator.normal(size=20), generator.uniform(0, 7, size=20), strict=True)
    ]

    def sample(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        angle = [2 * np.pi * (u * rows[:, None] / shape[0] + v * columns / shape[1]) + t for u, v, _, t in waves]
        return np.sum([a * np.cos(x) for (_, _, a, _), x in zip(waves, angle, strict=True)], axis=0)

    images = torch.from_numpy(sample(np.arange(shape[0]), np.arange(shape[1])))[None, None]
    half = 0.5 if phase == "centred" else 0.0
    rows, columns = ((np.arange(n) + half) * full / n - half for full, n in zip(shape, size, strict=True))
    crop = low_frequency_crop(images, size, phase)[0, 0].numpy()
    assert np.abs(crop - sample(rows, columns)).max() <= 1e-12


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("seed", range(8))
def test_only_the_kept_frequencies_matter(seed: int, phase):
    # Proposition 1 of EfficientTrain++: nothing outside the window reaches the crop, while it aliases into a resize.
    generator = np.random.default_rng(seed)
    shape, size = (48, 64), ((24, 32), (25, 30))[seed % 2]
    outside = [generator.integers(small // 2 + 1, full // 2) for full, small in zip(shape, size, strict=True)]
    kept = [generator.integers(-(small // 2), small // 2) for small in size]
    # One high frequency is enough to be outside the window; it is the rows', the columns', or both.
    u, v = ((outside[0], kept[1]), (kept[0], outside[1]), (outside[0], outside[1]))[seed % 3]
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])
    wave = 0.1 * np.cos(2 * np.pi * (rows * (u / shape[0]) + columns * (v / shape[1])) + 0.3)
    images = torch.rand(1, 1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    changed = images + torch.from_numpy(wave)
    assert (low_frequency_crop(changed, size, phase) - low_frequency_crop(images, size, phase)).abs().max() <= 1e-13
    for method in ("nearest", "bilinear", "bicubic"):
        assert (downsample(changed, size, method) - downsample(images, size, method)).abs().max() > 1e-4


@pytest.mark.parametrize("phase", PHASES)
def test_gradient_is_the_adjoint(phase):
    # Sizes of no other test: the matrices are made here, in inference mode, and must still allow a gradient.
    shape, size = (21, 26), (14, 10)
    with torch.inference_mode():
        low_frequency_crop(torch.rand(1, 1, *shape, dtype=torch.float64), size, phase)
    x = torch.rand(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 2, *size, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(low_frequency_crop(x, size, phase), x, y)
    other = torch.rand_like(x)
    torch.testing.assert_close((gradient * other).sum(), (low_frequency_crop(other, size, phase) * y).sum())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lanczos"])
def test_autocast_changes_nothing(method):
    images = torch.rand(1, 3, 32, 32)
    expected = downsample(images, 18, method)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(downsample(images, 18, method), expected)


def test_traces_without_a_warning():
    compiled = torch.compile(lambda images: 2 * low_frequency_crop(images, 22), backend="eager")
    images = torch.rand(1, 1, 40, 40)
    assert torch.equal(compiled(images), 2 * low_frequency_crop(images, 22))


def test_a_resize_stands_in_for_the_centred_crop_on_photos():
    # Measured on these photos: bicubic .052, Lanczos .042; bicubic against the pixel-0 phase .139.
    images = photos(224)
    centred = low_frequency_crop(images, 96)
    bicubic = tv.resize(images, [96, 96], tv.InterpolationMode.BICUBIC, antialias=True) / 255
    assert relative_l2(bicubic, centred) <= 0.06
    assert relative_l2(downsample(images, 96, "lanczos"), centred) < relative_l2(bicubic, centred)
    assert relative_l2(bicubic, low_frequency_crop(images, 96, "pixel0")) > 0.1


@pytest.mark.parametrize("shape", [(64, 48), (50, 50)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizes_equal_torchvision(mode, shape):
    images = torch.rand(2, 3, *shape)
    expected = tv.resize(images, [24, 30], tv.InterpolationMode(mode), antialias=True)
    torch.testing.assert_close(downsample(images, (24, 30), mode), expected)
    bytes_ = (images * 255).to(torch.uint8)
    torch.testing.assert_close(downsample(bytes_, (24, 30), mode), downsample(bytes_ / 255, (24, 30), mode))


def test_nearest_takes_the_pixel_under_the_centre():
    images = torch.randint(0, 256, (2, 3, 20, 31), dtype=torch.uint8)
    rows = np.floor((np.arange(7) + 0.5) * 20 / 7).astype(int)
    columns = np.floor((np.arange(12) + 0.5) * 31 / 12).astype(int)
    expected = images[:, :, rows][:, :, :, columns] / 255
    assert torch.equal(downsample(images, (7, 12), "nearest"), expected)


def test_lanczos_equals_pil_on_the_colour_image():
    images = photos(224)[:2]
    resized = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((100, 96), Image.Resampling.LANCZOS) for i in images]
    expected = torch.from_numpy(np.stack([np.array(r) for r in resized])).permute(0, 3, 1, 2) / 255
    assert torch.equal(downsample(images, (96, 100), "lanczos"), expected)


@pytest.mark.parametrize(("method", "phase"), [("fourier", "centred"), ("fourier_pixel0", "pixel0")])
def test_fourier_methods_are_the_crop(method, phase):
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(downsample(images, 20, method), low_frequency_crop(images, 20, phase))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [33, (32, 33), (0, 8)])
def test_impossible_sizes_are_refused(method, size):
    height, width = pair(size)
    with pytest.raises(ValueError, match=rf"32x32 images to {height}x{width}.*larger images or a smaller size"):
        downsample(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), size, method)


def test_other_mistakes_are_refused():
    images = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"unknown phase 'center'.*centred, pixel0"):
        low_frequency_crop(images, 16, "center")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"unknown down-sampling method 'box'.*lanczos"):
        downsample(images, 16, "box")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'lanczos' takes uint8.*float32"):
        downsample(images, 16, "lanczos")
    with pytest.raises(ValueError, match=r"got \[3, 32, 32\]"):
        low_frequency_crop(images[0], 16)
    with pytest.raises(ValueError, match=r"got torch.int64"):
        low_frequency_crop(images.long(), 16)
