"""Folders of images: class folders, unlabelled trees, folders with splits."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_et.data.files import IMAGE_EXTENSIONS, SPLITS, FileSource, PathTable, listed
from mae_et.data.index import Index, Watch, open_index


def walk_images(folder: Path, extensions: Sequence[str], watch: Watch) -> Iterator[tuple[str, str]]:
    """Yield the images below a folder, as the folder they lie in, relative to it ("" or "a/b/"), and their name.

    They are the files that have an image's extension, sorted by name in each folder. Names that begin with a dot are
    skipped, linked folders are followed. No file is opened or asked for its status: what the directory says is enough.
    The folders, and the links that lead nowhere, which may be folders one day, are added to `watch`.
    """
    top = os.path.abspath(folder)  # noqa: PTH100  what is watched may be asked for from another working directory
    yield from _walk(top, "", _endings(extensions), (os.path.realpath(top),), watch)


def _walk(
    folder: str, prefix: str, endings: tuple[str, ...], above: tuple[str, ...], watch: Watch
) -> Iterator[tuple[str, str]]:
    watch.add(folder)
    images, folders = [], {}
    with os.scandir(folder) as entries:
        for entry in entries:  # millions of entries would take a gigabyte: their names are kept
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(endings) and not entry.is_dir(follow_symlinks=False):
                images.append(entry.name)
            elif _is_folder(entry):
                real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
                if real not in above:  # a link to a folder that it lies in would never end
                    folders[entry.name] = real
            elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                watch.add(entry.path)
    for name in sorted([*images, *folders]):
        if name in folders:
            yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", endings, (*above, folders[name]), watch)
        else:
            yield prefix, name


def _endings(extensions: Sequence[str]) -> tuple[str, ...]:
    return tuple(extension.lower() for extension in extensions)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # is_dir() of a link that leads to itself is an OSError.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))  # noqa: PTH112


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


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
    key = ("folder", os.path.abspath(folder), *_endings(extensions))  # noqa: PTH100
    index = open_index(key, lambda watch: _read_folder(folder, extensions, watch))
    if not len(index.paths):
        raise ValueError(f"no images in {folder}: nothing below it ends in {', '.join(extensions)}; check data.root")
    folders = index.names
    if not folders:
        return FileSource(name, folder, index.paths, index.labels, (), channels, max_pixels)
    empty = sorted(set(subfolders(folder)) - set(folders))
    if empty:
        raise ValueError(
            f"class folder {folder / empty[0]} has no images ({len(empty)} such); fill it or remove it, so that the "
            f"labels mean the same in every split"
        )
    if classes is None:
        return FileSource(name, folder, index.paths, index.labels, folders, channels, max_pixels)
    number = {label: i for i, label in enumerate(classes)}
    unknown = [label for label in folders if label not in number]
    if unknown:
        others = f" (nor are {listed(unknown[1:])})" if unknown[1:] else ""
        raise ValueError(
            f"class folder {folder / unknown[0]} is not among the {len(number)} classes of the train split{others}; "
            f"name the class folders of {folder.name} as those of train, or remove them"
        )
    labels = np.array([number[label] for label in folders], np.int32)[index.labels]
    return FileSource(name, folder, index.paths, labels, tuple(number), channels, max_pixels)


def _read_folder(folder: Path, extensions: Sequence[str], watch: Watch) -> Index:
    """Walk a folder; its sub-folders are the names of the labels if all images are exactly one level deep."""
    prefixes: list[str] = []
    owners = array("i")

    def paths() -> Iterator[str]:
        for prefix, name in walk_images(folder, extensions, watch):
            if not prefixes or prefixes[-1] != prefix:  # the walk is sorted: a class's images follow each other
                prefixes.append(prefix)
            owners.append(len(prefixes) - 1)
            yield prefix + name

    table = PathTable(paths())
    if not all(prefix.count("/") == 1 for prefix in prefixes):
        return Index(table, np.full(len(table), -1, np.int32), (), np.empty(0, np.int64))
    names = tuple(prefix[:-1] for prefix in prefixes)
    return Index(table, np.array(owners, np.int32), names, np.empty(0, np.int64))


def has_images(folder: Path, extensions: Sequence[str]) -> bool:
    """Tell whether images lie directly in a folder."""
    endings = _endings(extensions)
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(endings) and not entry.name.startswith(".") for entry in entries)


def split_folders(root: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> list[str]:
    """Return which of train, val and test are sub-folders of root that hold splits; none if they are classes.

    A folder `train` full of images beside other folders full of images is a class of railway pictures.
    """
    splits = [split for split in SPLITS if (root / split).is_dir()]
    flat = any(has_images(root / split, extensions) for split in splits)
    if flat and any(has_images(root / name, extensions) for name in subfolders(root) if name not in SPLITS):
        return []
    return splits
