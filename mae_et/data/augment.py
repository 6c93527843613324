"""What supervised training does to an image beyond crop and flip: RandAugment and random erasing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_choices, rand_augment_ops
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mae_et.data.randomness import AUGMENT_STREAM, ERASE_STREAM, uniform_stream
from mae_et.data.requests import SampleRequest
from mae_et.data.transforms import Box, CropTransform, Size


class TrainTransform:
    """Random resized crop, flip, RandAugment and random erasing, brought down to the bandwidth of the request.

    The order is that of EfficientTrain++'s released code, as far as the method of `CropTransform` has those steps:

    - `"resize"`: crop and flip straight at B, RandAugment at B, whose translations are shares of the side and shrink
      with it, erasing at B.
    - `"lanczos"`: crop, flip and RandAugment at `final_size`, Lanczos to B, erasing at B: the released chain.
    - `"bilinear"`, `"nearest"`: likewise, with their own way down to B.
    - `"fourier"`, `"fourier_pixel0"`: all of it at `final_size`, erasing too; the device crops the frequencies of the
      erased image later, as the authors' first release did.

    The defaults are those of MAE's fine-tuning (arXiv 2111.06377, Table 9 and its released code). What comes out is a
    function of the image and the request alone.

    Args:
        final_size, method, scale, ratio, flip: see `CropTransform`.
        randaugment: whether to do it. At magnitude 0 it still does what has no strength (contrast stretching,
            equalising, inverting), as the release's first tenth, `rand-m0`.
        magnitude_std: standard deviation of each operation's magnitude around the request's.
        staircase: round the request's magnitude down to a whole number. With a magnitude that rises from 0 to 10 over
            the run, those are the ten processes `rand-m0` ... `rand-m9` of the release; the paper's own m = 9u (section
            4.3) is the continuous one, from 0 to 9.
        erasing: probability of erasing a box.
        mean, std: of the data, per channel, for pixels in [0, 1]: colour of what RandAugment moves into view, and of
            the erased box's noise.

    Raises:
        ValueError: `mean` and `std` differ in length, or as `CropTransform`; on a call, if the image has another number
            of channels.
    """

    def __init__(
        self,
        final_size: Size,
        method: str = "resize",
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        randaugment: bool = True,
        magnitude_std: float = 0.5,
        staircase: bool = False,
        erasing: float = 0.25,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        if len(mean) != len(std):
            raise ValueError(f"mean {tuple(mean)} and std {tuple(std)}: give one number per channel in both")
        self.channels = len(mean)
        self.crop = CropTransform(final_size, method, scale, ratio, flip)
        self.augment = RandAugment(mean, magnitude_std, staircase) if randaugment else None
        self.erase = RandomErasing(erasing, mean, std)

    def __call__(self, image: torch.Tensor, request: SampleRequest) -> torch.Tensor:
        """Return the request's view of an image.

        Args:
            image: uint8 [C, H, W] with C = 1 or 3; it is not changed.
            request: its `size`, `magnitude` and `seed` are used.

        Returns:
            uint8 [C, h, w]; (h, w) = `request.size`, or the final size for the Fourier methods.
        """
        if image.shape[0] != self.channels:
            raise ValueError(
                f"an image of {image.shape[0]} channels and a mean of {self.channels}: give mean and std of the data, "
                f"one number per channel"
            )
        augment = partial(self.augment, request=request) if self.augment is not None else None
        return self.erase(self.crop(image, request, augment), request.seed)


class RandAugment:
    """Two of timm's 15 operations of rising strength, each done by a chance of 1/2 (`rand-mstd0.5-inc1`).

    RandAugment is arXiv 1909.13719; the operations, their ranges and the chance are timm's, except that posterising
    keeps 1 bit at least. Grey pictures stay grey: all operations take them, and the one that changes colourfulness
    does nothing.

    Args:
        mean: of the data, per channel, for pixels in [0, 1].
        magnitude_std, staircase: see `TrainTransform`.
    """

    OPERATIONS = 2
    PROBABILITY = 0.5

    def __init__(self, mean: Sequence[float], magnitude_std: float = 0.5, staircase: bool = False) -> None:
        fill = [min(255, round(255 * value)) for value in mean]
        self.staircase = staircase
        self.names = list(rand_augment_choices("", increasing=True))
        self.hparams = {
            "img_mean": fill[0] if len(fill) == 1 else tuple(fill),  # PIL wants a number for mode "L"
            "interpolation": Image.Resampling.BICUBIC,
            "magnitude_std": magnitude_std,
        }
        # At a magnitude of 10, which m = 9 reaches by its spread, timm asks for 0 bits: black pictures from older
        # versions of Pillow, an error from newer ones. Just below 10 it keeps 1 bit.
        self.posterize_hparams = {**self.hparams, "magnitude_max": 9.99}

    def __call__(self, picture: Image.Image, request: SampleRequest) -> Image.Image:
        """Return the augmented picture, of the same size and mode; `magnitude` and `seed` of the request are used."""
        names, seed = self.draw(request.seed)
        magnitude = math.floor(request.magnitude) if self.staircase else request.magnitude
        with python_random(seed):
            for name in names:
                hparams = self.posterize_hparams if name == "PosterizeIncreasing" else self.hparams
                (operation,) = rand_augment_ops(magnitude, self.PROBABILITY, hparams, [name])
                picture = operation(picture)
        return picture

    def draw(self, seed: int) -> tuple[list[str], int]:
        """Draw the operations' names, with replacement, and the seed of what timm draws within them."""
        draws = uniform_stream(seed, AUGMENT_STREAM)
        names = [self.names[int(next(draws) * len(self.names))] for _ in range(self.OPERATIONS)]
        return names, int(next(draws) * 2**53)


@contextmanager
def python_random(seed: int) -> Iterator[None]:
    """Python's global generator, from which timm's operations draw, is seeded within the block and as before after it.

    It costs 15 us. NumPy's, from which timm's own class chooses the operations, would cost another 50.
    """
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


class RandomErasing:
    """Fill a random box with noise of the data's mean and standard deviation (arXiv 1708.04896; timm's mode "pixel").

    The box has 2 % to a third of the area, uniformly, and a log-uniform height / width of 0.3 to 1/0.3; after 10 boxes
    that do not fit there is none. timm draws standard normal numbers into the normalised image. Here the image is still
    uint8, so that its noise is rounded to whole levels and clamped to 0..255: on the normalised image the same
    numbers, except for the 3 to 4 % (ImageNet's mean and std) that no pixel could have. The closer the mean is to
    black, the more is clamped: 23 % for Fashion-MNIST (.286 and .353).

    Args:
        probability: of erasing.
        mean, std: of the data, per channel, for pixels in [0, 1].
    """

    AREA = (0.02, 1 / 3)
    ASPECT = (0.3, 1 / 0.3)

    def __init__(self, probability: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.probability = probability
        self._mean = np.array(mean, dtype=np.float32).reshape(-1, 1, 1) * 255
        self._std = np.array(std, dtype=np.float32).reshape(-1, 1, 1) * 255

    def __call__(self, view: torch.Tensor, seed: int) -> torch.Tensor:
        """Erase in place what the sample's seed says, and return uint8 [C, H, W]."""
        box = self.draw(view.shape[1], view.shape[2], seed)
        if box is not None:
            top, left, height, width = box
            generator = np.random.Generator(np.random.Philox(key=[seed, ERASE_STREAM]))
            noise = generator.standard_normal((view.shape[0], height, width), dtype=np.float32)
            levels = np.rint(noise * self._std + self._mean).clip(0, 255).astype(np.uint8)
            view[:, top : top + height, left : left + width] = torch.from_numpy(levels)
        return view

    def draw(self, height: int, width: int, seed: int) -> Box | None:
        """Draw the box (top, left, height, width) in px for an image of a given size; None leaves it whole."""
        draws = uniform_stream(seed, ERASE_STREAM)
        if next(draws) >= self.probability:
            return None
        low, high = math.log(self.ASPECT[0]), math.log(self.ASPECT[1])
        for _ in range(10):
            area = height * width * (self.AREA[0] + (self.AREA[1] - self.AREA[0]) * next(draws))
            aspect = math.exp(low + (high - low) * next(draws))
            box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if box_height < height and box_width < width:
                top = int(next(draws) * (height - box_height + 1))
                left = int(next(draws) * (width - box_width + 1))
                return top, left, box_height, box_width
        return None
