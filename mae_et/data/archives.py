"""Published sets read from the files that their authors give out: Fashion-MNIST, CIFAR, Oxford Flowers.

None of them is read through pickle. Flowers' labels are .mat files of numbers.
"""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import FashionMNIST, Flowers102
from torchvision.datasets.utils import download_url

from mae_et.data.files import FileSource
from mae_et.data.mat import read_mat

_LARGEST = 1 << 28  # bytes of an unpacked file; those of the sets here have at most 47 millions

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


class ArraySource:
    """Images of one size, held in memory.

    Args:
        images: uint8 [N, H, W, C] with C = 1 or 3.
        labels: N class numbers, -1 for none.
        name: what messages call the source; image 17 is "<name> #17".
        classes: the classes' names, by number.
        channels: 3 repeats grey images, 1 takes the luma (ITU-R BT.601) of coloured ones; None keeps the array's.

    Raises:
        ValueError: if the arrays' types or lengths do not fit.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        name: str,
        classes: Sequence[str] = (),
        channels: int | None = None,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"{name}: images are {images.dtype} {images.shape}; need uint8 [N, H, W, 1 or 3]")
        if len(labels) != len(images):
            raise ValueError(f"{name}: {len(labels)} labels for {len(images)} images; need one each")
        self.name = name
        self.channels = images.shape[3] if channels is None else channels
        self.classes = tuple(classes)
        self.labels = np.array(labels, np.int32)
        if self.channels == 1 and images.shape[3] == 3:
            images = _luma(images)
        planes = images.transpose(0, 3, 1, 2)
        # torch warns of tensors on read-only memory, such as a memory map's.
        self._images = torch.from_numpy(np.require(planes, requirements=["C", "W"]))

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> torch.Tensor:
        """Return a copy of image `i`, uint8 [channels, H, W]."""
        return self._images[i].expand(self.channels, -1, -1).clone(memory_format=torch.contiguous_format)

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return many images at once, uint8 [N, channels, H, W]; the channels of grey ones share memory."""
        # Copies whole rows, which indexing with a tensor does not: 1.7 us for each image of 32 px.
        return torch.index_select(self._images, 0, torch.from_numpy(indices)).expand(-1, self.channels, -1, -1)

    def label(self, i: int) -> int:
        """Return the class number of image `i`, -1 for none."""
        return int(self.labels[i])

    def describe(self, i: int) -> str:
        """Return the source's name and the image's number."""
        return f"{self.name} #{i}"


def _luma(images: np.ndarray) -> np.ndarray:
    """Return [N, H, W, 1] by PIL's rule for RGB -> L: 16-bit fixed-point weights, rounded."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((images.astype(np.uint32) @ weights + (1 << 15)) >> 16).astype(np.uint8)[..., None]


def cache_folder() -> Path:
    """Return where downloads go if data.root is not set: `~/.cache/mae_et`, or below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mae_et"


def _downloaded(what: str, folder: Path, download: bool, fetch: Callable[[], object]) -> None:
    if not download:
        raise ValueError(f"{what} is not in {folder}; set data.root= to the folder that has it, or data.download=true")
    try:
        fetch()
    # URLError and timeouts are OSErrors; torchvision raises RuntimeError for a wrong checksum.
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"downloading {what} into {folder} failed ({error}); fetch it where there is internet and set data.root="
        ) from error


def open_fashion_mnist(root: Path | None, split: str, download: bool, channels: int) -> ArraySource:
    """Open Fashion-MNIST (arXiv 1708.07747): 28 px grey, 60,000 train and 10,000 test images.

    Looks for the four IDX files (`*-ubyte.gz`) in root, in torchvision's folder below it, and where Debian's package
    puts them; else downloads them.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    home = cache_folder() if root is None else root
    raw = home / "FashionMNIST" / "raw"
    places = [home, raw, DEBIAN_FASHION_MNIST]
    found = [place for place in places if (place / f"{stem}-images-idx3-ubyte.gz").is_file()]
    if not found:
        what = "Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist)"
        _downloaded(what, home, download, lambda: FashionMNIST(home, download=True))
        found = [raw]
    images = read_idx(found[0] / f"{stem}-images-idx3-ubyte.gz")
    labels = read_idx(found[0] / f"{stem}-labels-idx1-ubyte.gz")
    return ArraySource(images[..., None], labels, f"fashion-mnist {split}", FashionMNIST.classes, channels)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (the MNIST format): magic 0 0 8 dims, big-endian sizes, then the bytes.

    Raises ValueError, naming the file, if it is missing, damaged or of another type.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(_LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); fetch it again") from error
    if len(data) > _LARGEST:
        raise ValueError(f"{path} unfolds to more than {_LARGEST:,} bytes, which no such set has; fetch it again")
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no IDX file of unsigned bytes; fetch it again")
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    if values.size != math.prod(shape):
        raise ValueError(
            f"{path} should hold {' x '.join(map(str, shape))} bytes and holds {values.size}; fetch it again"
        )
    return values.reshape(shape).copy()


class _Cifar(NamedTuple):
    archive: str
    md5: str
    folder: str
    files: dict[str, tuple[str, ...]]
    class_names: str
    label_bytes: int  # CIFAR-100 puts the coarse label before the fine one; ours is the last


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR = {
    "cifar10": _Cifar(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        1,
    ),
    "cifar100": _Cifar(
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        2,
    ),
}


def open_cifar(kind: str, root: Path | None, split: str, download: bool, channels: int) -> ArraySource:
    """Open CIFAR-10 or CIFAR-100 from the authors' binary files: 32 px RGB, 50,000 train and 10,000 test images.

    Reads `<root>/<folder of the archive>/*.bin`, `<root>/*.bin` or the archive in root, unpacked in memory; else
    downloads the archive and checks its MD5. A record is 1 or 2 label bytes, then 1024 red, green and blue bytes.
    """
    layout = _CIFAR[kind]
    home = cache_folder() if root is None else root
    wanted = (*layout.files[split], layout.class_names)
    found = [place for place in (home / layout.folder, home) if (place / wanted[0]).is_file()]
    archive = home / layout.archive
    if not found and not archive.is_file():
        url = CIFAR_URL + layout.archive
        _downloaded(layout.archive, home, download, lambda: download_url(url, home, md5=layout.md5))
    try:
        if found:
            *parts, names = [(found[0] / file).read_bytes() for file in wanted]
        else:
            *parts, names = _members(archive, [f"{layout.folder}/{file}" for file in wanted])
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{found[0] if found else archive} is damaged or incomplete ({error}); fetch it again"
        ) from error
    record = layout.label_bytes + 3072
    for file, part in zip(wanted, parts):
        if not part or len(part) % record:
            raise ValueError(f"{file} of {home}: {len(part)} bytes are no whole number of {record}-byte records")
    try:
        classes = names.decode().split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{layout.class_names} of {home} is damaged ({error}); fetch it again") from None
    rows = np.concatenate([np.frombuffer(part, np.uint8).reshape(-1, record) for part in parts])
    images = np.ascontiguousarray(rows[:, layout.label_bytes :]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, layout.label_bytes - 1]
    return ArraySource(images, labels, f"{kind} {split}", classes, channels)


def _members(archive: Path, names: list[str]) -> list[bytes]:
    """Read members of a .tar.gz in one pass; nothing is unpacked to disk."""
    contents = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            file = tar.extractfile(member) if name in names else None
            if file is not None:
                if member.size > _LARGEST:
                    raise tarfile.TarError(f"{name} unfolds to {member.size:,} bytes")
                contents[name] = file.read()
    return [contents[name] for name in names]


def open_flowers102(root: Path | None, split: str, download: bool, channels: int, max_pixels: int) -> FileSource:
    """Open Oxford Flowers-102: 1,020 train, 1,020 val and 6,149 test photos, in torchvision's folder layout.

    That is `jpg/image_00001.jpg` ..., `imagelabels.mat` and `setid.mat` in root or in `<root>/flowers-102`.
    """
    home = cache_folder() if root is None else root
    found = [place for place in (home, home / "flowers-102") if (place / "setid.mat").is_file()]
    if not found:
        _downloaded("Flowers-102", home, download, lambda: Flowers102(home, download=True))
        found = [home / "flowers-102"]
    folder = found[0]
    try:
        part = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
        ids = read_mat(folder / "setid.mat", [part])[part].ravel().astype(np.int32)
        labels = read_mat(folder / "imagelabels.mat", ["labels"])["labels"].ravel()[ids - 1].astype(np.int32) - 1
    except (IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: setid.mat or imagelabels.mat is missing or damaged ({error})") from error
    paths = [f"jpg/image_{i:05d}.jpg" for i in ids]
    return FileSource(f"flowers102 {split}", folder, paths, labels, Flowers102.classes, channels, max_pixels)
