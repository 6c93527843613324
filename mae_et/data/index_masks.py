"""Bytes of a mask file -> numbers of its pixels, on the grid of the image that it belongs to.

Masks are PNG: the other formats of photos change values that lie beside each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from mae_et.data.decode import ImageError

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # EXIF
# What turns a stored image into the shown one, where that exchanges height and width.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored.T, 2),
    8: lambda stored: np.rot90(stored),
}


def decode_indices(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decode a mask of one channel: grey of 1 to 16 bits, or a palette, whose colours do not matter.

    Args:
        data: the file's bytes.
        name: its path, for messages.
        max_pixels: masks with more are refused.

    Returns:
        uint8 or uint16 [H, W], the numbers that the file holds.

    Raises:
        ImageError: it is no PNG, damaged, too large, or has colours.
    """
    image = _open(data, name, max_pixels)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ImageError(
            f"{name}: a mask in colours ({image.mode}), of which none says what it stands for: write one channel with "
            f"the number of each pixel's class or object, as PNG in grey of 8 or 16 bits or with a palette"
        )
    # Grey of 2 and 4 bits comes stretched to 0..255.
    depth, kind = data[24], data[25]
    stretch = {2: 85, 4: 17}.get(depth, 1) if kind == 0 else 1
    values = np.array(image)
    return values.astype(np.uint16 if depth == 16 else np.uint8) // stretch


def decode_ids(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """Decode a panoptic PNG: int64 [H, W], R + 256 G + 65536 B (COCO's panoptic format).

    Raises ImageError if it is no RGB PNG, damaged or too large.
    """
    image = _open(data, name, max_pixels)
    if image.mode != "RGB":
        raise ImageError(f"{name}: a panoptic PNG has three channels (RGB), this one is {image.mode}; check data.root")
    return np.array(image).astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data.startswith(_PNG_MAGIC):
        raise ImageError(f"{name}: not a PNG, which masks must be: JPEG and its like change the numbers of classes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, and of metadata
            image = Image.open(BytesIO(data), formats=("PNG",))
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"{name}: too many pixels: {size}, above data.max_pixels={max_pixels}")
            image.load()
    except ImageError:
        raise
    # Damaged files make PIL raise OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise ImageError(f"{name}: damaged or unusable mask: {str(error) or type(error).__name__}") from error
    return image


def to_classes(values: np.ndarray, table: np.ndarray, name: str, advice: str) -> np.ndarray:
    """Numbers of a mask to classes, uint8 [H, W].

    Args:
        values: unsigned [H, W].
        table: int16 [65536], the class of each number, 255 for ignored ones, -1 for those that are none.
        name: the mask's path, for messages.
        advice: what numbers there are, and what to do.

    Raises:
        ImageError: a number is none; the message says which, where and how often.
    """
    classes = table[values]
    wrong = classes < 0
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ImageError(
            f"{name}: value {values[row, column]} at row {row}, column {column} ({wrong.sum():,} pixels hold such) "
            f"is no class: {advice}"
        )
    return classes.astype(np.uint8)


def on_shown_grid(mask: np.ndarray, mask_name: str, image: bytes, image_name: str) -> np.ndarray:
    """A mask on the grid of its image as `decode_image` gives it, turned by its EXIF orientation.

    A mask may have been drawn on the pixels as they are stored or as they are shown. Where the camera turned a photo
    on its side, the mask's size says which, and a mask of the stored grid is turned like the photo. A photo that is
    square, mirrored or upside down leaves it open and is refused: half of such masks would be wrong without a sign.

    Args:
        mask: uint8 [H, W].
        image: bytes of the image file, of which only the header is decoded.

    Raises:
        ImageError: the sizes differ, or the orientation leaves open how the mask lies.
    """
    stored, orientation = _header(image, image_name)
    shown = stored[::-1] if orientation in _TURNS else stored
    if mask.shape not in (stored, shown):
        raise ImageError(
            f"{mask_name}: the mask has {mask.shape[1]} x {mask.shape[0]} px (width x height), its image {image_name} "
            f"has {shown[1]} x {shown[0]}: a mask needs one value a pixel"
        )
    if orientation == 1:
        return mask
    if stored == shown:
        raise ImageError(
            f"{image_name}: its EXIF orientation is {orientation}, and nothing tells whether {mask_name} was drawn on "
            f"the image as it is stored or as it is shown: store it upright (mogrify -auto-orient) and look at the mask"
        )
    return mask if mask.shape == shown else np.ascontiguousarray(_TURNS[orientation](mask))


def _header(data: bytes, name: str) -> tuple[tuple[int, int], int]:
    """(height, width) as stored, and the orientation that `decode_image` applies, 1 for none."""
    try:
        with warnings.catch_warnings(), Image.open(BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            if image.format == "JPEG" and image.mode in ("L", "RGB"):  # torchvision's, which knows EXIF alone
                exif = Image.Exif()
                exif.load(image.info.get("exif", b""))
                orientation = exif.get(_ORIENTATION, 1)
            # PIL decodes all of a PNG in search of EXIF.
            elif image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"exif", b"adobe.xmp")):
                orientation = image.getexif().get(_ORIENTATION, 1)
            else:
                orientation = 1
            return (image.height, image.width), orientation if orientation in range(2, 9) else 1
    except Exception as error:
        raise ImageError(f"{name}: damaged or unusable image: {str(error) or type(error).__name__}") from error
