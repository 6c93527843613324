"""Text files that list images, one a line, with or without labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_et.data.files import SPLITS, FileSource


class Line(NamedTuple):
    """One image of a list: its line number (from 1), its path and its label, "" for none."""

    number: int
    path: str
    label: str


def read_list(path: Path) -> Iterator[Line]:
    """Yield the images that a list file names; blank lines and lines that begin with `#` are skipped.

    A line is a path, or a path, a TAB and a label. Raises ValueError where the file is no UTF-8 text.
    """
    with path.open(encoding="utf-8-sig", newline=None) as lines:
        try:
            for number, line in enumerate(lines, 1):
                text = line.rstrip("\r\n")
                if text.strip() and not text.lstrip().startswith("#"):
                    image, _, label = text.partition("\t")
                    yield Line(number, image.strip(), label.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a UTF-8 text file; kind 'list' takes one path a line") from error


def open_list(root: Path, split: str, channels: int, max_pixels: int) -> FileSource:
    """Open a list file (split "train" only), or `<root>/<split>.txt` where root is a folder.

    Labels are class numbers if all of them are integers, else names, numbered in sorted order of the names in
    `train.txt`. Images without a label get -1. The paths are relative to the list file; a missing image is found when
    it is read.

    Raises:
        ValueError: if there is no such list, it is empty, or a label is negative or unknown to `train.txt`.
    """
    path = _list_path(root, split)
    numbers, paths, labels = [], [], []
    for line in read_list(path):
        numbers.append(line.number)
        paths.append(line.path)
        labels.append(line.label)
    if not paths:
        raise ValueError(f"{path} lists no images; it takes one path a line, then optionally a TAB and a label")
    train = path.with_name("train.txt")
    is_folder = root.is_dir() and train.is_file()
    known = {line.label for line in read_list(train)} if is_folder and split != "train" else set(labels)
    classes = _class_names(known, path)
    number_of = {name: i for i, name in enumerate(classes)} | {"": -1}
    for number, label in zip(numbers, labels):
        if label not in number_of:
            raise ValueError(f"{path}, line {number}: label {label!r} is none of the {len(classes)} of {train}")
    wanted = np.array([number_of[label] for label in labels], np.int32)
    return FileSource(f"list {split}", path.parent, paths, wanted, classes, channels, max_pixels, (path, numbers))


def _list_path(root: Path, split: str) -> Path:
    if root.is_dir():
        present = [name for name in SPLITS if (root / f"{name}.txt").is_file()]
        if split not in present:
            raise ValueError(
                f"{root} has no {split}.txt (it has {', '.join(present) or 'no list'}); put one path a line into it, "
                f"or name a list file: data.root=path/to/list.txt"
            )
        return root / f"{split}.txt"
    if not root.is_file():
        raise ValueError(f"list file {root} does not exist; set data.root= to a text file with one path a line")
    if split != "train":
        raise ValueError(
            f"{root} is one list, used for split 'train'; for '{split}' set data.root= to a folder with {split}.txt"
        )
    return root


def _class_names(labels: set[str], path: Path) -> tuple[str, ...]:
    names = labels - {""}
    try:
        numbers = {name: int(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    wrong = [name for name, number in numbers.items() if number < 0 or name != str(number)]
    if wrong:
        raise ValueError(f"{path}: label {wrong[0]!r} is no class number; write 0, 1, 2, ..., or leave it out for none")
    return tuple(str(number) for number in range(max(numbers.values(), default=-1) + 1))
