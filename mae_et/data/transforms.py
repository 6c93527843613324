"""One image and one request -> the pixels that the model sees; every random number comes from the request's seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from mae_et.data.batched import can_resize, resize_boxes
from mae_et.data.randomness import CROP_STREAM, uniform_stream, uniform_table
from mae_et.data.requests import SampleRequest, SampleRequests

METHODS = ("resize", "lanczos", "fourier", "fourier_pixel0", "bilinear", "nearest")

TRIES_AT_ONCE = 3  # of a box; hardly an image needs more

Size = tuple[int, int]
Box = tuple[int, int, int, int]


class CropTransform:
    """Random resized crop and flip, brought down to the bandwidth that the request asks for.

    The methods, by what they do to the crop box (MAE section A.1 for the box and the flip):

    - `"resize"`: one antialiased bicubic resize straight to `request.size`. The fast path: 3 times the images a second
      of `"lanczos"`, from which it differs by 2.2 % at 96 px (relative L2 after normalisation).
    - `"lanczos"`: PIL's bicubic to `final_size`, flip, PIL's Lanczos to `request.size`, each rounded to uint8: what
      EfficientTrain++'s released code does.
    - `"fourier"`, `"fourier_pixel0"`: bicubic to `final_size`; the exact low-frequency crop is left to the device, so
      that what comes out is `final_size` whatever the request says.
    - `"bilinear"`, `"nearest"`: bicubic to `final_size`, then a plain sampling without antialiasing (half-pixel
      centres). They alias on purpose, for ablations.

    Args:
        final_size: (height, width) in px of the last stage, at which the two-step methods crop.
        method: one of `METHODS`.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height.
        flip: mirror every second image, by chance.

    Raises:
        ValueError: for an unknown method or an empty range.
    """

    def __init__(
        self,
        final_size: Size,
        method: str = "resize",
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"down-sampling method {method!r} is unknown; use one of {', '.join(METHODS)}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crop scale {scale}: needs 0 < smallest <= largest <= 1, as shares of the image's area")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"crop ratio {ratio}: needs 0 < smallest <= largest, as width / height")
        self.final_size = final_size
        self.method = method
        self.scale = scale
        self.ratio = ratio
        self.flip = flip

    def __call__(
        self,
        image: torch.Tensor,
        request: SampleRequest,
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ) -> torch.Tensor:
        """Return the request's view of an image.

        Args:
            image: uint8 [C, H, W] with C = 1 or 3. Fastest with the channels innermost in memory, as sources give it.
            request: its `size` and `seed` are used.
            augment: done to the flipped crop, before the second step of the methods that have one; the picture's
                size and mode stay.

        Returns:
            uint8 [C, h, w], contiguous; (h, w) = `request.size`, or `final_size` for the Fourier methods.
        """
        (top, left, height, width), mirrored = self.draw(image.shape[1], image.shape[2], request.seed)
        return self.of_crop(image[:, top : top + height, left : left + width], request, mirrored, augment)

    def of_crop(
        self,
        crop: torch.Tensor,
        request: SampleRequest,
        mirrored: bool,
        augment: Callable[[Image.Image], Image.Image] | None = None,
    ) -> torch.Tensor:
        """Return the view that a call returns, of a crop box that is cut out already; arguments as of a call."""
        if self.method == "lanczos":
            return _two_steps_in_pil(crop, self.final_size, request.size, mirrored, augment)
        view = bicubic(crop, request.size if self.method == "resize" else self.final_size)
        if mirrored:
            view = view.flip(-1)
        if augment is not None:
            view = from_pil(augment(to_pil(view)))
        return self._sampled(view[None], request.size)[0]

    def many(self, images: torch.Tensor, requests: SampleRequests) -> torch.Tensor:
        """Return what the calls return, one view for each image, in one call where there is one for such images.

        Args:
            images: uint8 [N, C, H, W] with C = 1 or 3.
            requests: N of them.

        Returns:
            uint8 [N, C, h, w], contiguous.
        """
        size = requests.size if self.method == "resize" else self.final_size
        height, width = images.shape[2:]
        if self.method == "lanczos" or not can_resize(height, width, size):
            return torch.stack([self(image, request) for image, request in zip(images, requests)])
        boxes, mirrored = self.draw_many(height, width, requests.seeds)
        views = torch.from_numpy(resize_boxes(images.numpy(), boxes, mirrored, size))
        return self._sampled(views, requests.size)

    def _sampled(self, views: torch.Tensor, size: Size) -> torch.Tensor:
        """The second step of the methods that sample."""
        if self.method not in ("bilinear", "nearest") or size == self.final_size:
            return views
        return F.interpolate(views, size=size, mode="bilinear" if self.method == "bilinear" else "nearest-exact")

    def draw(self, height: int, width: int, seed: int) -> tuple[Box, bool]:
        """Draw the crop box (top, left, height, width) in px and whether to mirror, for an image of a given size.

        As torchvision's RandomResizedCrop: up to 10 tries of a uniform area and a log-uniform ratio, then the largest
        central box within the range of ratios.
        """
        draws = uniform_stream(seed, CROP_STREAM)
        mirrored = next(draws) < 0.5 and self.flip
        low_area, high_area = self.scale[0] * height * width, self.scale[1] * height * width
        low_ratio, high_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = low_area + (high_area - low_area) * next(draws)
            aspect = math.exp(low_ratio + (high_ratio - low_ratio) * next(draws))
            box_width = round(math.sqrt(area * aspect))
            box_height = round(math.sqrt(area / aspect))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = int(next(draws) * (height - box_height + 1))
                left = int(next(draws) * (width - box_width + 1))
                return (top, left, box_height, box_width), mirrored
        box_height = min(height, max(1, round(width / self.ratio[0])))
        box_width = min(width, max(1, round(height * self.ratio[1])))
        return ((height - box_height) // 2, (width - box_width) // 2, box_height, box_width), mirrored

    def draw_many(
        self, height: int, width: int, seeds: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Draw for many images of one size, with the numbers of `draw`: boxes [N, 4] and whether to mirror, [N]."""
        draws = uniform_table(seeds, 3 + 2 * TRIES_AT_ONCE, CROP_STREAM)
        low_area, high_area = self.scale[0] * height * width, self.scale[1] * height * width
        low_ratio, high_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        area = low_area + (high_area - low_area) * draws[:, 1:-2:2]
        aspect = low_ratio + (high_ratio - low_ratio) * draws[:, 2:-2:2]
        # Not NumPy's exponential, whose last bit depends on the processor.
        aspect = np.array([math.exp(x) for x in aspect.ravel().tolist()]).reshape(aspect.shape)
        box_width, box_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
        sample, trial = np.arange(len(seeds)), fits.argmax(1)
        box_height, box_width = box_height[sample, trial], box_width[sample, trial]
        top = np.floor(draws[sample, 3 + 2 * trial] * (height - box_height + 1))
        left = np.floor(draws[sample, 4 + 2 * trial] * (width - box_width + 1))
        boxes = np.stack([top, left, box_height, box_width], 1).astype(np.int64)
        for i in np.flatnonzero(~fits.any(1)):
            boxes[i] = self.draw(height, width, int(seeds[i]))[0]
        return boxes, (draws[:, 0] < 0.5) & self.flip


class EvalTransform:
    """Resize the short side to `size / crop_fraction` (antialiased bicubic) and cut the centre.

    Args:
        size: (height, width) in px of what comes out. If it is not square, the resized image just covers it.
        crop_fraction: share of the resized image that is kept, MAE's 224 of 256 px by default.
    """

    def __init__(self, size: Size, crop_fraction: float = 0.875) -> None:
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction={crop_fraction}: needs a share of the image, above 0 and at most 1")
        self.size = size
        self.crop_fraction = crop_fraction

    def __call__(self, image: torch.Tensor, request: SampleRequest | None = None) -> torch.Tensor:
        """Return uint8 [C, *size] of uint8 [C, H, W]; the request is taken for the loader's sake and not used."""
        return self.many(image[None])[0]

    def many(self, images: torch.Tensor, requests: SampleRequests | None = None) -> torch.Tensor:
        """Return uint8 [N, C, *size] of uint8 [N, C, H, W], what calls return one by one."""
        height, width = images.shape[2:]
        cover_height, cover_width = (round(side / self.crop_fraction) for side in self.size)
        if cover_height * width >= cover_width * height:
            resized = (cover_height, cover_height * width // height)
        else:
            resized = (cover_width * height // width, cover_width)
        if resized != (height, width):
            images = F.interpolate(images, size=resized, mode="bicubic", antialias=True)
        top, left = (round((full - kept) / 2) for full, kept in zip(resized, self.size))
        return images[:, :, top : top + self.size[0], left : left + self.size[1]].contiguous()


def bicubic(image: torch.Tensor, size: Size) -> torch.Tensor:
    """Resize uint8 [C, H, W] to uint8 [C, *size], antialiased, in torch's integer arithmetic; equal sizes copy.

    `F.interpolate` and not torchvision's `resized_crop`, which does the same and takes 6 to 11 us longer, for a 28 px
    image half as much again. The crop's view is not copied first: with the channels innermost that would cost 0.1 ms.
    """
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def to_pil(image: torch.Tensor) -> Image.Image:
    """A copy of uint8 [C, H, W] as a picture, of mode "L" for C = 1 and "RGB" for C = 3."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)


def from_pil(picture: Image.Image) -> torch.Tensor:
    """A copy of a picture of mode "L" or "RGB" as uint8 [C, H, W], contiguous."""
    pixels = np.array(picture).reshape(picture.height, picture.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _two_steps_in_pil(
    crop: torch.Tensor,
    final_size: Size,
    size: Size,
    mirrored: bool,
    augment: Callable[[Image.Image], Image.Image] | None,
) -> torch.Tensor:
    view = to_pil(crop).resize((final_size[1], final_size[0]), Image.Resampling.BICUBIC)
    if mirrored:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment is not None:
        view = augment(view)
    if size != final_size:
        view = view.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return from_pil(view)
