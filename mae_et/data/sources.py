"""Where images come from: one small interface over folders, lists and published sets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mae_et.data.archives import ArraySource, open_cifar, open_fashion_mnist, open_flowers102
from mae_et.data.decode import DEFAULT_MAX_PIXELS
from mae_et.data.files import IMAGE_EXTENSIONS, SPLITS, FileSource
from mae_et.data.folders import open_folder, split_folders, subfolders
from mae_et.data.lists import open_list
from mae_et.data.packed import count_packed, is_packed_split, is_url, open_packed, packed_splits
from mae_et.data.published import open_food101, open_nabirds, open_stanford_dogs

__all__ = [
    "IMAGE_EXTENSIONS",
    "KINDS",
    "ArraySource",
    "FileSource",
    "Source",
    "available_splits",
    "count_images",
    "open_source",
]

# How many images the splits of the sets of fixed content have.
_COUNTS = {
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "flowers102": {"train": 1_020, "val": 1_020, "test": 6_149},
    "stanford_dogs": {"train": 12_000, "test": 8_580},
    "food101": {"train": 75_750, "test": 25_250},
    "nabirds": {"train": 23_929, "test": 24_633},
}
# Which splits each kind can have; a folder's or a list's depend on what is there.
_SPLITS = {
    "folder": SPLITS,
    "list": SPLITS,
    **{kind: tuple(counts) for kind, counts in _COUNTS.items()},
    "imagenet1k": ("train", "val"),
    "imagenet22k": ("train",),
    "packed": SPLITS,
}
KINDS = tuple(_SPLITS)
# Published sets whose images are files: 102 flowers, 120 breeds, 101 dishes, 555 birds.
_OPENERS = {
    "flowers102": open_flowers102,
    "stanford_dogs": open_stanford_dogs,
    "food101": open_food101,
    "nabirds": open_nabirds,
}


class Source(Protocol):
    """A numbered set of images, with or without labels.

    Attributes:
        name: what it is called in messages and logs.
        channels: 1 or 3, of every image.
        classes: the classes' names, by class number; empty if there are none.
        labels: the class number of every image, int32 [N], -1 for none.
    """

    name: str
    channels: int
    classes: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int: ...

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        ...

    def label(self, i: int) -> int:
        """Return the class number of image `i`, -1 for none."""
        ...

    def describe(self, i: int) -> str:
        """Return what tells a reader which image this is: its path, or "fashion-mnist train #17"."""
        ...


def open_source(
    kind: str,
    root: str | Path | None = None,
    split: str = "train",
    download: bool = True,
    channels: int = 3,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
) -> Source:
    """Open a set of images.

    - `"folder"`: root's sub-folder named as the split if root has one, else root itself (split "train"). If every image
      lies in a sub-folder of it, exactly one level deep, the sub-folders are the classes, numbered by name; else the
      tree has no labels. Where root has a split "train", its sub-folders number the classes of val and test as well: a
      class that those lack is no fault (its number stays free), one that train lacks is.
    - `"list"`: a text file with a path a line and optionally a TAB and a label, or a folder of train.txt, val.txt, ...
    - `"fashion_mnist"`, `"cifar10"`, `"cifar100"`, `"flowers102"`, `"stanford_dogs"`, `"food101"`: looked for in root,
      else downloaded into it (into `~/.cache/mae_et` without root). `"nabirds"`: looked for there, never downloaded.
    - `"imagenet1k"`: `<root>/train/<class>/*`, `<root>/val/<class>/*`. `"imagenet22k"`: `<root>/<class>/*`.
    - `"packed"`: a store that `python -m mae_et pack` wrote.

    Args:
        kind: one of `KINDS`.
        root: the folder (or list file) with the data; of a packed store, a URL that fsspec knows as well.
        split: "train", "val" or "test".
        download: allow the published sets to be downloaded.
        channels: 3 for RGB, 1 for luma; grey images are repeated or kept.
        max_pixels: larger images raise ImageError when they are read, before they are decoded.
        extensions: which files of a folder are images, by the end of their names, in any case.

    Raises:
        ValueError: if the kind, the split or the folder is not there, saying which are and what to set.
    """
    _check(kind, split, channels)
    if kind == "packed" and root is not None:
        return open_packed(root, split, channels, max_pixels)
    if root is not None and is_url(root):
        raise ValueError(f"{root} is a URL, behind which packed stores alone are read; set data.source=packed")
    place = None if root is None else Path(root).expanduser()
    if kind == "fashion_mnist":
        return open_fashion_mnist(place, split, download, channels)
    if kind in ("cifar10", "cifar100"):
        return open_cifar(kind, place, split, download, channels)
    if kind in _OPENERS:
        return _OPENERS[kind](place, split, download, channels, max_pixels)
    if place is None:
        raise ValueError(f"kind '{kind}' needs the place of the images; set data.root=...")
    if kind == "list":
        return open_list(place, split, channels, max_pixels)
    return _open_folders(kind, place, split, channels, max_pixels, extensions)


def count_images(kind: str, root: str | Path | None = None, split: str = "train") -> int:
    """Return the number of images of a source without opening one: a published number, or names counted.

    Raises ValueError as `open_source` does.
    """
    _check(kind, split, 3)
    if kind in _COUNTS:
        return _COUNTS[kind][split]
    if kind == "packed" and root is not None:
        return count_packed(root, split)
    return len(open_source(kind, root, split, download=False))


def available_splits(kind: str, root: str | Path | None = None) -> tuple[str, ...]:
    """Return which splits a source has: those of a published set, or those that its folder holds; opens no image.

    Raises ValueError for an unknown kind. A folder or list that is not there has "train" alone; opening it says why.
    """
    _check(kind, "train", 3)
    if kind not in ("folder", "list", "packed") or root is None:
        return _SPLITS[kind]
    if kind == "packed":
        return tuple(packed_splits(root)) or ("train",)
    place = Path(root).expanduser()
    if kind == "list":
        found = [split for split in SPLITS if (place / f"{split}.txt").is_file()]
    else:
        found = split_folders(place) if place.is_dir() else []
    return tuple(found) or ("train",)


def _check(kind: str, split: str, channels: int) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"data.source={kind} is unknown; {hint}There are {', '.join(KINDS)}")
    if split not in _SPLITS[kind]:
        raise ValueError(f"{kind} has no split '{split}'; it has {', '.join(_SPLITS[kind])}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images have 1 (luma) or 3 (RGB) channels")


def _open_folders(
    kind: str, root: Path, split: str, channels: int, max_pixels: int, extensions: Sequence[str]
) -> FileSource:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; set data.root=... to the folder with the images")
    splits = [] if kind == "imagenet22k" else split_folders(root, extensions)
    if kind == "imagenet1k" and not splits:
        raise ValueError(f"{root} has no folder 'train' or 'val'; set data.root=... to the folder that holds them")
    if split not in (splits or ["train"]):
        raise ValueError(f"{root} has no split '{split}'; it has {', '.join(splits) or 'train (the folder itself)'}")
    # A class that val lacks must not shift the numbers of those after it.
    numbered_by_train = split != "train" and "train" in splits
    classes = (subfolders(root / "train") or None) if numbered_by_train else None
    folder = root / split if splits else root
    if is_packed_split(folder):
        store = folder.absolute().parent
        raise ValueError(f"{store} is a packed store; set data.source=packed data.root={store}")
    source = open_folder(f"{kind} {split}", folder, channels, max_pixels, extensions, classes)
    if kind != "folder" and not source.classes:
        raise ValueError(f"{folder} should hold one folder a class and the images in those; see data.source=folder")
    return source
