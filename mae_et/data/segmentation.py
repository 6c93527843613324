"""Scenes and the class of each of their pixels: pairs of image and mask, ADE20K, COCO panoptic."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mae_et.data.decode import DEFAULT_MAX_PIXELS
from mae_et.data.files import IMAGE_EXTENSIONS, SPLITS, FileSource, PathTable, listed, read_image
from mae_et.data.folders import walk_images
from mae_et.data.index import Watch
from mae_et.data.index_masks import decode_indices, on_shown_grid, to_classes
from mae_et.data.panoptic import PANOPTIC_SPLITS, open_panoptic
from mae_et.data.segmentation_transforms import IGNORE
from mae_et.data.splits import Chosen, draw_held_out

KINDS = ("pairs", "ade20k", "coco_panoptic")
_MOST_CLASSES = 255  # 255 itself stands for none
_ADE20K = {"train": "training", "val": "validation"}
_ADE20K_CLASSES = 150
_HOLD_OUT = int.from_bytes(b"scenes", "big")  # second word of a Philox key; see mae_et.data.splits


class SegmentationSource(Protocol):
    """A numbered set of images, each with a mask.

    Attributes:
        name: what it is called in messages and logs.
        channels: 1 or 3, of every image.
        classes: the classes' names, by number; at most 255.
    """

    name: str
    channels: int
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        ...

    def mask(self, i: int) -> torch.Tensor:
        """Return the class of each pixel of image `i`, uint8 [H, W], 255 for none; raise ImageError as `image`."""
        ...

    def describe(self, i: int) -> str:
        """Return the path of image `i`."""
        ...


class MaskedFiles:
    """Image files and their mask files.

    Args:
        images: the images.
        masks: paths of their masks, in the same order.
        classes: names, by number.
        table: int16 [65536], the class of each value of a mask, 255 for ignored ones, -1 for those that are none.
        advice: what values there are and what to do about others, for messages.
    """

    def __init__(
        self, images: FileSource, masks: PathTable, classes: tuple[str, ...], table: np.ndarray, advice: str
    ) -> None:
        assert len(images) == len(masks)
        self.name, self.channels = images.name, images.channels
        self.classes = classes
        self.images, self.masks = images, masks
        self._table, self._advice = table, advice

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; raise ImageError if it cannot be used."""
        return self.images.image(i)

    def mask(self, i: int) -> torch.Tensor:
        """Return the classes of image `i`, uint8 [H, W]; for images that a camera turned see `on_shown_grid`.

        Raises ImageError if the mask cannot be read, holds a value that is no class, or differs in size.
        """
        path, image = self.masks[i], self.images.path(i)
        values = decode_indices(read_image(path, path), path, self.images.max_pixels)
        classes = to_classes(values, self._table, path, self._advice)
        return torch.from_numpy(on_shown_grid(classes, path, read_image(image, image), image))

    def describe(self, i: int) -> str:
        """Return the path of image `i`."""
        return self.images.describe(i)


def open_segmentation(
    kind: str,
    root: str | Path,
    split: str = "train",
    channels: int = 3,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    classes: Sequence[str] = (),
    masks: str = "masks",
    binary: bool = False,
    ignore: int = IGNORE,
) -> SegmentationSource:
    """Open a set of images with masks.

    - `"pairs"`: images in root/SPLIT/images and masks in root/SPLIT/MASKS, or root/images/SPLIT and root/MASKS/SPLIT;
      without splits root/images and root/MASKS are "train". An image and its mask have the same path but for the
      extension. Masks are PNG of one channel, whose values are class numbers.
    - `"ade20k"`: the layout of ADEChallengeData2016, images/training beside annotations/training; value 0, "other", is
      ignored and 1..150 become 0..149. Names are those of objectInfo150.txt if root has it, else numbers.
    - `"coco_panoptic"`: things and stuff, see `mae_et.data.panoptic`.

    Args:
        kind: one of `KINDS`.
        root: the folder with the data.
        split: "train", "val" or "test".
        channels: 3 for RGB, 1 for luma.
        max_pixels: larger images and masks raise ImageError when they are read.
        classes: names by number, for pairs; by default a name a line of root/classes.txt, and background and
            foreground of binary masks.
        masks: name of the folder of masks, for pairs.
        binary: every value above 0 is class 1, such as 255, or the number of an object.
        ignore: value of pixels without a class, for pairs. In binary masks 255 is class 1 all the same.

    Raises:
        ValueError: if the kind, the split, a folder or an image's mask is not there, or classes are missing.
    """
    _check(kind, channels)
    place = Path(root).expanduser()
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; set data.root=... to the folder with images and masks")
    splits = segmentation_splits(kind, place)
    if split not in splits:
        raise ValueError(f"{kind} in {place} has no split '{split}'; it has {', '.join(splits) or 'none'}")
    if kind != "pairs" and classes:
        raise ValueError(f"data.names={list(classes)}: {kind} has classes of its own; leave the key out")
    if kind == "coco_panoptic":
        return open_panoptic(place, split, channels, max_pixels)
    if kind == "ade20k":
        folders = place / "images" / _ADE20K[split], place / "annotations" / _ADE20K[split]
        names, table = _ade20k_names(place), np.full(1 << 16, -1, np.int16)
        table[: _ADE20K_CLASSES + 1] = [IGNORE, *range(_ADE20K_CLASSES)]
        advice = f"masks of ADE20K hold 0 (other) to {_ADE20K_CLASSES}; use the release of 2016 with 150 classes"
    else:
        folders = _pair_folders(place, split, masks)
        names = _names(place, classes, binary)
        table, advice = _table(len(names), binary, ignore)
    images, mask_paths = _matched(f"{kind} {split}", *folders, channels, max_pixels)
    return MaskedFiles(images, mask_paths, names, table, advice)


def segmentation_splits(kind: str, root: str | Path) -> tuple[str, ...]:
    """Return which splits a set has in a folder; opens no image. Raises ValueError for an unknown kind."""
    _check(kind, 3)
    place = Path(root).expanduser()
    if kind == "coco_panoptic":
        return tuple(split for split, file in PANOPTIC_SPLITS.items() if (place / file).is_file())
    if kind == "ade20k":
        return tuple(split for split, folder in _ADE20K.items() if (place / "images" / folder).is_dir())
    found = [s for s in SPLITS if (place / s / "images").is_dir() or (place / "images" / s).is_dir()]
    return tuple(found) or (("train",) if (place / "images").is_dir() else ())


def _check(kind: str, channels: int) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"data.source={kind} is unknown; {hint}there are {', '.join(KINDS)}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: images have 1 (luma) or 3 (RGB) channels")


def _pair_folders(root: Path, split: str, masks: str) -> tuple[Path, Path]:
    for images, found in ((f"{split}/images", f"{split}/{masks}"), (f"images/{split}", f"{masks}/{split}")):
        if (root / images).is_dir():
            return root / images, root / found
    return root / "images", root / masks


def _names(root: Path, classes: Sequence[str], binary: bool) -> tuple[str, ...]:
    file = root / "classes.txt"
    origin = "data.names"
    names = tuple(str(name) for name in classes)
    if not names and binary:
        names = ("background", "foreground")
    elif not names and file.is_file():
        origin, names = str(file), tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    if not names:
        raise ValueError(
            f"the masks of {root} have no class names: set data.names=[...] in the order of their numbers from 0 on, "
            f"write them into {file}, one a line, or set data.binary=true if all above 0 is one class"
        )
    if binary and len(names) != 2:
        raise ValueError(f"{origin} has {len(names)} names, and binary masks have 2 classes: name those")
    if not 2 <= len(names) <= _MOST_CLASSES:
        raise ValueError(f"{origin} has {len(names)} names; there can be 2 to {_MOST_CLASSES} classes")
    twice = [name or "(an empty line)" for name in names if names.count(name) > 1 or not name]
    if twice:
        raise ValueError(f"{origin} names {listed(sorted(set(twice)))} more than once, or not at all")
    return names


def _table(classes: int, binary: bool, ignore: int) -> tuple[np.ndarray, str]:
    if not 0 <= ignore < 1 << 16:
        raise ValueError(f"data.ignore={ignore} is no value of a mask; those are 0 to 65535")
    table = np.full(1 << 16, 1 if binary else -1, np.int16)
    table[: 1 if binary else classes] = range(1 if binary else classes)
    if not binary or ignore != IGNORE:
        table[ignore] = IGNORE
    advice = (
        f"the {classes} classes have 0 to {classes - 1}, and {ignore} is ignored; name all in data.names, or set "
        f"data.ignore to it, or data.binary=true if all above 0 is one class"
    )
    return table, advice


def _ade20k_names(root: Path) -> tuple[str, ...]:
    """The last column of objectInfo150.txt, after five of numbers."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return tuple(str(number) for number in range(_ADE20K_CLASSES))
    rows = [line.split(None, 5) for line in file.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    numbers = [row[0] for row in rows]
    if numbers != [str(number) for number in range(1, _ADE20K_CLASSES + 1)] or any(len(row) < 6 for row in rows):
        raise ValueError(f"{file} should list classes 1 to {_ADE20K_CLASSES} in six columns; restore or remove it")
    return tuple(row[5].strip() for row in rows)


def _matched(name: str, images: Path, masks: Path, channels: int, max_pixels: int) -> tuple[FileSource, PathTable]:
    """Images with the masks of the same names."""
    if not masks.is_dir():
        raise ValueError(f"{masks} is not a folder: it should hold the masks of {images}; set data.masks to its name")
    image_paths, mask_paths = _by_stem(images), _by_stem(masks)
    if not image_paths:
        raise ValueError(f"no images in {images}: nothing below it ends in {', '.join(IMAGE_EXTENSIONS)}")
    foreign = [path for path in mask_paths.values() if not path.lower().endswith(".png")]
    if foreign:
        raise ValueError(f"masks must be PNG files, and {masks} has {listed(foreign)}; convert them without loss")
    alone = [path for stem, path in image_paths.items() if stem not in mask_paths]
    extra = [path for stem, path in mask_paths.items() if stem not in image_paths]
    if alone or extra:
        faults = [f"{images} has {listed(alone)} without masks"] * bool(alone)
        faults += [f"{masks} has {listed(extra)} without images"] * bool(extra)
        raise ValueError(f"{'; '.join(faults)}. An image and its mask have the same name but for the extension")
    source = FileSource(name, images, image_paths.values(), channels=channels, max_pixels=max_pixels)
    return source, PathTable(str(masks / mask_paths[stem]) for stem in image_paths)


def _by_stem(folder: Path) -> dict[str, str]:
    """Paths below a folder by what they are without extension, in order."""
    paths: dict[str, str] = {}
    for prefix, name in walk_images(folder, IMAGE_EXTENSIONS, Watch()):
        stem = prefix + name.rpartition(".")[0]
        if stem in paths:
            raise ValueError(f"{folder} has both {paths[stem]!r} and {prefix + name!r}, one name twice; remove one")
        paths[stem] = prefix + name
    return paths


class SegmentationSubset(Chosen[SegmentationSource]):
    """Chosen images of a source, numbered anew, with the source's classes."""

    def mask(self, i: int) -> torch.Tensor:
        """Return the class of each pixel of image `i`, uint8 [H, W], 255 for none; raise ImageError as `image`."""
        return self.source.mask(self._index(i))


def hold_out_scenes(
    source: SegmentationSource, share: float, seed: int
) -> tuple[SegmentationSubset, SegmentationSubset]:
    """Split a set into (kept, held out), for choosing what test data must not choose; see `draw_held_out`.

    Classes are not balanced: an image has many. Both parts are in the source's order.
    """
    held = draw_held_out(source, share, seed, _HOLD_OUT)
    return (
        SegmentationSubset(source, np.flatnonzero(~held), f"{source.name}, {1 - share:.3g} kept"),
        SegmentationSubset(source, np.flatnonzero(held), f"{source.name}, {share:.3g} held out"),
    )
