"""Packed stores: many images in a few files, on disk or wherever fsspec reads, as `python -m mae_et pack` writes them.

    <store>/<split>/manifest.json  00000.zip 00001.zip ...  index/{names,ends,labels,offsets,lengths,crcs}.npy

A shard is a ZIP file whose members are not compressed: an image is a range of its bytes. Where each one lies is in flat
arrays beside the shards, so that no central directory is parsed: local ones are mapped, and shared by all processes.
The manifest is written last; a folder without one is no store yet. docs/packed.md says why this form.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch

from mae_et.data.decode import DEFAULT_MAX_PIXELS, ImageError, decode_image
from mae_et.data.files import SPLITS, PathTable

FORMAT = 1
MANIFEST = "manifest.json"
# Columns of the index: names end to end, where each ends; then of each image its class number, where in its shard its
# bytes begin, how many they are, and their CRC-32.
INDEX: dict[str, type[np.generic]] = {
    "names": np.uint8,
    "ends": np.int64,
    "labels": np.int32,
    "offsets": np.int64,
    "lengths": np.uint32,
    "crcs": np.uint32,
}
_OPEN_SHARDS = 256  # files that a process keeps open; systems allow 1,024
_SHARD_NAME = re.compile(r"\d{5,}\.zip")


def is_url(root: str | Path) -> bool:
    """Tell whether a root is for fsspec: "s3://bucket/store", and not a folder's path."""
    return "://" in str(root)


class Files:
    """The files of a folder on disk or behind a URL, read whole or in part. Processes may be forked at any time.

    Args:
        root: the folder's path, or a URL that fsspec knows.

    Raises:
        ValueError: no library for such URLs is installed, or it refuses this one.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") if is_url(root) else os.path.abspath(Path(root).expanduser())  # noqa: PTH100
        self._descriptors: dict[str, int] = {}
        self._remote: tuple[int, Any, str] | None = None
        if is_url(root):
            self.filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_descriptors": {}, "_remote": None}

    def path(self, name: str) -> str:
        """Return the path or URL of a file."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        if is_url(self.root):
            filesystem, root = self.filesystem()
            return filesystem.isfile(f"{root}/{name}")
        return os.path.isfile(self.path(name))  # noqa: PTH113

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        if is_url(self.root):
            filesystem, root = self.filesystem()
            return filesystem.cat_file(f"{root}/{name}")
        return Path(self.path(name)).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes [start, end) of a file; fewer where it is shorter."""
        if is_url(self.root):
            filesystem, root = self.filesystem()
            return filesystem.cat_file(f"{root}/{name}", start=start, end=end)  # s3fs has a version before them
        # pread has no position that processes could share: descriptors survive a fork.
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = os.open(self.path(name), os.O_RDONLY)
            if len(self._descriptors) >= _OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[name] = descriptor
        return os.pread(descriptor, end - start, start)

    def array(self, name: str) -> np.ndarray:
        """Return the array of a .npy file, mapped where it lies on disk; raises ValueError if it is none."""
        if is_url(self.root):
            return np.load(io.BytesIO(self.read(name)), allow_pickle=False)
        return np.load(self.path(name), mmap_mode="r", allow_pickle=False).view(np.ndarray)

    def sizes(self) -> dict[str, int]:
        """Return the names and bytes of the files directly in the folder."""
        if is_url(self.root):
            filesystem, root = self.filesystem()
            filesystem.invalidate_cache()  # what another process has put there since counts
            found = filesystem.ls(root, detail=True)
            files = {item["name"]: item["size"] for item in found if item["type"] == "file"}
            # A web server's list of files has no sizes.
            return {path.rpartition("/")[2]: size or filesystem.size(path) for path, size in files.items()}
        with os.scandir(self.root) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, in hexadecimal; read in blocks."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def close(self) -> None:
        """Close what is open."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def open(self, name: str) -> Any:
        """Return a file, open for reading bytes."""
        if is_url(self.root):
            filesystem, root = self.filesystem()
            return filesystem.open(f"{root}/{name}", "rb")
        return Path(self.path(name)).open("rb", buffering=0)

    def filesystem(self) -> tuple[Any, str]:
        """Return the file system and the folder in it, of this process: its threads do not survive a fork."""
        if self._remote is None or self._remote[0] != os.getpid():
            try:
                self._remote = (os.getpid(), *fsspec.url_to_fs(self.root))
            except (ImportError, ValueError) as error:
                raise ValueError(f"data.root={self.root} cannot be read: {error}") from error
        return self._remote[1], self._remote[2].rstrip("/")


class Shard(NamedTuple):
    """A shard as the manifest has it."""

    name: str
    images: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What is known of a split of a store without opening a shard.

    Attributes:
        images: in all shards.
        classes: names, by class number.
        settings: how it was packed; see `mae_et.packing.settings`.
        shards: in the order of the images.
        checksums: SHA-256 of each file of the index, by its column.
        bad: (name, error) of the images that could not be packed.
    """

    images: int
    classes: tuple[str, ...]
    settings: dict[str, Any]
    shards: tuple[Shard, ...]
    checksums: dict[str, str]
    bad: tuple[tuple[str, str], ...]


def read_manifest(files: Files) -> Manifest:
    """Return the manifest of a split of a store.

    Raises:
        ValueError: there is none, it is damaged, or of a format that this version does not read.
    """
    path = files.path(MANIFEST)
    try:
        values = json.loads(files.read(MANIFEST))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: packing was not finished (repeat the command), or data.root= is no packed store"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again, or pack again") from error
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"{path} has format {values['format']}; this version of mae_et reads {FORMAT}: update it")
        manifest = Manifest(
            int(values["images"]),
            tuple(str(name) for name in values["classes"]),
            dict(values["settings"]),
            tuple(Shard(str(s["name"]), int(s["images"]), int(s["bytes"]), str(s["sha256"])) for s in values["shards"]),
            {column: str(values["index"][column]) for column in INDEX},
            tuple((str(name), str(error)) for name, error in values["bad"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); copy it again") from error
    names = [shard.name for shard in manifest.shards]
    if not all(map(_SHARD_NAME.fullmatch, names)) or sum(shard.images for shard in manifest.shards) != manifest.images:
        raise ValueError(f"{path} is damaged: its shards do not make up its images; copy it again")
    return manifest


class PackedSource:
    """The images of a split of a packed store, read one by one.

    Args:
        name: what the source is called in messages and logs, such as "packed train".
        files: the split's.
        channels: 3 (RGB) or 1 (luma).
        max_pixels: images with more pixels are refused.

    Raises:
        ValueError: the store is damaged or incomplete; what is wrong with which file, and what to do.
    """

    def __init__(self, name: str, files: Files, channels: int = 3, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.name, self.files, self.channels, self.max_pixels = name, files, channels, max_pixels
        self.manifest = read_manifest(files)
        self.classes = self.manifest.classes
        self._check_sizes()
        columns = {column: self._column(column) for column in INDEX}
        self.labels, self._offsets = columns["labels"], columns["offsets"]
        self._lengths, self._crcs = columns["lengths"], columns["crcs"]
        self._firsts = np.cumsum([0, *(shard.images for shard in self.manifest.shards)])
        try:
            self.names = PathTable.of(columns["names"], columns["ends"])
        except ValueError as error:
            raise ValueError(f"{files.path('index')} is damaged ({error}); pack again") from error
        self._check_columns()

    def __len__(self) -> int:
        return self.manifest.images

    def image(self, i: int) -> torch.Tensor:
        """Return image `i`, uint8 [channels, H, W]; one whose bytes are damaged raises ImageError.

        Faults of the disk or the network raise OSError: they say nothing about the image.
        """
        return decode_image(self.read(i), self.describe(i), self.channels, self.max_pixels)

    def read(self, i: int) -> bytes:
        """Return the bytes of image `i`, an image file; raises as `image` does."""
        start, length = int(self._offsets[i]), int(self._lengths[i])
        data = self.files.read_range(self.shard(i).name, start, start + length)
        if len(data) != length or zlib.crc32(data) != self._crcs[i]:
            raise ImageError(
                f"{self.describe(i)}: its bytes are damaged (CRC-32); python -m mae_et pack --verify lists all such"
            )
        return data

    def shard(self, i: int) -> Shard:
        """Return the shard that image `i` is in."""
        return self.manifest.shards[int(np.searchsorted(self._firsts, i, side="right")) - 1]

    def label(self, i: int) -> int:
        """Return the class number of image `i`, -1 for none."""
        return int(self.labels[i])

    def describe(self, i: int) -> str:
        """Return the path or URL of the shard that image `i` is in, and its member: "/s/train/00000.zip: cat/1.jpg"."""
        return f"{self.files.path(self.shard(i).name)}: {self.names[i]}"

    def rows(self, shard: int) -> list[tuple[str, int, int, int]]:
        """Return what the index says of a shard's images: name, offset, length, CRC-32."""
        images = range(self._firsts[shard], self._firsts[shard + 1])
        return [(self.names[i], int(self._offsets[i]), int(self._lengths[i]), int(self._crcs[i])) for i in images]

    def _check_sizes(self) -> None:
        sizes = self.files.sizes()
        for shard in self.manifest.shards:
            if sizes.get(shard.name) != shard.bytes:
                there = f"has {sizes[shard.name]:,} bytes" if shard.name in sizes else "is not there"
                raise ValueError(
                    f"{self.files.path(shard.name)} {there}, and {shard.bytes:,} bytes were packed; copy it again"
                )

    def _column(self, column: str) -> np.ndarray:
        name = f"index/{column}.npy"
        try:
            array = self.files.array(name)
            if (
                array.dtype != INDEX[column]
                or array.ndim != 1
                or self.files.sha256(name) != self.manifest.checksums[column]
            ):
                raise ValueError("its SHA-256 is not the one in the manifest")
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise ValueError(f"{self.files.path(name)} is missing or damaged ({error}); copy it again") from error
        return array

    def _check_columns(self) -> None:
        # Whoever can write the index can write its checksums: what it says must not lead out of a shard or a class.
        arrays: Sequence[np.ndarray | PathTable] = (self.names, self.labels, self._offsets, self._lengths, self._crcs)
        fits = all(len(array) == len(self) for array in arrays)
        if fits and len(self):
            shards = self.manifest.shards
            ends = np.repeat([shard.bytes for shard in shards], [shard.images for shard in shards])
            inside = self._offsets.min() >= 0 and bool(np.all(self._offsets <= ends - self._lengths))
            fits = inside and int(self.labels.min()) >= -1 and int(self.labels.max()) < len(self.classes)
        if not fits:
            raise ValueError(f"{self.files.path('index')} does not fit {MANIFEST} beside it; pack again")


def packed_splits(root: str | Path) -> list[str]:
    """Return which of train, val and test a store has."""
    return [split for split in SPLITS if _files(root, split).exists(MANIFEST)]


def is_packed_split(folder: Path) -> bool:
    """Tell whether a folder on disk is a split of a packed store."""
    return all((folder / name).is_file() for name in (MANIFEST, "index/names.npy"))


def _files(root: str | Path, split: str) -> Files:
    return Files(f"{str(root).rstrip('/')}/{split}")


def open_packed(root: str | Path, split: str, channels: int, max_pixels: int) -> PackedSource:
    """Open a split of a packed store.

    Raises:
        ValueError: it is not there, or damaged.
    """
    return PackedSource(f"packed {split}", _split(root, split), channels, max_pixels)


def count_packed(root: str | Path, split: str) -> int:
    """Return the number of images of a split of a store; reads its manifest alone. Raises as `open_packed` does."""
    return read_manifest(_split(root, split)).images


def _split(root: str | Path, split: str) -> Files:
    if not is_url(root) and not Path(root).expanduser().is_dir():
        raise ValueError(f"{root} is not a folder; set data.root= to a packed store, as `python -m mae_et pack` writes")
    found = packed_splits(root)
    if split not in found and Files(root).exists(MANIFEST):
        raise ValueError(f"{root} is one split of a packed store; set data.root= to the folder that it lies in")
    if split not in found:
        has = f"it has {', '.join(found)}" if found else "packing was not finished, or it is no packed store"
        raise ValueError(f"{root} has no split '{split}' with a {MANIFEST}: {has}")
    return _files(root, split)
