"""Text files that list images, one a line, with or without labels."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mae_et.data.files import SPLITS, FileSource, PathTable
from mae_et.data.index import Index, Watch, open_index

_MOST_CLASSES = 10_000_000  # each number up to the largest has a name: a stray one must not fill the memory
_LONGEST = 1 << 16  # characters of a line: a file without lines must not fill it either


def read_list(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the images that a list file names: line number (from 1), path and label, "" for none.

    A line is a path, or a path, a TAB and a label. Blank lines and lines that begin with `#` are skipped. Raises
    ValueError where the file is no UTF-8 text, or a line is longer than paths are.
    """
    with path.open(encoding="utf-8-sig", newline=None) as lines:
        try:
            for number, line in enumerate(iter(partial(lines.readline, _LONGEST), ""), 1):
                if len(line) == _LONGEST:
                    raise ValueError(f"{path}, line {number} is too long: kind 'list' takes one path a line")
                text = line.strip()
                if text and text[0] != "#":
                    image, _, label = line.partition("\t")
                    yield number, image.strip(), label.strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a UTF-8 text file; kind 'list' takes one path a line") from error


def _read_index(path: Path, watch: Watch) -> Index:
    """Read a list file, line by line, into flat arrays; labels are numbered as they come."""
    watch.add(os.path.abspath(path))  # noqa: PTH100
    numbers = {"": -1}
    labels, lines = array("i"), array("q")

    def paths() -> Iterator[str]:
        for line, image, label in read_list(path):
            lines.append(line)
            labels.append(numbers.setdefault(label, len(numbers) - 1))
            yield image

    table = PathTable(paths())
    return Index(table, np.array(labels, np.int32), tuple(numbers)[1:], np.array(lines, np.int64))


def _open_index(path: Path) -> Index:
    return open_index(("list", os.path.abspath(path)), lambda watch: _read_index(path, watch))  # noqa: PTH100


def open_list(root: Path, split: str, channels: int, max_pixels: int) -> FileSource:
    """Open a list file (split "train" only), or `<root>/<split>.txt` where root is a folder.

    Labels are class numbers if all of them are integers, else names, numbered in sorted order of the names in
    `train.txt`. Images without a label get -1. The paths are relative to the list file; a missing image is found when
    it is read.

    Raises:
        ValueError: if there is no such list, it is empty, or a label is negative or unknown to `train.txt`.
    """
    path = _list_path(root, split)
    index = _open_index(path)
    if not len(index.paths):
        raise ValueError(f"{path} lists no images; it takes one path a line, then optionally a TAB and a label")
    train = path.with_name("train.txt")
    numbered_by_train = split != "train" and root.is_dir() and train.is_file()
    classes = _class_names(_open_index(train).names if numbered_by_train else index.names, path)
    number = {name: i for i, name in enumerate(classes)}
    unknown = [i for i, name in enumerate(index.names) if name not in number]
    if unknown:
        first = int(np.flatnonzero(np.isin(index.labels, unknown))[0])
        line, label = index.lines[first], index.names[index.labels[first]]
        raise ValueError(f"{path}, line {line}: label {label!r} is none of the {len(classes)} of {train}")
    labels = np.array([*(number[name] for name in index.names), -1], np.int32)[index.labels]
    lines = (path, index.lines)
    return FileSource(f"list {split}", path.parent, index.paths, labels, classes, channels, max_pixels, lines)


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


def _class_names(names: Sequence[str], path: Path) -> tuple[str, ...]:
    try:
        numbers = {name: int(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    wrong = [name for name, number in numbers.items() if not 0 <= number < _MOST_CLASSES or name != str(number)]
    if wrong:
        raise ValueError(f"{path}: label {wrong[0]!r} is no class number; write 0, 1, 2, ..., or leave it out for none")
    return tuple(str(number) for number in range(max(numbers.values(), default=-1) + 1))
