"""What a folder or a list file names, read once and kept: later runs, ranks and workers share one copy in memory.

An index is a few flat arrays in `~/.cache/mae_et/index/<data set>/<version>/`, mapped into memory when it is used.
Before that, every file and folder that it was read from is asked for its status: size, time of modification, time of
change. For a list that is the list; for a folder, each folder below it, since adding, removing or renaming a file
changes the time of the folder that it lies in. Anything else than what is on record, and the index is made anew.

Not noticed are: an image whose content changes (nothing about it is on record); changes on a file system that does not
keep the times of folders, as some object stores mounted as folders; a change that falls on the very tick of the clock
of the change before, long after it, because the clock was set back. Removing `~/.cache/mae_et/index` is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mae_et.data.archives import cache_folder
from mae_et.data.files import PathTable

# Reading so many names takes 30 ms from a list, 60 ms from a local folder (benchmarks/index.py): not worth keeping.
CACHED_FROM = 20_000
# The coarsest clock among file systems is FAT's. What changed so recently may change again without a trace.
_GRANULARITY = 2_000_000_000  # ns
_UNUSED = 7 * 86_400.0  # s, until an index that was replaced is removed: other hosts may have it mapped
_ABANDONED = 3_600.0  # s, until what a killed process left half-written is removed
_FORMAT = 1
_WRITING = "writing-"
_MISSING = (-1, -1, -1)


class Index(NamedTuple):
    """Images and their labels, as flat arrays.

    Attributes:
        paths: of the N images.
        labels: int32 [N], number in `names`, -1 for none.
        names: the labels' names.
        lines: int64 [N], line numbers in a list file (from 1); [0] where there is none.
    """

    paths: PathTable
    labels: np.ndarray
    names: tuple[str, ...]
    lines: np.ndarray


class Watch:
    """The files and folders that an index is read from, with their status before they were read."""

    def __init__(self) -> None:
        self.started = time.time_ns()
        self.paths: list[str] = []
        self.states: list[tuple[int, int, int]] = []

    def add(self, path: str) -> None:
        """Note a file or a folder, before it is read; one that is missing is noted as such."""
        self.paths.append(path)
        self.states.append(_state(path))

    def settled(self) -> bool:
        """Tell whether a change of any of them since would show: none is younger than the coarsest tick of a clock."""
        return all(max(state[1:]) + _GRANULARITY < self.started for state in self.states)


def _state(path: str) -> tuple[int, int, int]:
    """Return size, time of modification and time of change (ns) of a file or of what a link points to."""
    try:
        status = os.stat(path)  # noqa: PTH116  once a folder: a Path each would double the time
    except (OSError, ValueError):
        return _MISSING
    largest = 2**63 - 1  # damaged times may lie beyond
    return status.st_size, min(status.st_mtime_ns, largest), min(status.st_ctime_ns, largest)


def open_index(key: Sequence[str], build: Callable[[Watch], Index]) -> Index:
    """Return the index of a data set from the cache, else build it, and keep it if it is large.

    A cache that cannot be read or written is done without. So is one whose files are damaged: each has its checksum.

    Args:
        key: what tells data sets apart: kind, absolute path, and whatever else decides what is in the index.
        build: reads the data set; adds each file and folder to the watch before it reads it.
    """
    try:
        folder = cache_folder() / "index" / hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:32]
    except RuntimeError:  # no home
        return build(Watch())
    for version in _versions(folder):
        index = _load(version, key)
        if index is not None:
            return index
    watch = Watch()
    index = build(watch)
    if len(index.paths) < CACHED_FROM or not watch.settled():
        return index
    try:
        kept = _save(folder, key, watch, index)
    except OSError:
        return index
    return index if kept is None else kept


def _versions(folder: Path) -> list[Path]:
    """Return the indexes of a data set, the one used last first.

    There is more than one where data were changed, or where hosts share a home but not what lies at the path.
    """
    try:
        found = [(entry.stat().st_mtime, Path(entry.path)) for entry in os.scandir(folder)]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True) if not path.name.startswith(_WRITING)]


def _save(folder: Path, key: Sequence[str], watch: Watch, index: Index) -> Index | None:
    """Write an index and return it as it is read from there, or None if it cannot be read back.

    It appears under its name at once and whole. Whoever writes the same one at the same time is as good.
    """
    watched, states = PathTable(watch.paths), np.array(watch.states, np.int64)
    arrays = {
        "paths": index.paths.text,
        "ends": index.paths.ends,
        "labels": index.labels,
        "lines": index.lines,
        "watched": watched.text,
        "watched_ends": watched.ends,
        "states": states,
    }
    version = folder / hashlib.sha256(watched.text.tobytes() + states.tobytes()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    kept = _load(version, key)
    if kept is not None:
        return kept
    temporary = Path(tempfile.mkdtemp(prefix=_WRITING, dir=folder))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        (temporary / "names.json").write_text(json.dumps(index.names), encoding="ascii")
        checksums = {file.name: _checksum(file) for file in temporary.iterdir()}
        header = json.dumps({"format": _FORMAT, "key": list(key), "checksums": checksums})
        (temporary / "header.json").write_text(header, encoding="ascii")
        shutil.rmtree(version, ignore_errors=True)  # if it is there, it is damaged
        with contextlib.suppress(OSError):  # someone else was faster
            temporary.rename(version)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(version, key)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written, and indexes that nobody opened for a week."""
    now = time.time()
    for entry in list(os.scandir(folder)):
        limit = _ABANDONED if entry.name.startswith(_WRITING) else _UNUSED
        if now - entry.stat().st_mtime > limit:
            shutil.rmtree(entry.path, ignore_errors=True)


def _load(version: Path, key: Sequence[str]) -> Index | None:
    """Return an index if it is whole and nothing that it was read from has changed, else None."""
    try:
        header = json.loads((version / "header.json").read_text(encoding="ascii"))
        if header["format"] != _FORMAT or header["key"] != list(key):
            return None
        checksums = header["checksums"]
        watched = _table(version, "watched", "watched_ends", checksums)
        states = _array(version, "states", np.int64, (len(watched), 3), checksums)
        if not all(_state(path) == tuple(state) for path, state in zip(watched, _rows(states))):
            return None
        index = _read(version, checksums)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None
    with contextlib.suppress(OSError):
        os.utime(version)  # in use: not to be swept
    return index


def _read(version: Path, checksums: Any) -> Index:
    """Return what the files of an index hold; raises ValueError if that is no index."""
    paths = _table(version, "paths", "ends", checksums)
    names = json.loads(_checked(version / "names.json", checksums).read_text(encoding="ascii"))
    labels = _array(version, "labels", np.int32, (len(paths),), checksums)
    lines = _array(version, "lines", np.int64, None, checksums)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names are strings")
    if len(labels) and not -1 <= labels.min() <= labels.max() < len(names):
        raise ValueError("labels are numbers of names, or -1")
    if lines.shape not in ((0,), (len(paths),)):
        raise ValueError("every image has a line, or none has")
    return Index(paths, labels, tuple(names), lines)


def _rows(states: np.ndarray) -> Iterator[list[int]]:
    return (row.tolist() for row in states)


def _table(version: Path, text: str, ends: str, checksums: Any) -> PathTable:
    return PathTable.of(
        _array(version, text, np.uint8, None, checksums), _array(version, ends, np.int64, None, checksums)
    )


def _array(version: Path, name: str, dtype: type, shape: tuple[int, ...] | None, checksums: Any) -> np.ndarray:
    """Return an array of an index, mapped from its file, of this type and shape (None: any number of values)."""
    array = np.load(_checked(version / f"{name}.npy", checksums), mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or (array.ndim != 1 if shape is None else array.shape != shape):
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array.view(np.ndarray)  # a memmap takes three times as long to index


def _checked(path: Path, checksums: Any) -> Path:
    if _checksum(path) != checksums[path.name]:
        raise ValueError(f"{path} is damaged")
    return path


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, read in blocks: what is mapped would count as memory of this process."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
