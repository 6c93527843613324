"""Bytes of an image file -> uint8 pixels, or an error that says which file and why.

Plain JPEGs go through torchvision's decoder, everything else through PIL. A crop of 96 px took 5 % longer with the
header read by PIL first, and 18 % longer by PIL altogether. Both refuse a JPEG cut at any byte, even one that lacks
only its last marker: torchvision 0.29 with "Image is incomplete or truncated", PIL 13 with "image file is truncated"
(measured, and swept in the test). A damaged stream that still ends in the end-of-image marker is decoded by both, with
libjpeg's grey filling: it cannot be told from a photo without decoding it twice. `ImageFile.LOAD_TRUNCATED_IMAGES`
stays off.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

DEFAULT_MAX_PIXELS = 100_000_000  # 300 MB of RGB

# Read by PIL's own code from their first bytes. EPS (which starts Ghostscript) and TGA (which has no magic bytes, so
# that rubbish can pass for one) stay out.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")

_JPEG_MAGIC = b"\xff\xd8\xff"
_FRAMES = b"\xc0\xc1\xc2"  # baseline, extended and progressive, in Huffman codes
# Other frames, restarts, a second start, the end, pixels.
_TOO_FAR = b"\xc3\xc5\xc6\xc7\xc8\xc9\xca\xcb\xcd\xce\xcf\xd0\xd1\xd2\xd3\xd4\xd5\xd6\xd7\xd8\xd9\xda"
_MARKERS = range(0xC0, 0xFF)  # below they have no length, and 0xff fills: libjpeg would find another header there
_APPLICATION_1 = 0xE1


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says what is wrong with it."""


def decode_image(data: bytes, name: str, channels: int = 3, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Decode one image file to pixels.

    The EXIF orientation is applied; transparent pixels are composited on white; the first frame of an animation is
    taken; 16-bit grey is divided by 257; float and 32-bit grey images follow `_grey_to_uint8`.

    Args:
        data: the file's bytes.
        name: the file's path, or whatever tells a reader of the error message which image this is.
        channels: 3 for RGB, 1 for luma (ITU-R BT.601).
        max_pixels: refuse an image with more pixels than this; checked on the header, before anything is decoded.

    Returns:
        uint8 [channels, H, W], with the channels innermost in memory (the layout torch resizes fastest).

    Raises:
        ImageError: if the bytes are no image, a damaged one, or one with too many pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images are decoded to 1 (luma) or 3 (RGB) channels")
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            # PIL warns of many pixels (our cap rules) and of damaged metadata (which we do not use), torchvision of
            # its decoders' end (since 0.29).
            warnings.simplefilter("ignore")
            if read_jpeg_header(data, max_pixels) is not None:
                return _decode_jpeg(data, channels)
            return _decode(data, name, channels, max_pixels)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"PIL's own limit, which data.max_pixels={max_pixels} cannot exceed"
        raise ImageError(f"{name}: too many pixels: {error} ({limit})") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a known format ({_nature(data)})") from error
    # Damaged files make PIL raise OSError, SyntaxError, ValueError, struct.error, KeyError, ... by format.
    except Exception as error:
        # torchvision's messages begin with the function and the place in its C++ source.
        reason = re.sub(r"^.*\.cpp:\d+, ", "", str(error).partition("\n")[0]) or type(error).__name__
        raise ImageError(f"{name}: damaged or unusable image: {reason}") from error


class JpegHeader(NamedTuple):
    """What a plain JPEG says of itself before its pixels.

    Attributes:
        width, height: in px, as stored.
        exif: the bytes of its EXIF block, empty if it has none.
    """

    width: int
    height: int
    exif: bytes

    @property
    def upright(self) -> bool:
        """Whether the EXIF orientation leaves the image as it is stored; False if it cannot be read."""
        if not self.exif:
            return True
        try:
            exif = Image.Exif()
            exif.load(self.exif)
            return exif.get(ExifTags.Base.Orientation, 1) == 1
        except Exception:  # damaged EXIF makes PIL raise anything
            return False


def read_jpeg_header(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> JpegHeader | None:
    """Read the header of a JPEG that needs no second look, in 2 us; PIL takes 50.

    Returns:
        None for all else: other formats, four channels, 12 bits, arithmetic codes, more pixels than `max_pixels` or
        than PIL's own limit, and whatever is not as it should be.
    """
    if data[:3] != _JPEG_MAGIC:
        return None
    at, exif = 2, b""
    # Segments: 0xff, a marker, and the length in two bytes, which counts itself.
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] in _MARKERS and data[at + 1] not in _TOO_FAR:
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in _FRAMES:
            bits, components = data[at + 4], data[at + 9]
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
            fits = bits == 8 and components in (1, 3) and 0 < width * height <= limit
            return JpegHeader(width, height, exif) if fits else None
        if marker == _APPLICATION_1 and not exif and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = data[at + 4 : end]
        at = end
    return None


def _decode_jpeg(data: bytes, channels: int) -> torch.Tensor:
    # A bytearray, because torch warns of tensors on read-only memory.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    pixels = decode_jpeg(encoded, mode=mode, apply_exif_orientation=True)
    assert isinstance(pixels, torch.Tensor)  # one image in, one out; a list goes in for a list
    return pixels


def _decode(data: bytes, name: str, channels: int, max_pixels: int) -> torch.Tensor:
    is_jpeg = data[:3] == _JPEG_MAGIC
    with Image.open(BytesIO(data), formats=("JPEG",) if is_jpeg else _formats()) as image:
        width, height = image.size
        if width * height > max_pixels:
            size = f"{width} x {height} = {width * height} pixels"
            raise ImageError(f"{name}: too many pixels: {size}, above data.max_pixels={max_pixels}")
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_flattened(image, channels))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _flattened(image: Image.Image, channels: int) -> Image.Image:
    """Return the image in mode "RGB" or "L", opaque, whatever its mode was."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_grey_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def _grey_to_uint8(values: np.ndarray) -> np.ndarray:
    """Rescale grey values that PIL's `convert` would clip to white or to black.

    Integers within 0..65535 are 16-bit grey and are divided by 257 (PIL below 11 gives them in 32 bits). Floats within
    [0, 1] are multiplied by 255. Of all others the finite minimum..maximum maps to 0..255, a constant to 0. NaN counts
    as the minimum, infinities as the nearer end.
    """
    if values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(np.nan_to_num(scaled, nan=0.0, posinf=255, neginf=0).clip(0, 255)).astype(np.uint8)


def _nature(data: bytes) -> str:
    """Say what a file that is no image looks like."""
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, perhaps a failed download"
    if head.startswith((b"<?xml", b"<svg")):
        return "it is XML or SVG; export it as PNG"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    return f"it begins with the bytes {data[:8].hex(' ')}"
