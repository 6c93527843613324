"""Sources whose images are files, opened one by one.

Workers are forked, and reading a Python string writes its reference count: a list of millions of paths is copied into
every worker, page by page. Paths and labels therefore live in flat buffers.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mae_et.data.decode import DEFAULT_MAX_PIXELS, ImageError, decode_image

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif",
)  # fmt: skip
SPLITS = ("train", "val", "test")
# What tells of one image, not of the disk: missing, forbidden, a folder, a socket, a link to itself, a line of text as
# its path.
_OF_THE_PATH = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
    errno.ENODEV,
}  # fmt: skip
_LARGEST = 1 << 30  # bytes of an image file


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for whoever writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_image(path: str, name: str) -> bytes:
    """The bytes of an image file.

    Args:
        path: of the file.
        name: what messages call it.

    Raises:
        ImageError: it is missing, not to be read, or no file of an image's size.
        OSError: other faults, of the disk or the network: they say nothing about the image.
    """
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                what = "a pipe or a device" if not stat.S_ISREG(status.st_mode) else f"{status.st_size:,} bytes"
                raise ImageError(f"{name}: it is {what}, and no image")
            return file.read()
    except ValueError as error:  # a NUL in a list
        raise error if isinstance(error, ImageError) else ImageError(f"{name!r}: cannot be read: {error}") from error
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise ImageError(f"{name}: cannot be read: {error.strerror}") from error


class PathTable:
    """Many paths in two flat buffers: their bytes, end to end, and where each one ends.

    Attributes:
        text: uint8 [bytes].
        ends: int64 [N + 1], from 0 on.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        text = bytearray()
        ends = array("q", [0])
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self.text, self.ends = np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> PathTable:
        """Return the table over two buffers, uint8 and int64; raises ValueError if they do not fit."""
        if not len(ends) or ends[0] != 0 or ends[-1] != len(text) or np.any(ends[1:] < ends[:-1]):
            raise ValueError(f"no path table: {len(ends)} ends of {len(text)} bytes are not in order")
        table = cls(())
        table.text, table.ends = text, ends
        return table

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"path {i} of {len(self)}")
        return os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class FileSource:
    """Image files, opened and decoded one by one.

    Args:
        name: what the source is called in messages and logs, such as "folder train".
        root: folder that the paths are relative to.
        paths: one path an image; absolute ones stand for themselves.
        labels: one class number an image, -1 for none; None if no image has a label.
        classes: the classes' names, by number.
        channels: 3 (RGB) or 1 (luma).
        max_pixels: images with more pixels are refused.
        lines: (path of a list file, line number of each image in it), for messages.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[str],
        labels: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] = (),
        channels: int = 3,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        lines: tuple[Path, Sequence[int] | np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.paths = paths if isinstance(paths, PathTable) else PathTable(paths)
        self.labels = np.full(len(self.paths), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        self.classes = tuple(classes)
        self.channels = channels
        self.max_pixels = max_pixels
        self._lines = None if lines is None else (lines[0], np.asarray(lines[1], np.int64))
        assert len(self.labels) == len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; a missing, unreadable or damaged file raises ImageError.

        Other faults of the disk or the network raise OSError: they say nothing about the image.
        """
        return decode_image(self.read(i), self.describe(i), self.channels, self.max_pixels)

    def read(self, i: int) -> bytes:
        """Return the bytes of image `i`; raises as `image` does, but for damaged ones."""
        return read_image(self.path(i), self.describe(i))

    def label(self, i: int) -> int:
        """Return the class number of image `i`, -1 for none."""
        return int(self.labels[i])

    def path(self, i: int) -> str:
        """Return the path of image `i`."""
        return os.path.join(self.root, self.paths[i])  # noqa: PTH118

    def describe(self, i: int) -> str:
        """Return the path of image `i`, and where a list names it."""
        if self._lines is None:
            return self.path(i)
        return f"{self.path(i)} (line {self._lines[1][i]} of {self._lines[0]})"


def listed(names: Sequence[str]) -> str:
    """Return the first three names, quoted, and how many more there are: "'a', 'b', 'c' and 4 more"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
