from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from mae_et.data import archives
from mae_et.data.archives import DEBIAN_FASHION_MNIST, ArraySource, open_cifar
from mae_et.data.sources import count_images, open_source
from tests.data.trees import contents, write_images

# Arrays


@pytest.mark.parametrize(("stored", "asked"), [(1, None), (3, None), (1, 3), (3, 1)])
def test_array_source(stored, asked):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, stored), dtype=np.uint8)
    images.flags.writeable = False
    source = ArraySource(images, [3, 1, -1, 0], "toys train", ["a", "b", "c", "d"], channels=asked)
    assert (len(source), source.channels, source.label(0), source.label(2)) == (4, asked or stored, 3, -1)
    assert source.describe(2) == "toys train #2"
    pixels = source.image(2).permute(1, 2, 0).numpy()
    if asked == 1:
        expected = np.asarray(Image.fromarray(images[2]).convert("L"))[..., None]
    else:
        expected = np.repeat(images[2], 3 // stored if asked else 1, 2)
    assert np.array_equal(pixels, expected)
    indices = np.array([2, 0, 2])
    assert torch.equal(source.take(indices), torch.stack([source.image(i) for i in indices.tolist()]))


def test_changing_an_image_does_not_change_the_source():
    source = ArraySource(np.zeros((1, 2, 2, 1), np.uint8), [0], "x", channels=3)
    source.image(0).fill_(9)
    source.take(np.array([0]))[:, 0].fill_(9)
    assert source.image(0).sum() == 0


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 0]),
        (np.zeros((2, 4, 4), np.uint8), [0, 0]),
        (np.zeros((2, 4, 4, 4), np.uint8), [0, 0]),
        (np.zeros((2, 4, 4, 3), np.uint8), [0]),
    ],
)
def test_arrays_that_do_not_fit(images, labels):
    with pytest.raises(ValueError, match=r"toys: .*need (uint8|one each)"):
        ArraySource(images, labels, "toys")


# Fashion-MNIST


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion_mnist(folder: Path, count: int = 7) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    return images


@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_fashion_mnist_from_root(tmp_path, folder, channels):
    images = write_fashion_mnist(tmp_path / folder)
    source = open_source("fashion_mnist", tmp_path, "test", download=False, channels=channels)
    assert len(source) == 7
    assert source.describe(3) == "fashion-mnist test #3"
    assert np.array_equal(source.image(3).numpy(), np.repeat(images[3][None], channels, 0))
    assert source.label(3) == 3


def test_fashion_mnist_of_debian():
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    source = open_source("fashion_mnist", split="test", download=False, channels=1)
    assert len(source) == count_images("fashion_mnist", split="test")
    assert [source.label(i) for i in range(8)] == [9, 2, 1, 1, 6, 1, 4, 6]
    assert source.classes[source.label(0)] == "Ankle boot"
    labels = np.array([source.label(i) for i in range(len(source))])
    assert np.bincount(labels).tolist() == [1000] * 10
    assert source.image(0).shape == (1, 28, 28)
    # The published mean of the grey levels (of the training set: 0.2860).
    pixels = torch.stack([source.image(i) for i in range(0, 10_000, 10)]).float()
    assert pixels.mean() / 255 == pytest.approx(0.286, abs=0.01)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-20], "missing or damaged"),
        (lambda data: b"<html>" + data, "missing or damaged"),
        (lambda _data: gzip.compress(b"\0\0\x0b\x03" + bytes(12)), "no IDX file of unsigned bytes"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "7 x 28 x 28 bytes and holds 5487"),
    ],
)
def test_damaged_fashion_mnist(tmp_path, damage, message):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"t10k-images-idx3-ubyte\.gz .*{message}.*fetch it again"):
        open_source("fashion_mnist", tmp_path, "test")


# CIFAR


def cifar_files(kind: str, per_file: int = 3) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """Files in the authors' record layout, and the test split's images [N, H, W, C] and labels."""
    generator = np.random.default_rng(1)
    if kind == "cifar10":
        parts, classes = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"], 10
    else:
        parts, classes = ["train.bin", "test.bin"], 100
    files = {}
    images = labels = np.empty(0)
    for part in parts:
        images = generator.integers(0, 256, (per_file, 32, 32, 3), dtype=np.uint8)
        labels = generator.integers(0, classes, per_file)
        coarse = [] if kind == "cifar10" else [b"\x13"]
        files[part] = b"".join(
            b"".join([*coarse, bytes([label]), *(image[:, :, plane].tobytes() for plane in range(3))])
            for image, label in zip(images, labels)
        )
    names = "".join(f"name{i}\n" for i in range(classes))
    files["batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"] = (names + "\n").encode()
    return files, images, labels


def write_cifar(root: Path, kind: str, form: str, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    files, images, labels = cifar_files(kind)
    folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[kind]
    if form == "tar":
        root.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / f"{kind[:5]}-{kind[5:]}-binary.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(f"{prefix}{folder}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        place = root / folder if form == "extracted" else root
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data)
    return images, labels


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["tar", "extracted", "flat"])
def test_cifar(tmp_path, kind, form):
    images, labels = write_cifar(tmp_path, kind, form)
    source = open_source(kind, tmp_path, "test", download=False)
    assert len(source) == 3
    for i in range(3):
        assert np.array_equal(source.image(i).permute(1, 2, 0).numpy(), images[i])
        assert source.label(i) == labels[i]
    assert source.classes == tuple(f"name{i}" for i in range({"cifar10": 10, "cifar100": 100}[kind]))
    assert source.describe(2) == f"{kind} test #2"
    assert len(open_source(kind, tmp_path, "train", download=False)) == {"cifar10": 15, "cifar100": 3}[kind]


def test_a_cifar_archive_is_not_unpacked_to_disk(tmp_path):
    write_cifar(tmp_path, "cifar10", "tar", prefix="./")
    open_source("cifar10", tmp_path, "train", download=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_luma_of_cifar(tmp_path):
    images, _ = write_cifar(tmp_path, "cifar10", "flat")
    source = open_source("cifar10", tmp_path, "test", channels=1)
    assert np.array_equal(source.image(1)[0].numpy(), np.asarray(Image.fromarray(images[1]).convert("L")))


@pytest.mark.parametrize("form", ["tar", "extracted"])
def test_damaged_cifar(tmp_path, form):
    write_cifar(tmp_path, "cifar100", form)
    if form == "tar":
        path = tmp_path / "cifar-100-binary.tar.gz"
        message = r"cifar-100-binary\.tar\.gz is damaged or incomplete"
    else:
        path = tmp_path / "cifar-100-binary" / "test.bin"
        message = r"test\.bin of .* no whole number of 3074-byte records"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=message):
        open_source("cifar100", tmp_path, "test", download=False)


def test_cifar_with_a_file_missing(tmp_path):
    write_cifar(tmp_path, "cifar10", "extracted")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"incomplete .*data_batch_4\.bin"):
        open_source("cifar10", tmp_path)


# Downloads


def test_a_download_is_checked_and_read(tmp_path, monkeypatch):
    asked = []

    def download(url, root, md5):
        asked.append((url, md5))
        write_cifar(Path(root), "cifar10", "tar")

    monkeypatch.setattr(archives, "download_url", download)
    assert len(open_cifar("cifar10", tmp_path / "new", "test", True, 3)) == 3
    assert asked == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")]


def test_without_a_root_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_cifar(tmp_path / "mae_et", "cifar100", "extracted")
    assert len(open_source("cifar100", split="test", download=False)) == 3
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert archives.cache_folder() == tmp_path / ".cache" / "mae_et"


@pytest.mark.parametrize("kind", ["fashion_mnist", "cifar10", "cifar100", "flowers102"])
def test_a_download_that_is_not_allowed_or_fails(tmp_path, monkeypatch, kind):
    def fail(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(archives, "DEBIAN_FASHION_MNIST", tmp_path / "none")
    for name in ["download_url", "FashionMNIST", "Flowers102"]:
        monkeypatch.setattr(archives, name, fail)
    with pytest.raises(ValueError, match=rf"not in {tmp_path}; set data\.root="):
        open_source(kind, tmp_path, download=False)
    with pytest.raises(ValueError, match=rf"into {tmp_path} failed \(no route to host\).*set data\.root="):
        open_source(kind, tmp_path)


# Flowers


@pytest.mark.parametrize("folder", ["", "flowers-102"])
def test_flowers102(tmp_path, folder):
    place = tmp_path / folder
    write_images(place, *(f"jpg/image_{i:05d}.jpg" for i in range(1, 7)), first=1)
    savemat(place / "imagelabels.mat", {"labels": np.array([[102, 5, 5, 1, 2, 3]], np.uint8)})
    ids = {"trnid": [[6, 1]], "valid": [[2]], "tstid": [[3, 4, 5]]}
    savemat(place / "setid.mat", {name: np.array(values, np.uint16) for name, values in ids.items()})
    assert contents(open_source("flowers102", tmp_path, "train", download=False)) == [(6, 2), (1, 101)]
    assert contents(open_source("flowers102", tmp_path, "val", download=False)) == [(2, 4)]
    test = open_source("flowers102", tmp_path, "test", download=False)
    assert contents(test) == [(3, 4), (4, 0), (5, 1)]
    assert len(test.classes) == 102
    (place / "imagelabels.mat").unlink()
    with pytest.raises(ValueError, match=r"imagelabels\.mat is missing or damaged"):
        open_source("flowers102", tmp_path)
