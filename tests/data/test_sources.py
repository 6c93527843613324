from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_et.data.decode import ImageError
from mae_et.data.sources import KINDS, FileSource, available_splits, count_images, open_source
from tests.data.trees import contents, write_images

# Folders


def test_class_folders_are_labels_by_name(tmp_path):
    write_images(tmp_path, "zebra/b.png", "zebra/a.JPEG", "ant/x.PnG", "ant/10.png", "ant/9.jpg")
    source = open_source("folder", tmp_path)
    assert source.classes == ("ant", "zebra")
    assert contents(source) == [(3, 0), (4, 0), (2, 0), (1, 1), (0, 1)]
    assert source.image(0).shape == (3, 4, 5)
    assert source.image(0).dtype == torch.uint8
    assert source.describe(3) == str(tmp_path / "zebra" / "a.JPEG")
    assert (source.name, source.channels, len(source)) == ("folder train", 3, 5)


@pytest.mark.parametrize(
    "paths",
    [
        ("b.png", "a.png"),
        ("b.png", "deep/er/a.png"),
        ("b.png", "class/a.png"),
        ("class/b.png", "class/deeper/a.png"),
        ("x/y/b.png", "x/z/a.png"),
    ],
)
def test_other_trees_have_no_labels(tmp_path, paths):
    write_images(tmp_path, *paths)
    source = open_source("folder", tmp_path)
    assert source.classes == ()
    assert sorted(contents(source)) == [(0, -1), (1, -1)]


def test_what_is_no_image_is_left_out(tmp_path):
    write_images(tmp_path, "a/1.png", "a/.hidden.png", "a/._1.png", ".cache/2.png", "b/3.webp")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    assert contents(open_source("folder", tmp_path)) == [(0, 0), (4, 1)]


def test_extensions_can_be_chosen(tmp_path):
    write_images(tmp_path, "a/1.png", "a/2.dat")
    source = open_source("folder", tmp_path, extensions=(".DAT",))
    assert contents(source) == [(1, 0)]


def test_a_folder_with_an_images_name_is_walked_into(tmp_path):
    write_images(tmp_path, "set.png/1.png")
    assert open_source("folder", tmp_path).classes == ("set.png",)


def test_the_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{i:03d}" for i in range(60)]
    shuffled = list(np.random.default_rng(0).permutation(names))
    write_images(tmp_path, *(f"c/{name}.png" for name in shuffled))
    source = open_source("folder", tmp_path)
    assert [Path(source.describe(i)).stem for i in range(60)] == names


def test_splits_of_a_folder(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/4.png", "val/c/5.png")
    write_images(tmp_path, "train.png", first=9)
    assert contents(open_source("folder", tmp_path)) == [(0, 0), (1, 1), (2, 2)]
    # "c" keeps its number though "b" has no images in val.
    val = open_source("folder", tmp_path, split="val")
    assert contents(val) == [(3, 0), (4, 2)]
    assert val.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        open_source("folder", tmp_path, split="test")


def test_unlabelled_splits(tmp_path):
    write_images(tmp_path, "train/1.png", "val/2.png", "annotations/deep/3.png")
    assert contents(open_source("folder", tmp_path)) == [(0, -1)]
    assert contents(open_source("folder", tmp_path, split="val")) == [(1, -1)]


def test_a_class_named_train(tmp_path):
    write_images(tmp_path, "bus/1.png", "car/2.png", "train/3.png")
    assert open_source("folder", tmp_path).classes == ("bus", "car", "train")


def test_a_plain_folder_is_the_train_split(tmp_path):
    write_images(tmp_path, "a/1.png")
    with pytest.raises(ValueError, match=r"no split 'val'; it has train \(the folder itself\)"):
        open_source("folder", tmp_path, split="val")


def test_a_class_that_train_has_not_got(tmp_path):
    write_images(tmp_path, "train/a/1.png", "val/b/2.png")
    with pytest.raises(ValueError, match="val/b is not among the 1 classes of the train split; name the class folders"):
        open_source("folder", tmp_path, split="val")
    write_images(tmp_path, *(f"val/{name}/2.png" for name in "acdefg"))
    with pytest.raises(
        ValueError, match=r"val/b is not .* \(nor are 'c', 'd', 'e' and 2 more\); name .* of val as those"
    ):
        open_source("folder", tmp_path, split="val")


def test_an_empty_class_folder_is_named(tmp_path):
    write_images(tmp_path, "a/1.png", "c/2.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*/b has no images"):
        open_source("folder", tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match=rf"no images in {tmp_path}: .*\.jpg, \.jpeg.*data\.root"):
        open_source("folder", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "list", "imagenet1k", "imagenet22k"])
def test_a_missing_root_says_what_to_set(tmp_path, kind):
    with pytest.raises(ValueError, match=r"set data\.root="):
        open_source(kind)
    with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere .*set data\.root="):
        open_source(kind, tmp_path / "nowhere")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    write_images(tmp_path, "elsewhere/1.png", "root/b/2.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "b" / "again").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "3.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert contents(open_source("folder", tmp_path / "root")) == [(0, 0), (1, 1), (0, 1)]


def test_links_that_lead_nowhere(tmp_path):
    write_images(tmp_path, "a/1.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "self").symlink_to("self")
    source = open_source("folder", tmp_path)
    assert (len(source), source.classes) == (2, ("a",))
    with pytest.raises(ImageError, match=r"a/gone\.png: cannot be read: No such file"):
        source.image(1)


def test_the_order_is_by_name_folders_among_files(tmp_path):
    write_images(tmp_path, "c.png", "b/z.png", "b/a.png", "a.png", "b.png")
    source = open_source("folder", tmp_path)
    wanted = ["a.png", "b/a.png", "b/z.png", "b.png", "c.png"]
    assert [source.describe(i) for i in range(5)] == [f"{tmp_path}/{name}" for name in wanted]


def test_names_that_are_not_unicode(tmp_path):
    write_images(tmp_path, "a/1.png")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / os.fsdecode(b"\xff\xfe.png"))
    assert contents(open_source("folder", tmp_path)) == [(0, 0)]


def test_luma_and_the_pixel_cap_reach_the_decoder(tmp_path):
    write_images(tmp_path, "a/1.png")
    grey = open_source("folder", tmp_path, channels=1)
    assert grey.channels == 1
    assert grey.image(0).shape == (1, 4, 5)
    with pytest.raises(ImageError, match=r"a/1\.png: too many pixels: .*data\.max_pixels=19"):
        open_source("folder", tmp_path, max_pixels=19).image(0)


def test_files_that_cannot_be_read_are_image_errors(tmp_path):
    write_images(tmp_path, "a/1.png", "a/2.png")
    source = open_source("folder", tmp_path)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(ImageError, match=r"a/1\.png: cannot be read: No such file"):
        source.image(0)
    (tmp_path / "a" / "2.png").write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"a/2\.png: not an image"):
        source.image(1)


def test_index_out_of_range(tmp_path):
    write_images(tmp_path, "a/1.png")
    source = open_source("folder", tmp_path)
    for index in [1, -1]:
        with pytest.raises(IndexError):
            source.image(index)


def test_paths_of_many_images_hold_no_python_object_each(tmp_path):
    source = FileSource("many", tmp_path, (f"class/{i:07d}.JPEG" for i in range(100_000)))
    assert source.describe(76_543) == str(tmp_path / "class/0076543.JPEG")
    held = len(pickle.dumps(source))
    # 18 bytes of path, 8 of offset and 4 of label an image; a list of str takes 67 + 8.
    assert held < 31 * 100_000
    assert pickle.loads(pickle.dumps(source)).describe(5) == source.describe(5)


# Counting


def test_counting_opens_no_image(tmp_path):
    for path in ["train/n1/a.JPEG", "train/n2/b.JPEG", "train/n2/c.JPEG", "val/n1/d.JPEG"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"no image at all")
    assert count_images("imagenet1k", tmp_path) == 3
    assert count_images("imagenet1k", tmp_path, "val") == 1
    assert count_images("imagenet22k", tmp_path / "train") == 3
    assert count_images("folder", tmp_path) == 3
    (tmp_path / "list.txt").write_text("a.png\nmissing/b.png\n")
    assert count_images("list", tmp_path / "list.txt") == 2


def test_published_counts_need_no_data():
    assert [count_images("fashion_mnist", split=split) for split in ["train", "test"]] == [60_000, 10_000]
    assert [count_images("cifar100", split=split) for split in ["train", "test"]] == [50_000, 10_000]
    assert sum(count_images("flowers102", split=split) for split in ["train", "val", "test"]) == 8189


# ImageNet


def test_imagenet1k(tmp_path):
    write_images(tmp_path, "train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG", "val/n02/d.JPEG")
    assert contents(open_source("imagenet1k", tmp_path)) == [(0, 0), (1, 1)]
    val = open_source("imagenet1k", tmp_path, "val")
    assert contents(val) == [(2, 0), (3, 1)]
    assert val.name == "imagenet1k val"
    with pytest.raises(ValueError, match="imagenet1k has no split 'test'; it has train, val"):
        open_source("imagenet1k", tmp_path, "test")
    with pytest.raises(ValueError, match=r"no folder 'train' or 'val'; set data\.root="):
        open_source("imagenet1k", tmp_path / "train")


def test_imagenet_without_class_folders(tmp_path):
    write_images(tmp_path, "train/n01/a.JPEG", "val/b.JPEG")
    with pytest.raises(ValueError, match="one folder a class"):
        open_source("imagenet1k", tmp_path, "val")
    with pytest.raises(ValueError, match="one folder a class"):
        open_source("imagenet22k", tmp_path / "val")


def test_imagenet22k_has_one_split(tmp_path):
    write_images(tmp_path, "n01/a.JPEG", "n02/b.JPEG")
    source = open_source("imagenet22k", tmp_path)
    assert source.classes == ("n01", "n02")
    assert contents(source) == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="has no split 'val'; it has train"):
        open_source("imagenet22k", tmp_path, "val")


# What is common


@pytest.mark.parametrize(
    ("kind", "split", "has"),
    [
        ("fashion_mnist", "val", "train, test"),
        ("cifar10", "val", "train, test"),
        ("flowers102", "dev", "train, val, test"),
    ],
)
def test_a_split_that_is_not_there(kind, split, has):
    with pytest.raises(ValueError, match=f"{kind} has no split '{split}'; it has {has}"):
        open_source(kind, split=split)
    with pytest.raises(ValueError, match=f"{kind} has no split '{split}'; it has {has}"):
        count_images(kind, split=split)


def test_available_splits(tmp_path):
    write_images(tmp_path, "train/a/1.png", "test/a/2.png", "flat/a/3.png", "lists/4.png")
    for name in ("train.txt", "val.txt", "notes.txt"):
        (tmp_path / "lists" / name).write_text("4.png\n")
    assert available_splits("folder", tmp_path) == ("train", "test")
    assert available_splits("folder", str(tmp_path / "flat")) == ("train",)
    assert available_splits("folder", tmp_path / "nowhere") == ("train",)
    assert available_splits("imagenet1k", tmp_path) == ("train", "val")
    assert available_splits("imagenet22k", tmp_path) == ("train",)
    assert available_splits("list", tmp_path / "lists") == ("train", "val")
    assert available_splits("list", tmp_path / "lists" / "val.txt") == ("train",)
    assert available_splits("flowers102", tmp_path) == ("train", "val", "test")
    assert available_splits("nabirds") == ("train", "test")
    with pytest.raises(ValueError, match=r"data\.source=folders is unknown; did you mean 'folder'\?"):
        available_splits("folders", tmp_path)


def test_unknown_kind():
    with pytest.raises(
        ValueError, match=r"data\.source=fashionmnist is unknown; did you mean 'fashion_mnist'\?"
    ) as caught:
        open_source("fashionmnist")
    assert all(kind in str(caught.value) for kind in KINDS)


def test_unknown_channels():
    with pytest.raises(ValueError, match="channels=4"):
        open_source("fashion_mnist", channels=4)


def test_real_class_folders(shared_data):
    source = open_source("folder", shared_data / "clothing", "val")
    assert len(source) == 341
    assert len(source.classes) == 10
    assert source.classes == open_source("folder", shared_data / "clothing", "train").classes
    assert source.image(0).shape[0] == 3
    assert open_source("folder", shared_data / "bccd", "test").classes == ()
