"""What becomes of one image: its name in a shard, and its bytes."""

from __future__ import annotations

import re
from io import BytesIO

import torch

from mae_et.data.decode import ImageError, decode_image
from mae_et.data.files import FileSource, PathTable
from mae_et.data.packed import PackedSource
from mae_et.data.sources import Source
from mae_et.data.transforms import bicubic, to_pil
from mae_et.engine.bad_images import printable
from mae_et.packing.settings import Settings, listed_names

# Their images lie in folders of their own, each under one name: a member has the same.
WALKED = ("folder", "imagenet1k", "imagenet22k", "packed")
_JPEG_MAGIC = b"\xff\xd8\xff"
_LONGEST = 65_500  # px of a side: JPEG's limit in libjpeg


class Namer:
    """Names of members: paths as in the folder that was packed, else <class>/<number>.jpg.

    Images are encoded as JPEG, so that other extensions get ".jpg" besides: photo.png is photo.png.jpg.

    Raises:
        ValueError: two images would have one name.
    """

    def __init__(self, kind: str, source: Source, keep_bytes: bool) -> None:
        self.source, self.keep_bytes = source, keep_bytes
        self.paths = listed_names(source) if kind in WALKED else None
        # Class names of published sets may hold a slash ("T-shirt/top"), or begin with a dot and be skipped.
        self.folders = [re.sub(r"^\.|[/\\]", "_", name) or "_" for name in source.classes]
        if self.paths is not None and not keep_bytes:
            self._check_unique(self.paths)

    def __call__(self, i: int) -> str:
        """Return the name of image `i`."""
        if self.paths is not None:
            path = printable(self.paths[i])
            return path if self.keep_bytes else _as_jpeg(path)
        label = self.source.label(i)
        folder = f"{self.folders[label]}/" if label >= 0 else ""
        return f"{folder}{i:08d}{self._extension(i)}"

    def _extension(self, i: int) -> str:
        if not self.keep_bytes:
            return ".jpg"
        names = listed_names(self.source)
        return ".png" if names is None else re.sub(r"^.*?(\.\w+)?$", r"\1", names[i], flags=re.DOTALL)

    def _check_unique(self, paths: PathTable) -> None:
        made = {_as_jpeg(path) for path in paths if _as_jpeg(path) != path}
        for path in paths if made else ():
            if path in made:
                raise ValueError(f"{path} and {path[:-4]} would have one name in the store: rename one of them")


def _as_jpeg(path: str) -> str:
    return path if path.lower().endswith((".jpg", ".jpeg")) else f"{path}.jpg"


def packed_bytes(source: Source, i: int, settings: Settings, max_pixels: int) -> tuple[bytes, int]:
    """Return the bytes that stand for image `i` in a store, and how many it had before (0: it was no file).

    An image is decoded whatever becomes of it. JPEGs whose short side is within the bound stay as they are; what is
    larger is resized, antialiased, once it is upright.

    Raises:
        ImageError: the image cannot be read.
        OSError: a fault of the disk or the network.
    """
    name = source.describe(i)
    data = source.read(i) if isinstance(source, FileSource | PackedSource) else None
    image = source.image(i) if data is None else decode_image(data, name, 3, max_pixels)
    before = 0 if data is None else len(data)
    height, width = image.shape[1:]
    short, bound = min(height, width), settings.short_side
    if settings.keep_bytes:
        return (_encoded(image, "PNG") if data is None else data), before
    if data is not None and data[:3] == _JPEG_MAGIC and short <= bound:
        return data, before
    if short > bound:
        height, width = (max(bound, round(side * bound / short)) for side in (height, width))
        image = bicubic(image, (height, width))
    if max(height, width) > _LONGEST:
        raise ImageError(f"{name}: {width} x {height} px: JPEG has at most {_LONGEST:,} a side")
    return _encoded(image, "JPEG", quality=settings.quality, subsampling=settings.subsampling), before


def _encoded(image: torch.Tensor, form: str, **how: int | str) -> bytes:
    buffer = BytesIO()
    to_pil(image).save(buffer, form, **how)
    return buffer.getvalue()
