from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mae_et.data import published
from mae_et.data.sources import KINDS, count_images, open_source
from tests.data.trees import colour

KIND_NAMES = ["stanford_dogs", "food101", "nabirds"]


def write_jpegs(root: Path, *paths: str) -> None:
    """Write a JPEG of one colour at each path, its red 20 levels above that of the one before."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour(20 * number)).save(root / path, "JPEG", quality=95)


def contents(source) -> list[tuple[int, int]]:
    """Which of `write_jpegs` each image is, and its label; JPEG moves a flat colour by 2 levels at most."""
    return [(round(int(source.image(i)[0, 0, 0]) / 20), source.label(i)) for i in range(len(source))]


def pack(archive: Path, folder: Path, *names: str, mode: str = "w") -> None:
    """Move entries of a folder into a tar file."""
    with tarfile.open(archive, mode) as tar:
        for name in names:
            tar.add(folder / name, name)
    for name in names:
        (folder / name).rename(folder.parent / f"packed-{name}")


def with_checksum(archive: published.Archive, path: Path) -> published.Archive:
    """The archive, known by the checksum of a test's file."""
    return archive._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def pack_dogs(folder: Path, monkeypatch) -> None:
    """Replace Stanford Dogs in a folder by its two archives, and make those the known ones."""
    pack(folder / "images.tar", folder, "Images")
    pack(folder / "lists.tar", folder, "train_list.mat", "test_list.mat")
    archives = tuple(with_checksum(archive, folder / archive.name) for archive in published.STANFORD_DOGS)
    monkeypatch.setattr(published, "STANFORD_DOGS", archives)


# Stanford Dogs

DOGS = ("n02085620-Chihuahua", "n02085936-Maltese_dog", "n02113978-Mexican_hairless")
DOG_IMAGES = [f"{breed}/{breed.split('-')[0]}_{number}.jpg" for breed in DOGS for number in (10074, 199)]


def write_dogs_list(path: Path, files: list[str], labels: list[int]) -> None:
    cells = np.empty((len(files), 1), object)
    cells[:, 0] = files
    boxes = np.empty((len(files), 1), object)
    boxes[:, 0] = [file.removesuffix(".jpg") for file in files]
    savemat(path, {"file_list": cells, "annotation_list": boxes, "labels": np.array(labels, np.uint8)[:, None]})


def write_dogs(folder: Path) -> None:
    write_jpegs(folder / "Images", *DOG_IMAGES)
    write_dogs_list(folder / "train_list.mat", [DOG_IMAGES[i] for i in (0, 3, 5)], [1, 2, 3])
    write_dogs_list(folder / "test_list.mat", [DOG_IMAGES[i] for i in (4, 1)], [3, 1])


@pytest.mark.parametrize("folder", ["", "stanford-dogs"])
def test_stanford_dogs(tmp_path, folder):
    write_dogs(tmp_path / folder)
    train = open_source("stanford_dogs", tmp_path, download=False)
    assert train.classes == DOGS
    assert contents(train) == [(0, 0), (3, 1), (5, 2)]
    assert (train.name, train.channels) == ("stanford_dogs train", 3)
    assert train.describe(1) == str(tmp_path / folder / "Images" / DOG_IMAGES[3])
    # The Maltese, which the test list lacks, keep their number.
    test = open_source("stanford_dogs", tmp_path, "test", download=False)
    assert contents(test) == [(4, 2), (1, 0)]
    assert test.classes == DOGS
    assert open_source("stanford_dogs", tmp_path, "test", channels=1).image(0).shape == (1, 8, 8)


def test_the_dogs_archives_are_unpacked_once(tmp_path, monkeypatch):
    home = tmp_path / "dogs"
    write_dogs(home)
    pack_dogs(home, monkeypatch)
    assert contents(open_source("stanford_dogs", home, download=False)) == [(0, 0), (3, 1), (5, 2)]
    names = {"Images", "images.tar", "lists.tar", "test_list.mat", "train_list.mat"}
    assert {path.name for path in home.iterdir()} == names
    monkeypatch.setattr(tarfile, "open", None)
    assert len(open_source("stanford_dogs", home, "test")) == 2


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: b"<html>" * 50])
@pytest.mark.parametrize("name", ["train_list.mat", "test_list.mat"])
def test_a_damaged_dogs_list(tmp_path, damage, name):
    write_dogs(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged .*take it from the authors' lists\.tar"):
        open_source("stanford_dogs", tmp_path, "test")


def test_other_mat_files(tmp_path):
    write_dogs(tmp_path)
    path = tmp_path / "test_list.mat"
    savemat(path, {"labels": np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"test_list\.mat is missing or damaged \('file_list'\)"):
        open_source("stanford_dogs", tmp_path, "test")
    write_dogs_list(path, DOG_IMAGES[:2], [1])
    with pytest.raises(ValueError, match=r"test_list\.mat: 2 files and 1 labels; need one label for each"):
        open_source("stanford_dogs", tmp_path, "test")
    write_dogs_list(path, ["loose.jpg"], [1])
    with pytest.raises(ValueError, match=r"test_list\.mat: .*for each folder/file"):
        open_source("stanford_dogs", tmp_path, "test")
    savemat(path, {"file_list": np.ones((2, 1)), "labels": np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"test_list\.mat: .*for each folder/file"):
        open_source("stanford_dogs", tmp_path, "test")


@pytest.mark.parametrize("label", [0, 2, 4])
def test_a_dog_whose_label_is_wrong(tmp_path, label):
    write_dogs(tmp_path)
    write_dogs_list(tmp_path / "test_list.mat", [DOG_IMAGES[4], DOG_IMAGES[1]], [3, label])
    with pytest.raises(ValueError, match=rf"test_list\.mat: {DOG_IMAGES[1]} has label {label}, .*labels 1 to 3"):
        open_source("stanford_dogs", tmp_path, "test")


def test_a_breed_without_images(tmp_path):
    write_dogs(tmp_path)
    write_dogs_list(tmp_path / "train_list.mat", [DOG_IMAGES[0], DOG_IMAGES[5]], [1, 3])
    with pytest.raises(
        ValueError, match=r"train_list\.mat: its 2 class numbers go from 1 to 3; they should be 1, 2, 3"
    ):
        open_source("stanford_dogs", tmp_path, "test")


# Food-101

FOOD_IMAGES = ["apple_pie/1005649", "apple_pie/1011328", "waffles/971843", "waffles/99"]


def write_food(folder: Path) -> None:
    write_jpegs(folder / "images", *(f"{image}.jpg" for image in FOOD_IMAGES))
    meta = {
        "classes.txt": "apple_pie\nbaby_back_ribs\nwaffles\n",
        "labels.txt": "Apple pie\nBaby back ribs\nWaffles\n",
        "train.txt": "apple_pie/1005649\nwaffles/99\n",
        "test.txt": "waffles/971843\napple_pie/1011328\n",
    }
    (folder / "meta").mkdir()
    for name, text in meta.items():
        (folder / "meta" / name).write_text(text)


@pytest.mark.parametrize("folder", ["", "food-101"])
def test_food101(tmp_path, folder):
    write_food(tmp_path / folder)
    train = open_source("food101", tmp_path, download=False)
    assert train.classes == ("apple_pie", "baby_back_ribs", "waffles")
    assert contents(train) == [(0, 0), (3, 2)]
    test = open_source("food101", tmp_path, "test", download=False)
    assert contents(test) == [(2, 2), (1, 0)]
    place = tmp_path / folder
    assert test.describe(1) == f"{place}/images/apple_pie/1011328.jpg (line 2 of {place}/meta/test.txt)"


def test_the_food_archive_is_unpacked(tmp_path, monkeypatch):
    home = tmp_path / "food"
    write_food(home / "food-101")
    pack(home / "food-101.tar.gz", home, "food-101", mode="w:gz")
    monkeypatch.setattr(published, "FOOD101", with_checksum(published.FOOD101, home / "food-101.tar.gz"))
    assert contents(open_source("food101", home, download=False)) == [(0, 0), (3, 2)]
    assert {path.name for path in home.iterdir()} == {"food-101", "food-101.tar.gz"}


def test_a_dish_that_is_no_class(tmp_path):
    write_food(tmp_path)
    (tmp_path / "meta" / "test.txt").write_text("waffles/971843\n\ntofu/1\n")
    with pytest.raises(ValueError, match=r"test\.txt, line 3: class 'tofu' is none of the 3 of .*classes\.txt"):
        open_source("food101", tmp_path, "test")


@pytest.mark.parametrize("name", ["classes.txt", "train.txt"])
def test_damaged_food_lists(tmp_path, name):
    write_food(tmp_path)
    path = tmp_path / "meta" / name
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged"):
        open_source("food101", tmp_path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=rf"{name} is empty; unpack the authors' archive again"):
        open_source("food101", tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged .*No such file"):
        open_source("food101", tmp_path)


# NABirds

BIRD_IMAGES = {
    "0000139e-21dc-4d0c-bfe1-4cae3c85c829": ("0817", 0),
    "0000d9fc-4e02-4c06-a0af-a55cfb16b12b": ("0860", 1),
    "00019306-9d83-4334-b255-a447742edce3": ("0296", 1),
    "0001afd4-99a1-4a67-b940-d419413e23b3": ("0817", 1),
}


def write_birds(folder: Path) -> None:
    paths = {image: f"{label}/{image.replace('-', '')}.jpg" for image, (label, _) in BIRD_IMAGES.items()}
    write_jpegs(folder / "images", *paths.values())
    texts = {
        "images.txt": [f"{image} {path}" for image, path in paths.items()],
        "image_class_labels.txt": [f"{image} {int(label)}" for image, (label, _) in BIRD_IMAGES.items()],
        "train_test_split.txt": [f"{image} {train}" for image, (_, train) in reversed(BIRD_IMAGES.items())],
        # Nodes of the hierarchy, of which 0 and 82 have no images of their own, nor has the leaf 900.
        "classes.txt": ["0 Birds", "82 Dark-eyed Junco", "296 Greater White-fronted Goose", "817 Oregon Junco (Male)",
                        "860 House Sparrow (Female/Juvenile)", "900 Anhinga"],
    }  # fmt: skip
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("folder", ["", "nabirds"])
def test_nabirds(tmp_path, folder):
    write_birds(tmp_path / folder)
    train = open_source("nabirds", tmp_path, download=False)
    # Numbered by id as a number, not as text, over both splits.
    assert train.classes == (
        "Greater White-fronted Goose", "Oregon Junco (Male)", "House Sparrow (Female/Juvenile)",
    )  # fmt: skip
    assert contents(train) == [(1, 2), (2, 0), (3, 1)]
    test = open_source("nabirds", tmp_path, "test", download=False)
    assert contents(test) == [(0, 1)]
    assert test.classes == train.classes
    place = tmp_path / folder
    path = place / "images" / "0817" / "0001afd499a14a67b940d419413e23b3.jpg"
    assert train.describe(2) == f"{path} (line 4 of {place / 'images.txt'})"


def test_bird_classes_are_in_the_order_of_numbers(tmp_path):
    write_birds(tmp_path)
    for name in ("classes.txt", "image_class_labels.txt"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("860", "1010"))
    assert contents(open_source("nabirds", tmp_path)) == [(1, 2), (2, 0), (3, 1)]


def test_the_birds_archive_is_unpacked(tmp_path):
    home = tmp_path / "birds"
    write_birds(home / "nabirds")
    pack(home / "nabirds.tar.gz", home, "nabirds", mode="w:gz")
    assert contents(open_source("nabirds", home, "test", download=False)) == [(0, 1)]


def test_nabirds_says_where_to_ask(tmp_path):
    for download in (False, True):
        with pytest.raises(ValueError, match=r"agree to its terms at https://dl\.allaboutbirds\.org/nabirds, put nabi"):
            open_source("nabirds", tmp_path, download=download)


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_a_bird_without_a_line(tmp_path, name):
    write_birds(tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("00019306")))
    with pytest.raises(ValueError, match=rf"images\.txt, line 3: {name} has no valid line for image 00019306-9d83"):
        open_source("nabirds", tmp_path)


@pytest.mark.parametrize("label", ["1011", "-1", "junco"])
def test_a_bird_of_no_class(tmp_path, label):
    write_birds(tmp_path)
    path = tmp_path / "image_class_labels.txt"
    path.write_text(path.read_text().replace(" 296", f" {label}"))
    with pytest.raises(ValueError, match=rf"image 00019306-.* has class {label}, which is none of the 6 of .*classes"):
        open_source("nabirds", tmp_path, "test")


def test_a_bird_of_no_split(tmp_path):
    write_birds(tmp_path)
    path = tmp_path / "train_test_split.txt"
    path.write_text(path.read_text().replace("c829 0", "c829 2"))
    with pytest.raises(ValueError, match=r"images\.txt, line 1: train_test_split\.txt has no valid line"):
        open_source("nabirds", tmp_path)


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt", "classes.txt"])
def test_a_missing_file_of_nabirds(tmp_path, name):
    write_birds(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged .*No such file"):
        open_source("nabirds", tmp_path)


# Archives


def evil_tar(path: Path, member: str, link: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(member)
        if link is None:
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        else:
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)


@pytest.mark.parametrize(
    ("member", "link"),
    [("../evil", None), ("nabirds/../../../evil", None), ("nabirds/up", "../../.."), ("nabirds/etc", "/etc")],
)
def test_members_outside_the_folder_are_refused(tmp_path, member, link):
    home = tmp_path / "deep" / "birds"
    evil_tar(home / "nabirds.tar.gz", member, link)
    with pytest.raises(
        ValueError,
        match=r"nabirds\.tar\.gz cannot be unpacked \(.*(outside the destination|absolute path|neither a file)",
    ):
        open_source("nabirds", home)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "birds", "nabirds.tar.gz"]


def test_an_archive_cut_short_leaves_nothing(tmp_path):
    home = tmp_path / "birds"
    write_birds(home / "nabirds")
    archive = home / "nabirds.tar.gz"
    pack(archive, home, "nabirds", mode="w:gz")
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"nabirds\.tar\.gz cannot be unpacked .*fetch it again"):
        open_source("nabirds", home)
    assert [path.name for path in home.iterdir()] == ["nabirds.tar.gz"]


def test_an_archive_of_something_else(tmp_path):
    (tmp_path / "other").mkdir()
    pack(tmp_path / "nabirds.tar.gz", tmp_path, "other", mode="w:gz")
    with pytest.raises(ValueError, match=r"nabirds\.tar\.gz holds no nabirds; fetch the authors' archive"):
        open_source("nabirds", tmp_path)


def test_an_archive_with_another_checksum(tmp_path):
    home = tmp_path / "food"
    write_food(home / "food-101")
    pack(home / "food-101.tar.gz", home, "food-101", mode="w:gz")
    with pytest.raises(ValueError, match=r"food-101\.tar\.gz is damaged or another archive: its SHA-256 is .*d97d15e4"):
        open_source("food101", home)
    assert not (home / "food-101").exists()


# Downloads


def test_downloads_are_checked_and_unpacked(tmp_path, monkeypatch):
    served = tmp_path / "served"
    write_dogs(served)
    pack_dogs(served, monkeypatch)
    asked = []

    def download(url, root, name):
        asked.append(url)
        Path(root, name).write_bytes((served / name).read_bytes())

    monkeypatch.setattr(published, "download_url", download)
    home = tmp_path / "new" / "cache"
    assert contents(open_source("stanford_dogs", home)) == [(0, 0), (3, 1), (5, 2)]
    assert contents(open_source("stanford_dogs", home, "test")) == [(4, 2), (1, 0)]
    site = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
    assert asked == [site + "images.tar", site + "lists.tar"]
    assert [path.name for path in home.iterdir()] == ["stanford-dogs"]


@pytest.mark.parametrize("kind", ["stanford_dogs", "food101"])
def test_a_download_that_arrives_damaged_is_not_kept(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(published, "download_url", lambda _url, root, name: Path(root, name).write_bytes(b"<html>"))
    with pytest.raises(ValueError, match=r"downloading .* failed \(its SHA-256 is .*set data\.root="):
        open_source(kind, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["stanford_dogs", "food101"])
def test_a_download_that_is_not_allowed_or_fails(tmp_path, monkeypatch, kind):
    def fail(*_args):
        raise OSError("no route to host")

    monkeypatch.setattr(published, "download_url", fail)
    with pytest.raises(ValueError, match=rf"not in {tmp_path}.*; set data\.root=.*data\.download=true"):
        open_source(kind, tmp_path, download=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"into {tmp_path}.* failed \(no route to host\); fetch http://.*data\.root="):
        open_source(kind, tmp_path)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_without_a_root_the_cache_is_used(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write, folder = {
        "stanford_dogs": (write_dogs, "stanford-dogs"),
        "food101": (write_food, "food-101"),
        "nabirds": (write_birds, "nabirds"),
    }[kind]
    write(tmp_path / "mae_et" / folder)
    assert len(open_source(kind, download=False)) in (2, 3)


# What is common


def test_published_counts():
    counts = {kind: [count_images(kind, split=split) for split in ("train", "test")] for kind in KIND_NAMES}
    assert counts == {"stanford_dogs": [12_000, 8_580], "food101": [75_750, 25_250], "nabirds": [23_929, 24_633]}
    # The papers' totals: 20,580 dogs, 1,000 pictures of each of 101 dishes, 48,562 birds.
    assert [sum(pair) for pair in counts.values()] == [20_580, 101_000, 48_562]
    assert set(KIND_NAMES) < set(KINDS)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_there_is_no_val_split(kind):
    with pytest.raises(ValueError, match=f"{kind} has no split 'val'; it has train, test"):
        open_source(kind, split="val")
