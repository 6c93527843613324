"""How a photo lies in its file: the EXIF orientation, for annotations made on the pixels as they are stored.

`decode_image` turns every image upright, as viewers do.
"""

from __future__ import annotations

import warnings

import torch
from PIL import Image

_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4, tag Orientation
_TURNED = (5, 6, 7, 8)  # these exchange height and width


def orientation(path: str) -> int:
    """Return an image file's EXIF orientation, 1 (upright) to 8; 1 where it has none. Reads the header only."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # PIL warns of damaged metadata
        value = image.getexif().get(_ORIENTATION, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright_size(path: str) -> tuple[int, int]:
    """Return the (height, width) that an image file has once it is turned upright. Reads the header only."""
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        width, height = image.size
    return (width, height) if orientation(path) in _TURNED else (height, width)


def as_stored(image: torch.Tensor, turned: int) -> torch.Tensor:
    """Undo an orientation that exchanged height and width: [C, H, W] upright -> [C, W, H] as stored in the file.

    Any other orientation returns the image as it is.
    """
    if turned == 6:
        return torch.rot90(image, 1, (1, 2))
    if turned == 8:
        return torch.rot90(image, -1, (1, 2))
    if turned == 5:
        return image.transpose(1, 2)
    if turned == 7:
        return image.transpose(1, 2).flip(1, 2)
    return image
