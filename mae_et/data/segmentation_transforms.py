"""Images of labelled pixels: random scale, crop, flip and colours for training; plain resizing for evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_et.data.randomness import PHOTOMETRIC_STREAM, SCENE_STREAM, uniform_stream
from mae_et.data.requests import SampleRequest
from mae_et.data.transforms import Size
from mae_et.data.views import FILL, Window, draw_window, view_image, view_masks

IGNORE = 255


class SceneTransform:
    """Random scale, crop, flip and colours of an image and its mask of classes.

    The defaults are those of mmsegmentation's recipe for UperNet on ADE20K (configs/_base_/datasets/ade20k.py), which
    the paper's Table 18 goes by: the short side becomes 0.5 to 2 times the crop's, a crop of which one class takes more
    than 3/4 is drawn anew, and what is smaller than the crop is padded and ignored. Its limit on the long side, 4 times
    the short one, is left out.

    Args:
        scale: range of the image's short side, in short sides of the request.
        category_share: a crop is accepted where no class has more than this share of its labelled px; the tenth crop
            is taken whatever it has. At 1, every first crop is.
        flip: mirror every second image, by chance.
        photometric: change the colours, see `draw_colours`.

    Raises:
        ValueError: for an empty range, or a share that no crop could keep below.
    """

    TRIES = 10

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 2.0),
        category_share: float = 0.75,
        flip: bool = True,
        photometric: bool = True,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scene scale {scale}: needs 0 < smallest <= largest; at 1 the short side just fits")
        if category_share <= 0:
            raise ValueError(f"category_share={category_share}: needs a share above 0; with 1 no crop is refused")
        self.scale = scale
        self.category_share = category_share
        self.flip = flip
        self.photometric = photometric

    def __call__(self, image: Tensor, mask: Tensor, request: SampleRequest) -> tuple[Tensor, Tensor]:
        """Return the request's view of an image and its mask.

        Args:
            image: uint8 [C, H, W].
            mask: uint8 [H, W], numbers of classes; `IGNORE` where there is none.
            request: its `size` and `seed` are used.

        Returns:
            uint8 [C, *request.size], padded with `views.FILL`, and uint8 [*request.size], padded with `IGNORE`; the
            mask takes the class at the centre of each px. Both contiguous; padding lies right and below.
        """
        window, labels = self.draw(mask, request.size, request.seed)
        view = view_image(image, window, request.size)
        if self.photometric:
            inside = view[:, : window.inner[0], : window.inner[1]]
            inside.copy_(change_colours(inside, draw_colours(request.seed)))
        return view, labels

    def draw(self, mask: Tensor, size: Size, seed: int) -> tuple[Window, Tensor]:
        """Draw what is seen of a mask on a canvas of `size`, and return that and the canvas."""
        draws = uniform_stream(seed, SCENE_STREAM)
        mirrored = next(draws) < 0.5 and self.flip
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * next(draws)
        height, width = mask.shape
        scale = factor * min(size) / min(height, width)
        tries = 0
        while True:
            window = draw_window((height, width), scale, size, mirrored, draws)
            labels = view_masks(mask[None], window, size, fill=IGNORE)[0]
            tries += 1
            whole = window.box[2:] == (height, width)  # every try would be the same
            if whole or tries == self.TRIES or largest_share(labels) <= self.category_share:
                return window, labels


def largest_share(labels: Tensor) -> float:
    """Return the share of the most frequent class of uint8 [H, W] among what is not `IGNORE`; 1 if there is nothing."""
    counts = torch.bincount(labels.flatten(), minlength=256)[:IGNORE]
    return int(counts.max()) / max(1, int(counts.sum())) if counts.any() else 1.0


class Colours(NamedTuple):
    """A change of colours; the defaults change nothing.

    Attributes:
        brightness: what is added to levels of 0 to 255.
        contrast: what levels are multiplied with.
        saturation: what the saturation (HSV) is multiplied with.
        hue: degrees by which the hue (HSV) is turned.
        contrast_first: whether the contrast is changed before saturation and hue, or after.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_first: bool = True


def draw_colours(seed: int) -> Colours:
    """Draw a photometric distortion, each part of it by a chance of 1/2.

    The distortion is that of SSD (arXiv 1512.02325, section 2.2, and its released code), with the numbers of
    mmsegmentation's PhotoMetricDistortion: brightness +-32 levels, contrast and saturation 0.5 to 1.5, hue +-18 steps
    of OpenCV's 8-bit hue, of which 180 make the circle: +-36 degrees. (mmdetection's, of the same numbers, works in
    floating point, where 18 are degrees.)
    """
    draws = uniform_stream(seed, PHOTOMETRIC_STREAM)

    def draw(low: float, high: float, neutral: float) -> float:
        done, value = next(draws) < 0.5, low + (high - low) * next(draws)
        return value if done else neutral

    return Colours(
        brightness=draw(-32.0, 32.0, 0.0),
        contrast=draw(0.5, 1.5, 1.0),
        saturation=draw(0.5, 1.5, 1.0),
        hue=draw(-36.0, 36.0, 0.0),
        contrast_first=next(draws) < 0.5,
    )


def change_colours(image: Tensor, colours: Colours) -> Tensor:
    """Return uint8 [C, H, W] of uint8 [C, H, W] in other colours; a grey image (C = 1) has neither saturation nor hue.

    Levels are limited to 0..255 after each part and rounded once, at the end.
    """
    pixels = image.float()
    if colours.brightness != 0:
        pixels = pixels.add_(colours.brightness).clamp_(0, 255)
    if colours.contrast != 1 and colours.contrast_first:
        pixels = pixels.mul_(colours.contrast).clamp_(0, 255)
    if image.shape[0] == 3:
        if colours.saturation != 1:
            pixels = _saturate(pixels, colours.saturation)
        if colours.hue != 0:
            pixels = _turn_hue(pixels, colours.hue)
    if colours.contrast != 1 and not colours.contrast_first:
        pixels = pixels.mul_(colours.contrast).clamp_(0, 255)
    return pixels.round_().byte()


def _saturate(pixels: Tensor, factor: float) -> Tensor:
    """Multiply HSV's S = (max - min) / max, limited to 1, with H and V as they are: distances to the maximum scale."""
    value, lowest = pixels.amax(0), pixels.amin(0)
    strength = (value / (value - lowest).clamp_(min=1e-6)).clamp_(max=factor)
    return value - (value - pixels) * strength


def _turn_hue(pixels: Tensor, degrees: float) -> Tensor:
    """Add to HSV's H, with S and V as they are (Smith, "Color gamut transform pairs", SIGGRAPH 1978)."""
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)
    # In sixths of the circle, from red. Sums of products: `torch.where` takes 20 times as long as a product.
    red_most = (value == red).float()
    green_most = (value == green).float() * (1 - red_most)
    blue_most = 1 - red_most - green_most
    hue = red_most * (green - blue) + green_most * (blue - red) + blue_most * (red - green)
    hue /= chroma.clamp(min=1e-6)
    hue += 2 * green_most + 4 * blue_most
    hue += degrees / 60
    # A channel is at the maximum for two sixths around its own hue, at the minimum opposite to them, linear between.
    turned = torch.empty_like(pixels)
    for channel, offset in enumerate((5.0, 3.0, 1.0)):
        sixth = hue + offset
        sixth -= 6 * (sixth / 6).floor_()  # half of the time of `remainder`
        turned[channel] = value - chroma * torch.minimum(sixth, 4 - sixth).clamp_(0, 1)
    return turned


def resize_short_side(image: Tensor, short: int, grain: int = 1, longest: int | None = None) -> Tensor:
    """Resize an image so that its short side becomes `short`, keeping the ratio: bilinear, antialiased, in integers.

    Args:
        image: uint8 [C, H, W].
        short: px of the short side that comes out.
        grain: sides are rounded to the nearest multiple of it, and are never less. With 1 the ratio is kept best, and
            the caller pads (`pad_to_multiple`); with the network's own, nothing needs padding.
        longest: px that the long side may have at most, before rounding; the short side becomes less where it would
            have more. mmsegmentation's ADE20K recipe has 2048 for a short side of 512.

    Returns:
        uint8 [C, h, w]; an image that has this size already is returned as it is.
    """
    height, width = image.shape[1:]
    scale = short / min(height, width)
    if longest is not None:
        scale = min(scale, longest / max(height, width))
    size = tuple(grain * max(1, round(side * scale / grain)) for side in (height, width))
    if size == (height, width):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def pad_to_multiple(images: Tensor, grain: int, least: Size = (1, 1)) -> Tensor:
    """Pad images right and below to multiples of `grain`, with `views.FILL` (over 255 for floats).

    Args:
        images: [N, C, H, W], uint8, or float in [0, 1].
        grain: px; both sides become multiples of it.
        least: (height, width) in px that come out at least, rounded up to multiples, too.

    Returns:
        [N, C, h, w] of the same dtype; the images themselves where nothing is missing.
    """
    height, width = images.shape[-2:]
    below, right = (-(-max(side, low) // grain) * grain - side for side, low in zip((height, width), least))
    if below == 0 and right == 0:
        return images
    return F.pad(images, (0, right, 0, below), value=FILL / 255 if images.is_floating_point() else FILL)
