"""Images of objects: large-scale jitter for training, the largest fit for evaluation, and the way back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mae_et.data.instances import Instances
from mae_et.data.randomness import JITTER_STREAM, uniform_stream
from mae_et.data.requests import SampleRequest
from mae_et.data.transforms import Size
from mae_et.data.views import Window, clip_boxes, draw_window, view_boxes, view_image, view_masks

_PASTED = 1 << 23  # px of masks that `paste_masks` has in float32 at a time, 32 MiB of them


class JitterTransform:
    """Large-scale jitter: the image at a random scale, cropped or padded to the size of the request, and mirrored.

    Ghiasi et al., "Simple Copy-Paste" (arXiv 2012.07177, section 3.1); ViTDet (arXiv 2203.16527, appendix A.2) trains
    with factors of 0.1 to 2. The factor is uniform and 1 is where the image just fits. What is larger than the request
    is cropped at a uniform place, what is smaller lies in the top left corner, padded with `views.FILL`.

    Args:
        scale: range of the factor.
        flip: mirror every second image, by chance.

    Raises:
        ValueError: for an empty range.
    """

    def __init__(self, scale: tuple[float, float] = (0.1, 2.0), flip: bool = True) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"jitter scale {scale}: needs 0 < smallest <= largest; at 1 the image just fits")
        self.scale = scale
        self.flip = flip

    def __call__(self, image: Tensor, instances: Instances, request: SampleRequest) -> tuple[Tensor, Instances, Size]:
        """Return the request's view of an image and of its objects.

        Crowds are left out, and so are objects that are not seen or that are less than 1 px high or wide. Masks are
        sampled at the centres of px. Where there are masks, boxes are those of the masks as they are seen, often less
        than the clipped box of an object that the crop cuts, and areas those of the masks; else, of the boxes as seen.

        Args:
            image: uint8 [C, H, W].
            instances: the objects of the image; they are not changed.
            request: its `size` and `seed` are used.

        Returns:
            uint8 [C, *request.size], contiguous; the objects, in its px; (height, width) of the image inside the
            padding.
        """
        window = self.draw((image.shape[1], image.shape[2]), request.size, request.seed)
        return view_image(image, window, request.size), view_instances(instances, window, request.size), window.inner

    def draw(self, image: Size, size: Size, seed: int) -> Window:
        """Draw what is seen of an image of (height, width) px on a canvas of `size`."""
        draws = uniform_stream(seed, JITTER_STREAM)
        mirrored = next(draws) < 0.5 and self.flip
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * next(draws)
        return draw_window(image, factor * _fit(image, size), size, mirrored, draws)


def view_instances(instances: Instances, window: Window, size: Size) -> Instances:
    """Return the objects that a window sees, for training: see `JitterTransform`.

    Args:
        instances: K objects of the whole image.
        window: what is seen.
        size: (height, width) in px of the canvas, that of the masks which come out.
    """
    if instances.masks is None:
        boxes = clip_boxes(view_boxes(instances.boxes, window), window.inner)
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        seen = Instances(boxes, instances.labels, width * height, instances.crowd)
        return seen.keep((width >= 1) & (height >= 1) & ~instances.crowd)
    top, left, height, width = window.box
    # Most objects of a small crop lie outside: looking is cheaper than resizing.
    inside = instances.masks[:, top : top + height, left : left + width].flatten(1).any(1).bool()
    which = (inside & ~instances.crowd).nonzero()[:, 0]
    masks = view_masks(instances.masks.index_select(0, which), window, size, fill=0)
    areas = torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.float32)  # torch: 100 times
    seen = Instances(mask_boxes(masks), instances.labels[which], areas, instances.crowd[which], masks)
    return seen if bool((areas > 0).all()) else seen.keep(areas > 0)


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the smallest boxes float32 [K, 4] around masks uint8 [K, H, W]; that of an empty mask has no meaning."""
    columns, rows = masks.any(1), masks.any(2)
    first = [seen.argmax(1) for seen in (columns, rows)]
    last = [seen.shape[1] - seen.flip(1).argmax(1) for seen in (columns, rows)]
    return torch.stack(first + last, 1).float()


class FitTransform:
    """The whole image at the largest scale that fits, padded right and below with `views.FILL`."""

    def __call__(self, image: Tensor, size: Size) -> tuple[Tensor, Size]:
        """Return uint8 [C, *size] of uint8 [C, H, W], and (height, width) in px of the image inside the padding."""
        height, width = image.shape[1:]
        scale = _fit((height, width), size)
        inner = (max(1, round(height * scale)), max(1, round(width * scale)))
        return view_image(image, Window((0, 0, height, width), inner, mirrored=False), size), inner


def _fit(image: Size, size: Size) -> float:
    return min(size[0] / image[0], size[1] / image[1])


def unfit_boxes(boxes: Tensor, inner: Size, original: Size) -> Tensor:
    """Return boxes found in a fitted image in px of the original, clipped to it.

    Args:
        boxes: float [K, 4] in px of what `FitTransform` returned.
        inner: (height, width) that it returned.
        original: (height, width) in px of the image that it was given.
    """
    scale = boxes.new_tensor([original[1] / inner[1], original[0] / inner[0]] * 2)
    return clip_boxes(boxes * scale, original)


def paste_masks(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Return masks found inside boxes as masks of the image: where the probability is at least 1/2.

    Bilinear between the centres of the mask's cells, 0 outside of the box. torchvision's `paste_masks_in_image` is not
    used: it rounds boxes outwards to whole px and adds one, which makes 12 x 12 of a full box of 10 x 10.

    Args:
        masks: float [K, M, M], probabilities.
        boxes: float [K, 4] in px of the image.
        size: (height, width) in px of the image.

    Returns:
        uint8 [K, *size], on the masks' device.
    """
    pasted = torch.empty(len(masks), *size, dtype=torch.uint8, device=masks.device)
    chunk = max(1, _PASTED // (size[0] * size[1]))
    for start in range(0, len(masks), chunk):
        part, box = masks[start : start + chunk].float(), boxes[start : start + chunk].float()
        rows = _bilinear_weights(box[:, 1], box[:, 3], size[0], part.shape[1])
        columns = _bilinear_weights(box[:, 0], box[:, 2], size[1], part.shape[2])
        pasted[start : start + chunk] = rows @ part @ columns.mT >= 0.5
    return pasted


def _bilinear_weights(low: Tensor, high: Tensor, side: int, cells: int) -> Tensor:
    """What each px of a side takes of each cell of an interval [low, high) that is cut into equal cells.

    Returns:
        float32 [K, side, cells]; beyond the outermost centres of cells the outermost cells go on, up to the interval's
        ends, and outside of it all weights are 0.
    """
    centres = torch.arange(side, device=low.device) + 0.5
    share = (centres - low[:, None]) / (high - low).clamp(min=1e-6)[:, None]
    inside = (share >= 0) & (share < 1)
    position = (share * cells - 0.5).clamp(0, cells - 1)
    weights = (1 - (position[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return weights * inside[..., None]
