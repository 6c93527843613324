"""JPEGs of which the crop box alone is decoded, by TurboJPEG 3: `data.decoder` = turbojpeg or turbojpeg_scaled.

A crop of 20 to 100 % of the area needs 60 % of the pixels. The Huffman codes above and beside it must be read all the
same, which is most of the work; TurboJPEG stops below it. The pixels are those of a whole decode. With
`turbojpeg_scaled` large boxes are decoded at 1/2, 1/4 or 1/8 besides, by smaller inverse DCTs. That rounds the box
outward to whole scaled pixels. docs/performance.md has the rates and the error.

The library is called through ctypes. TurboJPEG's interface has opaque handles and no structures that change between
versions; libjpeg's own, which the wheels of Pillow and torchvision hold, has. It is the system's libturbojpeg where
that is of version 3 (Debian 12 has 2.1), else the one in the wheel `turbojpeg`.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from ctypes.util import find_library
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from mae_et.config import ConfigError
from mae_et.data.decode import JpegHeader, decode_image, read_jpeg_header
from mae_et.data.loader import RequestDataset
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source
from mae_et.data.transforms import Box, CropTransform, Size

TORCHVISION, TURBOJPEG, SCALED = "torchvision", "turbojpeg", "turbojpeg_scaled"

_EIGHTHS = (1, 2, 4)  # scales; 3/8, 5/8 and so on have no fast inverse DCT
# Of turbojpeg.h: TJINIT_DECOMPRESS, TJPARAM_SUBSAMP, TJPF_RGB, TJPF_GRAY.
_DECOMPRESS, _SUBSAMPLING, _RGB, _GRAY = 1, 4, 0, 6
_END_OF_IMAGE = b"\xff\xd9"
_MCU_WIDTH = (8, 16, 16, 8, 8, 32, 8)  # px, by TJSAMP_: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1
_CONTEXT = 2  # scaled px beside the box, from which the chroma of its edges is interpolated


class _Scale(ctypes.Structure):
    _fields_ = (("numerator", c_int), ("denominator", c_int))


class _Region(ctypes.Structure):
    _fields_ = (("x", c_int), ("y", c_int), ("width", c_int), ("height", c_int))


_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "tj3Init": (c_void_p, [c_int]),
    "tj3DecompressHeader": (c_int, [c_void_p, c_char_p, c_size_t]),
    "tj3Destroy": (None, [c_void_p]),
    "tj3Get": (c_int, [c_void_p, c_int]),
    "tj3SetScalingFactor": (c_int, [c_void_p, _Scale]),
    "tj3SetCroppingRegion": (c_int, [c_void_p, _Region]),
    "tj3Decompress8": (c_int, [c_void_p, c_char_p, c_size_t, c_void_p, c_int, c_int]),
}


def _candidates() -> list[str]:
    """Paths and names of libraries that may be TurboJPEG, the system's first."""
    names = [str(path) for path in sorted(Path(sys.prefix, "lib").glob("libturbojpeg.*"))]  # conda's
    names += [name for name in [find_library("turbojpeg")] if name is not None]
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    return names + [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """TurboJPEG of version 3 or later; raises OSError if there is none."""
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
            for function, (result, arguments) in _SIGNATURES.items():
                getattr(library, function).restype, getattr(library, function).argtypes = result, arguments
        except (OSError, AttributeError):  # not to be loaded, or of version 2
            continue
        return library
    raise OSError("no TurboJPEG library of version 3 is installed")


@lru_cache(maxsize=1)
def _handle() -> c_void_p:
    """A decompressor, one a process: its memory is copied by a fork."""
    return c_void_p(_library().tj3Init(_DECOMPRESS))


def _check_installed(decoder: str) -> None:
    try:
        _library()
    except OSError as error:
        hint = (
            "pip install turbojpeg, whose wheels hold one (x86-64 Linux, Python up to 3.13), install the system's or "
            f"conda's libturbojpeg, or set data.decoder={TORCHVISION}"
        )
        raise ConfigError(f"data.decoder={decoder}: {error}; {hint}") from None


def decode_box(data: bytes, header: JpegHeader, box: Box, size: Size | None, channels: int = 3) -> torch.Tensor | None:
    """Decode a box of a JPEG.

    Args:
        data: the file.
        header: of the file.
        box: (top, left, height, width) in px of the image as it is stored.
        size: (height, width) in px that the box will be resized to: it is decoded at the smallest of 1/8, 1/4, 1/2 and
            1 that keeps it no smaller. None decodes at 1.
        channels: 3 for RGB, 1 for luma.

    Returns:
        uint8 [channels, h, w], with the channels innermost in memory: at scale 1 the pixels of a whole decode, else the
        scaled image's from the box's edges rounded outward. None if the file does not end in the end-of-image
        marker, the library has any complaint, or the chroma is subsampled in a way that it does not know.
    """
    # What lies below the box is not read: nobody else would notice that it is missing.
    pixels = _decoded(data, header, box, _scale_for(box, size), channels) if data.endswith(_END_OF_IMAGE) else None
    if pixels is None:
        # After an error in a header 2.1.92 refuses all that follows.
        _library().tj3Destroy(_handle())
        _handle.cache_clear()
    return pixels


def _decoded(data: bytes, header: JpegHeader, box: Box, eighths: int, channels: int) -> torch.Tensor | None:
    # Exactly eighths / 8: the scaled image's sides are rounded up, so that their ratio to the full ones is another.
    top, left, height, width = box
    rows = range(top * eighths // 8, _up(top + height, eighths))
    columns = range(left * eighths // 8, _up(left + width, eighths))
    library, handle = _library(), _handle()
    if library.tj3DecompressHeader(handle, data, len(data)):
        return None
    subsampling = library.tj3Get(handle, _SUBSAMPLING)
    if not 0 <= subsampling < len(_MCU_WIDTH):
        return None
    block = _MCU_WIDTH[subsampling] * eighths // 8
    start = max(0, columns.start - _CONTEXT) // block * block
    stop = min(columns.stop + _CONTEXT, _up(header.width, eighths))
    pixels = torch.empty((len(rows), stop - start, channels), dtype=torch.uint8)
    if library.tj3SetScalingFactor(handle, _Scale(1, 8 // eighths)) or library.tj3SetCroppingRegion(
        handle, _Region(start, rows.start, stop - start, len(rows))
    ):
        return None
    form = _RGB if channels == 3 else _GRAY
    if library.tj3Decompress8(handle, data, len(data), pixels.data_ptr(), pixels.stride(0), form):
        return None
    return pixels[:, columns.start - start : columns.stop - start].permute(2, 0, 1)


def _scale_for(box: Box, size: Size | None) -> int:
    """The smallest scale, in eighths, at which the box is no smaller than the size."""
    if size is None:
        return 8
    return next((m for m in _EIGHTHS if box[2] * m >= 8 * size[0] and box[3] * m >= 8 * size[1]), 8)


def _up(length: int, eighths: int) -> int:
    """A length in scaled px, rounded up, as libjpeg rounds an image's sides."""
    return -(-length * eighths // 8)


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source of image files."""

    max_pixels: int

    def read(self, i: int) -> bytes:
        """Return the bytes of image `i`; raise ImageError if it cannot be read."""
        ...


class RegionDataset(RequestDataset):
    """As `RequestDataset`, but of upright JPEGs the crop box alone is decoded.

    Other formats, turned photos, and files that TurboJPEG complains of go through `decode_image`: damaged ones get its
    errors. The box and the flip are drawn from the size in the file's header, and do not depend on the decoder.

    Args:
        source: of files.
        transform: crops, flips and resizes.
        replace: see `RequestDataset`.
        scaled: decode large boxes at 1/2, 1/4 or 1/8.

    Raises:
        ConfigError: TurboJPEG is not installed.
    """

    source: EncodedSource

    def __init__(self, source: EncodedSource, transform: CropTransform, replace: bool = False, scaled: bool = False):
        super().__init__(source, transform, replace)
        _check_installed(SCALED if scaled else TURBOJPEG)
        self.crop, self.scaled = transform, scaled

    def view(self, request: SampleRequest, i: int) -> torch.Tensor:
        """Return the request's view of image `i`, uint8 [C, h, w]."""
        data, source = self.source.read(i), self.source
        header = read_jpeg_header(data, source.max_pixels)
        if header is not None and header.upright:
            box, mirrored = self.crop.draw(header.height, header.width, request.seed)
            size = self._first_size(request) if self.scaled else None
            pixels = decode_box(data, header, box, size, source.channels)
            if pixels is not None:
                return self.crop.of_crop(pixels, request, mirrored)
        return self.transform(decode_image(data, source.describe(i), source.channels, source.max_pixels), request)

    def _first_size(self, request: SampleRequest) -> Size:
        return request.size if self.crop.method == "resize" else self.crop.final_size


def build_dataset(source: Source, transform: CropTransform, decoder: str, replace: bool) -> RequestDataset:
    """Return the dataset for a value of `data.decoder`; a source that is no set of files has nothing to decode.

    Raises:
        ConfigError: the decoder's library is not installed.
    """
    if decoder == TORCHVISION or not isinstance(source, EncodedSource):
        return RequestDataset(source, transform, replace)
    return RegionDataset(source, transform, replace, scaled=decoder == SCALED)
