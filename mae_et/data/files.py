"""Sources whose images are files: class folders, unlabelled trees, lists of paths.

Workers are forked, and reading a Python string writes its reference count: a list of millions of paths is copied into
every worker, page by page. Paths and labels therefore live in flat buffers.
"""

from __future__ import annotations

import os
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


class PathTable:
    """Many paths in two flat buffers: their bytes, end to end, and where each one ends."""

    def __init__(self, paths: Iterable[str]) -> None:
        text = bytearray()
        ends = array("q", [0])
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self._bytes = bytes(text)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"path {i} of {len(self)}")
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]])

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
        lines: tuple[Path, Sequence[int]] | None = None,
    ) -> None:
        self.name = name
        self.root = root
        self.paths = paths if isinstance(paths, PathTable) else PathTable(paths)
        self.labels = np.full(len(self.paths), -1, np.int32) if labels is None else np.array(labels, np.int32)
        self.classes = tuple(classes)
        self.channels = channels
        self.max_pixels = max_pixels
        self._lines = None if lines is None else (lines[0], np.array(lines[1], np.int64))
        assert len(self.labels) == len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; a missing, unreadable or damaged file raises ImageError.

        Other faults of the disk or the network raise OSError: they say nothing about the image.
        """
        try:
            with open(self.path(i), "rb") as file:  # noqa: PTH123  Path.read_bytes takes 6 us longer
                data = file.read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise ImageError(f"{self.describe(i)}: cannot be read: {error.strerror}") from error
        return decode_image(data, self.describe(i), self.channels, self.max_pixels)

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


def walk_images(folder: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> Iterator[str]:
    """Yield the paths below a folder, relative to it, that have an image's extension; sorted by name in each folder.

    Names that begin with a dot are skipped, linked folders are followed. No file is opened or asked for its status:
    what the directory says is enough.
    """
    yield from _walk(folder, "", tuple(extension.lower() for extension in extensions), (os.path.realpath(folder),))


def _walk(folder: Path, prefix: str, extensions: tuple[str, ...], above: tuple[str, ...]) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.name.lower().endswith(extensions) and not entry.is_dir(follow_symlinks=False):
            yield prefix + entry.name
        elif entry.is_dir():
            real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
            if real not in above:  # a link to a folder that it lies in would never end
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", extensions, (*above, real))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, hidden ones left out."""
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def open_folder(
    name: str,
    folder: Path,
    channels: int,
    max_pixels: int,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    classes: Sequence[str] | None = None,
) -> FileSource:
    """Open the images of a folder: labelled by sub-folder if each lies in a sub-folder of it, else without labels.

    Args:
        classes: the classes to number by, if another split has settled them; by default the sub-folders' names, sorted.

    Raises:
        ValueError: if there is no image, a sub-folder of a labelled folder has none, or its name is not in `classes`.
    """
    paths = PathTable(walk_images(folder, extensions))
    if not len(paths):
        raise ValueError(f"no images in {folder}: nothing below it ends in {', '.join(extensions)}; check data.root")
    folders, owners = _owners(paths)
    if folders is None:
        return FileSource(name, folder, paths, None, (), channels, max_pixels)
    empty = sorted(set(subfolders(folder)) - set(folders))
    if empty:
        raise ValueError(
            f"class folder {folder / empty[0]} has no images ({len(empty)} such); fill it or remove it, so that the "
            f"labels mean the same in every split"
        )
    number = {label: i for i, label in enumerate(folders if classes is None else classes)}
    unknown = [label for label in folders if label not in number]
    if unknown:
        others = f" (nor are {listed(unknown[1:])})" if unknown[1:] else ""
        raise ValueError(
            f"class folder {folder / unknown[0]} is not among the {len(number)} classes of the train split{others}; "
            f"name the class folders of {folder.name} as those of train, or remove them"
        )
    labels = np.array([number[label] for label in folders], np.int32)[owners]
    return FileSource(name, folder, paths, labels, tuple(number), channels, max_pixels)


def listed(names: Sequence[str]) -> str:
    """Return the first three names, quoted, and how many more there are: "'a', 'b', 'c' and 4 more"."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def _owners(paths: PathTable) -> tuple[list[str] | None, np.ndarray]:
    """Return the sub-folders' names and which one each image is in; None unless all are exactly one level deep."""
    folders: list[str] = []
    owners = np.zeros(len(paths), np.int32)
    for i, path in enumerate(paths):
        parts = path.split("/")
        if len(parts) != 2:
            return None, owners
        if not folders or folders[-1] != parts[0]:  # the walk is sorted: a folder's images follow each other
            folders.append(parts[0])
        owners[i] = len(folders) - 1
    return folders, owners


def has_images(folder: Path, extensions: Sequence[str]) -> bool:
    """Tell whether images lie directly in a folder."""
    endings = tuple(extension.lower() for extension in extensions)
    return any(entry.name.lower().endswith(endings) for entry in _entries(folder))


def split_folders(root: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[str]:
    """Return which of train, val and test are sub-folders of root that hold splits; none if they are classes.

    A folder `train` full of images beside other folders full of images is a class of railway pictures.
    """
    names = subfolders(root)
    splits = [split for split in SPLITS if split in names]
    flat = any(has_images(root / split, extensions) for split in splits)
    if flat and any(has_images(root / name, extensions) for name in names if name not in SPLITS):
        return []
    return splits
