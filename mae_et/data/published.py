"""Fine-grained sets read from the files that their authors give out: Stanford Dogs, Food-101, NABirds.

Archives are unpacked beside themselves, once. An archive that is cut short, is another than the one known here, or
would write outside its folder is refused, and an interrupted run leaves no half of a set behind.
"""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.utils import download_url

from mae_et.data.archives import cache_folder
from mae_et.data.files import FileSource
from mae_et.data.mat import read_mat

_MOST_UNFOLDED = 20  # times the size of an archive; photos do not shrink
_SPARE = 1 << 26  # bytes


class Archive(NamedTuple):
    """A tar file that a set is given out as, and the files or folders at its top; `url` is None where one must ask."""

    name: str
    holds: tuple[str, ...]
    url: str | None = None
    sha256: str | None = None


# Neither Stanford nor ETH publishes checksums, and both serve plain http. These are the ones that TensorFlow Datasets
# recorded (tensorflow_datasets/url_checksums/{stanford_dogs,food101}.txt).
STANFORD_DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
STANFORD_DOGS = (
    Archive(
        "images.tar",
        ("Images",),
        f"{STANFORD_DOGS_URL}images.tar",
        "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
    ),
    Archive(
        "lists.tar",
        ("train_list.mat", "test_list.mat"),
        f"{STANFORD_DOGS_URL}lists.tar",
        "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
    ),
)
FOOD101 = Archive(
    "food-101.tar.gz",
    ("food-101",),
    "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
    "d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
)
NABIRDS = Archive("nabirds.tar.gz", ("nabirds",))
NABIRDS_PAGE = "https://dl.allaboutbirds.org/nabirds"


def open_stanford_dogs(root: Path | None, split: str, download: bool, channels: int, max_pixels: int) -> FileSource:
    """Open Stanford Dogs (Khosla et al., FGVC 2011): 12,000 train and 8,580 test photos of 120 breeds.

    That is `Images/n02085620-Chihuahua/*.jpg`, `train_list.mat` and `test_list.mat` in root or in
    `<root>/stanford-dogs`, or the authors' `images.tar` (0.8 GB) and `lists.tar` there; else both are downloaded.
    Classes are the folders' names in the order of the authors' numbers, of the train list for either split.

    Raises:
        ValueError: if a file is missing or damaged, or a list's class numbers and folders contradict each other.
    """
    home = cache_folder() if root is None else root
    signs = [name for archive in STANFORD_DOGS for name in (archive.name, *archive.holds)]
    places = [home, home / "stanford-dogs"]
    folder = next((place for place in places if any((place / sign).exists() for sign in signs)), places[-1])
    for archive in STANFORD_DOGS:
        _provide("Stanford Dogs", archive, folder, download)
    list_path = folder / f"{split}_list.mat"
    classes = _breeds(folder / "train_list.mat")
    paths, labels = read_dogs_list(list_path)
    for path, label in zip(paths, labels.tolist()):
        if not 1 <= label <= len(classes) or path.split("/")[0] != classes[label - 1]:
            raise ValueError(
                f"{list_path}: {path} has label {label}, which train_list.mat does not give to that folder (it has "
                f"labels 1 to {len(classes)}); take both lists from the authors' lists.tar"
            )
    return FileSource(f"stanford_dogs {split}", folder / "Images", paths, labels - 1, classes, channels, max_pixels)


def _breeds(train_list: Path) -> tuple[str, ...]:
    paths, labels = read_dogs_list(train_list)
    folders = {label: path.split("/")[0] for path, label in zip(paths, labels.tolist())}
    if sorted(folders) != list(range(1, len(folders) + 1)):
        raise ValueError(
            f"{train_list}: its {len(folders)} class numbers go from {min(folders)} to {max(folders)}; they should be "
            f"1, 2, 3, ..., each with images; take it from the authors' lists.tar"
        )
    return tuple(folders[number] for number in sorted(folders))


def read_dogs_list(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the paths below `Images` and the class numbers, int32 from 1, that a list of Stanford Dogs holds.

    The file is MATLAB's: `file_list` is a cell array of strings, which loadmat gives as an object array of arrays;
    nothing in it is executed. Raises ValueError, naming the file, if it is missing or damaged.
    """
    try:
        lists = read_mat(path, ("file_list", "labels"))
        paths = [cell.item() for cell in lists["file_list"].ravel()]
        labels = lists["labels"].ravel().astype(np.int32)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error) if str(path) in str(error) else f"{path} is missing or damaged ({error})"
        raise ValueError(f"{reason}; take it from the authors' lists.tar") from error
    whole = paths and len(labels) == len(paths)
    if not whole or not all(isinstance(path, str) and path.count("/") == 1 for path in paths):
        raise ValueError(
            f"{path}: {len(paths)} files and {len(labels)} labels; need one label for each folder/file, from the "
            f"authors' lists.tar"
        )
    for name in paths:
        _refuse_outside(path, name)
    return paths, labels


def open_food101(root: Path | None, split: str, download: bool, channels: int, max_pixels: int) -> FileSource:
    """Open Food-101 (Bossard et al., ECCV 2014): 75,750 train and 25,250 test photos of 101 dishes.

    That is `images/<class>/*.jpg` and `meta/{classes.txt,train.txt,test.txt}` in root or in `<root>/food-101`, or the
    authors' `food-101.tar.gz` (5 GB) in root; else it is downloaded. torchvision's Food101 unpacks the same archive,
    but without a filter of its members' paths. Classes are numbered in the order of `classes.txt`.

    Raises:
        ValueError: if a file is missing or damaged, or a list names a class that `classes.txt` lacks.
    """
    home = cache_folder() if root is None else root
    folder = home
    if not (home / "meta").is_dir():
        _provide("Food-101", FOOD101, home, download)
        folder = home / "food-101"
    class_path, list_path = folder / "meta" / "classes.txt", folder / "meta" / f"{split}.txt"
    classes = [name for _, name in _lines(class_path)]
    number_of = {name: number for number, name in enumerate(classes)}
    numbers, paths, labels = [], [], []
    for number, image in _lines(list_path):
        name = image.partition("/")[0]
        if name not in number_of:
            raise ValueError(
                f"{list_path}, line {number}: class {name!r} is none of the {len(classes)} of {class_path}; "
                f"unpack {FOOD101.name} again"
            )
        _refuse_outside(list_path, image)
        numbers.append(number)
        paths.append(f"{image}.jpg")
        labels.append(number_of[name])
    where = (list_path, numbers)
    return FileSource(f"food101 {split}", folder / "images", paths, labels, classes, channels, max_pixels, where)


def open_nabirds(root: Path | None, split: str, download: bool, channels: int, max_pixels: int) -> FileSource:
    """Open NABirds (Van Horn et al., CVPR 2015): 23,929 train and 24,633 test photos of 555 categories of birds.

    That is `images/<class id>/*.jpg`, `images.txt`, `image_class_labels.txt`, `train_test_split.txt` and `classes.txt`
    in root or in `<root>/nabirds`, or `nabirds.tar.gz` in root. Nothing is downloaded, whatever `download` says: the
    archive is given to those who agree to its terms at https://dl.allaboutbirds.org/nabirds.

    `classes.txt` names the 1,011 nodes of a hierarchy, 0 to 1010, of which 555 leaves have images. Those are the
    classes here, numbered in the order of their ids, over both splits.

    Raises:
        ValueError: if a file is missing or damaged, or an image has no label, no split or an unknown class.
    """
    home = cache_folder() if root is None else root
    folder = home
    if not (home / "images.txt").is_file():
        _provide("NABirds", NABIRDS, home, download)
        folder = home / "nabirds"
    image_path, label_path, split_path = (
        folder / name for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    class_of, sides = _table(label_path), _table(split_path)
    ids, classes = _birds(folder / "classes.txt", label_path, class_of)
    number_of = {identifier: number for number, identifier in enumerate(ids)}
    numbers, paths, labels = [], [], []
    for number, line in _lines(image_path):
        image, _, path = line.partition(" ")
        for file, known in ((label_path, class_of.get(image)), (split_path, sides.get(image) in ("0", "1"))):
            if not known:
                raise ValueError(
                    f"{image_path}, line {number}: {file.name} has no valid line for image {image}; "
                    f"unpack {NABIRDS.name} again"
                )
        if sides[image] == {"train": "1", "test": "0"}[split]:
            _refuse_outside(image_path, path)
            numbers.append(number)
            paths.append(path)
            labels.append(number_of[class_of[image]])
    where = (image_path, numbers)
    return FileSource(f"nabirds {split}", folder / "images", paths, labels, classes, channels, max_pixels, where)


def _birds(path: Path, label_path: Path, class_of: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the ids that images have, in numerical order, and their names."""
    names = _table(path)
    for image, identifier in class_of.items():
        if identifier not in names or not identifier.isdecimal():
            raise ValueError(
                f"{label_path}: image {image} has class {identifier}, which is none of the {len(names)} of {path}; "
                f"unpack {NABIRDS.name} again"
            )
    ids = sorted(set(class_of.values()), key=int)
    return ids, [names[identifier] for identifier in ids]


def _table(path: Path) -> dict[str, str]:
    """Read lines of a key, a space and a value, which may have spaces itself."""
    pairs = (line.partition(" ") for _, line in _lines(path))
    return {key: value.strip() for key, _, value in pairs}


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); unpack the authors' archive again") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; unpack the authors' archive again")
    return lines


def _refuse_outside(list_path: Path, image: str) -> None:
    """Raise ValueError for a path that leaves the folder of the images: a list is as foreign as its archive."""
    if image.startswith("/") or ".." in image.split("/") or "\0" in image:
        raise ValueError(f"{list_path}: {image!r} lies outside of the folder of the images; take the authors' archive")


def _provide(what: str, archive: Archive, folder: Path, download: bool) -> None:
    """Have in a folder what an archive holds: there already, unpacked now, or downloaded and unpacked."""
    if all((folder / name).exists() for name in archive.holds):
        return
    if not (folder / archive.name).is_file():
        if archive.url is None:
            raise ValueError(
                f"{what} is not in {folder}; agree to its terms at {NABIRDS_PAGE}, put {archive.name} into a folder "
                f"and set data.root= to that"
            )
        if not download:
            raise ValueError(
                f"{what} is not in {folder}; set data.root= to the folder that has it, or data.download=true"
            )
        _fetch(what, archive.url, archive, folder)
    elif wrong := _wrong_checksum(folder / archive.name, archive):
        raise ValueError(
            f"{folder / archive.name} is damaged or another archive: {wrong}; fetch it again, or unpack it yourself"
        )
    _unpack(archive, folder)


def _fetch(what: str, url: str, archive: Archive, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What an interrupted download leaves must not be taken for the archive.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            download_url(url, scratch, archive.name)
            arrived = Path(scratch, archive.name)
            if wrong := _wrong_checksum(arrived, archive):
                raise RuntimeError(wrong)
            arrived.replace(folder / archive.name)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
        raise ValueError(
            f"downloading {what} into {folder} failed ({error}); fetch {url} where there is internet and set "
            f"data.root= to its folder"
        ) from error


def _wrong_checksum(path: Path, archive: Archive) -> str:
    """Return what is wrong with a file's checksum, "" if nothing is or none is known."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while archive.sha256 and (chunk := file.read(1 << 20)):
            digest.update(chunk)
    wrong = archive.sha256 and digest.hexdigest() != archive.sha256
    return f"its SHA-256 is {digest.hexdigest()}, that of the authors' {archive.name} {archive.sha256}" if wrong else ""


def _only_files(archive: Path) -> Callable[[tarfile.TarInfo, str], tarfile.TarInfo]:
    """A filter for `tarfile`: folders and files that lie inside, and not many times more than the archive has bytes.

    Beside what tarfile's own filter "data" refuses, that are links of any kind (the authors' archives have none), by
    which that filter has been got around more than once (CVE-2025-4517, for one).
    """
    left = [_SPARE + _MOST_UNFOLDED * archive.stat().st_size]

    def check(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        left[0] -= member.size
        if not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
        if left[0] < 0:
            raise tarfile.TarError(f"it unfolds to more than {_MOST_UNFOLDED} times its size")
        return tarfile.data_filter(member, folder)

    return check


def _unpack(archive: Archive, folder: Path) -> None:
    """Unpack an archive in a folder of its own and move what it holds into place when it is complete."""
    path = folder / archive.name
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder) as scratch:
            with tarfile.open(path) as tar:
                tar.extractall(scratch, filter=_only_files(path))
            for entry in sorted(Path(scratch).iterdir()):
                if not (folder / entry.name).exists():
                    entry.rename(folder / entry.name)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); fetch it again, or unpack it elsewhere") from error
    missing = [name for name in archive.holds if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}; fetch the authors' archive")
