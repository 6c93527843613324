"""The circular filters against a Fourier transform in float64, and against what they are meant to do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mae_et.ops.filters import high_pass, low_pass

# float32: two transforms of up to 15 butterfly stages each leave a few 2**-24 on pixels in 0..1 (7e-7 was seen).
FLOAT32_ERROR = 2e-6
# float64: the same stages at 2**-53.
FLOAT64_ERROR = 1e-14

SHAPES = [(224, 224), (32, 32), (31, 31), (28, 28), (48, 97), (97, 48), (40, 20), (7, 5), (2, 2), (1, 1), (1, 9)]
RADII = [0, 1, 2.5, 5, 14, 60]


def kept(shape: tuple[int, int], radius: float) -> np.ndarray:
    """Which frequencies of the full spectrum lie within the circle, one by one."""
    height, width = shape
    result = np.zeros(shape, dtype=bool)
    for row in range(height):
        for column in range(width):
            # Signed cycles over each axis, then over the shorter side.
            ky, kx = (k - n if 2 * k > n else k for k, n in ((row, height), (column, width)))
            short = min(shape)
            result[row, column] = (ky * short / height) ** 2 + (kx * short / width) ** 2 <= radius**2 + 1e-9
    return result


def reference(images: np.ndarray, radius: float) -> np.ndarray:
    spectrum = np.fft.fft2(images.astype(np.float64)) * kept(images.shape[-2:], radius)
    filtered = np.fft.ifft2(spectrum)
    # The circle is symmetric, so nothing imaginary is left to drop.
    assert np.abs(filtered.imag).max() < 1e-12
    return filtered.real


def random_images(shape: tuple[int, int], count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *shape), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("radius", RADII)
def test_equals_the_fourier_transform(shape, radius):
    pixels = random_images(shape)
    expected = reference(pixels.numpy() / 255, radius)
    found = low_pass(pixels, radius)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=FLOAT32_ERROR)
    exact = low_pass(pixels.double() / 255, radius)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), expected, atol=FLOAT64_ERROR)
    np.testing.assert_allclose(high_pass(pixels, radius).numpy(), pixels.numpy() / 255 - expected, atol=FLOAT32_ERROR)


@pytest.mark.parametrize("shape", [(32, 32), (31, 45)], ids=str)
@pytest.mark.parametrize("radius", [0, 3, 7.5])
def test_both_make_the_image_and_each_is_a_projection(shape, radius):
    images = random_images(shape).double() / 255
    low, high = low_pass(images, radius), high_pass(images, radius)
    torch.testing.assert_close(low + high, images, atol=FLOAT64_ERROR, rtol=0)
    torch.testing.assert_close(low_pass(low, radius), low, atol=FLOAT64_ERROR, rtol=0)
    torch.testing.assert_close(high_pass(high, radius), high, atol=FLOAT64_ERROR, rtol=0)
    torch.testing.assert_close(low.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=FLOAT64_ERROR, rtol=0)
    assert high.mean(dim=(2, 3)).abs().max() < FLOAT64_ERROR


@pytest.mark.parametrize(("ky", "kx", "radius", "passes"), [
    (3, 4, 5, True),  # on the circle
    (3, 4, 4.99, False),
    (0, 5, 5, True),
    (16, 0, 16, True),  # the finest of an axis
    (16, 0, 15, False),
    (16, 16, 22, False),
    (16, 16, 23, True),
])  # fmt: skip
def test_a_wave_passes_whole_or_not_at_all(ky, kx, radius, passes):
    y, x = torch.meshgrid(*[torch.arange(32, dtype=torch.float64) / 32] * 2, indexing="ij")
    wave = torch.cos(2 * math.pi * (ky * y + kx * x))[None, None]
    torch.testing.assert_close(low_pass(wave, radius), wave * passes, atol=FLOAT64_ERROR, rtol=0)


def test_cycles_are_of_the_shorter_side():
    """8 cycles over 32 px: 4 px a cycle, and as many pixels along the side of 96."""
    along = torch.arange(96, dtype=torch.float64)
    for cycle, passes in ((4.0, True), (3.84, False)):
        wave = torch.cos(2 * math.pi * along / cycle).expand(1, 1, 32, 96)
        torch.testing.assert_close(low_pass(wave, 8), wave * passes, atol=FLOAT64_ERROR, rtol=0)
        tall = wave.transpose(2, 3)
        torch.testing.assert_close(low_pass(tall, 8), tall * passes, atol=FLOAT64_ERROR, rtol=0)


def test_autocast_and_half_precision_leave_it_in_float32():
    images = random_images((24, 24)).float() / 255
    with torch.autocast("cpu", torch.bfloat16):
        under = low_pass(images, 5)
    assert torch.equal(under, low_pass(images, 5))
    assert low_pass(images.bfloat16(), 5).dtype == torch.float32


def test_gradients_pass_also_after_inference_mode():
    images = random_images((9, 9), 1).double()
    with torch.inference_mode():
        low_pass(images, 2.25)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad((low_pass(images, 2.25) ** 2).sum(), images)
    # A projection P has P'P = P.
    torch.testing.assert_close(gradient, 2 * low_pass(images, 2.25).detach(), atol=1e-9, rtol=0)


def test_an_infinite_radius_keeps_everything():
    images = random_images((6, 11)).double()
    torch.testing.assert_close(low_pass(images, math.inf), images, atol=1e-11, rtol=0)


def test_refusals():
    for radius in (-1, math.nan):
        with pytest.raises(ValueError, match="0 or more cycles"):
            low_pass(random_images((4, 4)), radius)
    with pytest.raises(ValueError, match="convert them first"):
        low_pass(torch.zeros(1, 1, 4, 4, dtype=torch.int64), 1)
