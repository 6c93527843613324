"""Images with masks: three layouts, small ones of each written here, and every way in which they can be wrong."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.data.decode import ImageError
from mae_et.data.segmentation import SegmentationSubset, hold_out_scenes, open_segmentation, segmentation_splits

H, W = 4, 6


def write(path: Path, values: np.ndarray, mode: str | None = None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([7, 8, 9] * 256)
    image.save(path, **options)


def photo(path: Path, size: tuple[int, int] = (H, W), value: int = 7, **options) -> None:
    write(path, np.full((*size, 3), value, np.uint8), **options)


def indices(high: int, size: tuple[int, int] = (H, W), seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, size).astype(dtype)


def pair(root: Path, values: np.ndarray, name: str = "a", split: str = "train", **options) -> None:
    photo(root / split / "images" / f"{name}.jpg", values.shape)
    write(root / split / "masks" / f"{name}.png", values, **options)


def pairs(root: Path, split: str = "train", **options):
    return open_segmentation("pairs", root, split, **{"classes": ("x", "y", "z")} | options)


# Pairs


def test_pairs_beside_each_other_in_a_split(tmp_path):
    masks = [indices(3, (H + i, W), seed=i) for i in range(3)]
    for i, name in enumerate(["b/2", "a", "b/1"]):
        pair(tmp_path, masks[i], name)
    pair(tmp_path, masks[0], split="test")
    assert segmentation_splits("pairs", tmp_path) == ("train", "test")
    source = pairs(tmp_path)
    assert (source.name, source.classes, source.channels, len(source)) == ("pairs train", ("x", "y", "z"), 3, 3)
    for i, wanted in enumerate([masks[1], masks[2], masks[0]]):  # by name
        mask = source.mask(i)
        assert mask.dtype == torch.uint8
        assert mask.is_contiguous()
        np.testing.assert_array_equal(mask.numpy(), wanted)
        assert source.image(i).shape == (3, *wanted.shape)
    assert source.describe(1) == str(tmp_path / "train/images/b/1.jpg")


def test_splits_below_images_and_masks(tmp_path):
    for i, split in enumerate(["train", "val"]):
        photo(tmp_path / "images" / split / "a.webp")
        write(tmp_path / "labels" / split / "a.png", np.full((H, W), i, np.uint8))
    assert segmentation_splits("pairs", tmp_path) == ("train", "val")
    assert pairs(tmp_path, "val", masks="labels").mask(0).unique().tolist() == [1]


def test_no_splits_are_train(tmp_path):
    photo(tmp_path / "images" / "a.jpg")
    write(tmp_path / "masks" / "a.png", indices(3))
    assert segmentation_splits("pairs", tmp_path) == ("train",)
    assert len(pairs(tmp_path)) == 1
    with pytest.raises(ValueError, match="has no split 'val'; it has train"):
        pairs(tmp_path, "val")


@pytest.mark.parametrize("mode", ["L", "P", "16"])
def test_kinds_of_png(tmp_path, mode):
    values = indices(3, dtype=np.uint16 if mode == "16" else np.uint8)
    values[0, 0] = 255
    pair(tmp_path, values, mode=mode)
    np.testing.assert_array_equal(pairs(tmp_path).mask(0).numpy(), values.astype(np.uint8))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_is_not_stretched(tmp_path, depth):
    count = min(1 << depth, 3)
    values = indices(count, (5, 8))
    bits = np.unpackbits(values[:, :, None], axis=2)[:, :, -depth:].reshape(5, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 5, depth, 0, 0, 0, 0)
    pair(tmp_path, values)
    (tmp_path / "train/masks/a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(pairs(tmp_path).mask(0).numpy(), values)


def test_ignored_values(tmp_path):
    pair(tmp_path, np.array([[0, 1, 2, 9]], np.uint8))
    assert pairs(tmp_path, ignore=9).mask(0).tolist() == [[0, 1, 2, 255]]
    assert pairs(tmp_path, ignore=0, classes=list("abcdefghij")).mask(0).tolist() == [[255, 1, 2, 9]]
    pair(tmp_path, np.array([[0, 1, 60000]], np.uint16))
    assert pairs(tmp_path, ignore=60000).mask(0).tolist() == [[0, 1, 255]]
    with pytest.raises(ValueError, match=r"data\.ignore=65536"):
        pairs(tmp_path, ignore=65536)


def test_binary_masks(tmp_path):
    pair(tmp_path, np.array([[0, 1, 2, 128, 255]], np.uint8))
    source = open_segmentation("pairs", tmp_path, binary=True)
    assert source.classes == ("background", "foreground")
    assert source.mask(0).tolist() == [[0, 1, 1, 1, 1]]
    assert open_segmentation("pairs", tmp_path, binary=True, ignore=128).mask(0).tolist() == [[0, 1, 1, 255, 1]]
    assert open_segmentation("pairs", tmp_path, binary=True, classes=("no", "yes")).classes == ("no", "yes")
    with pytest.raises(ValueError, match=r"data\.names has 3 names, and binary masks have 2"):
        pairs(tmp_path, binary=True)


def test_classes_come_from_a_file_or_must_be_given(tmp_path):
    pair(tmp_path, indices(2))
    with pytest.raises(ValueError, match=r"no class names: set data\.names=.*classes\.txt.*data\.binary"):
        open_segmentation("pairs", tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nroad \n")
    assert open_segmentation("pairs", tmp_path).classes == ("sky", "road")
    (tmp_path / "classes.txt").write_text("sky\n\nroad\nsky\n")
    with pytest.raises(ValueError, match=r"classes\.txt names '\(an empty line\)', 'sky' more than once"):
        open_segmentation("pairs", tmp_path)
    for count in (1, 256):
        with pytest.raises(ValueError, match=f"has {count} names; there can be 2 to 255"):
            pairs(tmp_path, classes=[str(i) for i in range(count)])


def test_a_value_beyond_the_classes(tmp_path):
    values = np.zeros((H, W), np.uint8)
    values[2, 1:3] = 3
    pair(tmp_path, values)
    with pytest.raises(
        ImageError, match=r"masks/a\.png: value 3 at row 2, column 1 \(2 pixels .*3 classes have 0 to 2.*data\.names"
    ):
        pairs(tmp_path).mask(0)


def test_a_mask_of_another_size(tmp_path):
    pair(tmp_path, indices(3))
    write(tmp_path / "train/masks/a.png", indices(3, (W, H)))
    with pytest.raises(ImageError, match=r"masks/a\.png: the mask has 4 x 6 px.*images/a\.jpg has 6 x 4"):
        pairs(tmp_path).mask(0)


def test_masks_that_are_no_index_masks(tmp_path):
    pair(tmp_path, indices(3))
    path = tmp_path / "train/masks/a.png"
    photo(path)
    with pytest.raises(ImageError, match=r"masks/a\.png: a mask in colours \(RGB\).*grey of 8 or 16 bits"):
        pairs(tmp_path).mask(0)
    photo(path, format="JPEG")
    with pytest.raises(ImageError, match=r"masks/a\.png: not a PNG"):
        pairs(tmp_path).mask(0)
    write(path, indices(3, (40, 40)))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ImageError, match=r"masks/a\.png: damaged"):
        pairs(tmp_path).mask(0)
    write(path, indices(3, (40, 40)))
    with pytest.raises(ImageError, match=r"too many pixels: 40 x 40.*data\.max_pixels=99"):
        pairs(tmp_path, max_pixels=99).mask(0)
    source = pairs(tmp_path)
    path.unlink()
    with pytest.raises(ImageError, match=r"masks/a\.png: cannot be read: No such file"):
        source.mask(0)


def test_a_damaged_image_spoils_its_mask(tmp_path):
    pair(tmp_path, indices(3))
    (tmp_path / "train/images/a.jpg").write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"images/a\.jpg: damaged"):
        pairs(tmp_path).mask(0)


def test_images_and_masks_without_each_other(tmp_path):
    pair(tmp_path, indices(3))
    write(tmp_path / "train/masks/q.png", indices(3))
    with pytest.raises(
        ValueError, match=r"train/masks has 'q\.png' without images\. An image and its mask have the same"
    ):
        pairs(tmp_path)
    for name in "bcdef":
        photo(tmp_path / "train/images" / f"{name}.jpg")
    with pytest.raises(
        ValueError, match=r"'b\.jpg', 'c\.jpg', 'd\.jpg' and 2 more without masks; .*'q\.png' without images"
    ):
        pairs(tmp_path)


def test_folders_that_cannot_be_pairs(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; set data\.root"):
        pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no split 'train'; it has none"):
        pairs(tmp_path)
    (tmp_path / "train/images").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/masks is not a folder.*set data\.masks"):
        pairs(tmp_path)
    (tmp_path / "train/masks").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*train/images"):
        pairs(tmp_path)
    photo(tmp_path / "train/images/a.jpg")
    photo(tmp_path / "train/masks/a.jpg")
    with pytest.raises(ValueError, match=r"masks must be PNG files, and .* has 'a\.jpg'"):
        pairs(tmp_path)
    photo(tmp_path / "train/images/a.png")
    with pytest.raises(ValueError, match=r"has both 'a\.jpg' and 'a\.png'"):
        pairs(tmp_path)
    with pytest.raises(ValueError, match=r"data\.source=pair is unknown; did you mean 'pairs'\?"):
        open_segmentation("pair", tmp_path)
    with pytest.raises(ValueError, match="channels=4"):
        pairs(tmp_path, channels=4)


# Photos that a camera turned


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("drawn_on", ["stored", "shown"])
def test_a_mask_follows_its_photo(tmp_path, format, orientation, drawn_on):
    """The mask is the photo itself, so that both must be turned alike."""
    corner = np.array([[1, 0, 0], [1, 1, 0]], np.uint8)  # like none of its mirror images
    values = np.repeat(np.repeat(corner, 16, 0), 16, 1)  # whole JPEG blocks
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "train/images/a.jpg", values * 255, format=format, exif=exif)
    shown = (pairs(tmp_path_with_mask(tmp_path, values)).image(0)[0] > 127).byte()
    assert shown.shape == (48, 32)
    tmp_path_with_mask(tmp_path, values if drawn_on == "stored" else shown.numpy())
    mask = pairs(tmp_path).mask(0)
    assert mask.is_contiguous()
    assert torch.equal(mask, shown)


def tmp_path_with_mask(root: Path, values: np.ndarray) -> Path:
    write(root / "train/masks/a.png", values)
    return root


@pytest.mark.parametrize(("orientation", "size"), [(2, (H, W)), (3, (H, W)), (4, (H, W)), (6, (H, H))])
def test_a_photo_whose_mask_may_lie_either_way(tmp_path, orientation, size):
    pair(tmp_path, indices(3, size))
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(tmp_path / "train/images/a.jpg", size, exif=exif)
    with pytest.raises(ImageError, match=rf"a\.jpg: its EXIF orientation is {orientation}.*auto-orient"):
        pairs(tmp_path).mask(0)


# ADE20K


def ade20k(root: Path) -> np.ndarray:
    values = np.arange(151, dtype=np.uint8)[None].repeat(2, 0)
    for split in ("training", "validation"):
        photo(root / f"images/{split}/ADE_1.jpg", values.shape)
        write(root / f"annotations/{split}/ADE_1.png", values)
    return values


def test_ade20k(tmp_path):
    values = ade20k(tmp_path)
    assert segmentation_splits("ade20k", tmp_path) == ("train", "val")
    source = open_segmentation("ade20k", tmp_path, "val")
    assert source.describe(0) == str(tmp_path / "images/validation/ADE_1.jpg")
    assert source.mask(0)[0].tolist() == [255, *range(150)]
    assert source.classes == tuple(str(i) for i in range(150))
    write(tmp_path / "annotations/validation/ADE_1.png", values + 1)
    with pytest.raises(ImageError, match=r"value 151 .*ADE20K hold 0 \(other\) to 150"):
        source.mask(0)
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        open_segmentation("ade20k", tmp_path, "test")
    with pytest.raises(ValueError, match="ade20k has classes of its own"):
        open_segmentation("ade20k", tmp_path, classes=["a", "b"])


def test_names_of_ade20k(tmp_path):
    ade20k(tmp_path)
    rows = [f"{i}\t0.1\t10\t2\t1\t{'door, double door' if i == 15 else f'thing {i}'}   " for i in range(1, 151)]
    file = tmp_path / "objectInfo150.txt"
    file.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    names = open_segmentation("ade20k", tmp_path).classes
    assert (len(names), names[0], names[14], names[149]) == (150, "thing 1", "door, double door", "thing 150")
    file.write_text("\n".join(["header", *rows[:-1]]))
    with pytest.raises(ValueError, match=r"objectInfo150\.txt should list classes 1 to 150"):
        open_segmentation("ade20k", tmp_path)


# COCO panoptic


def panoptic(root: Path, beside: bool = False, **changes) -> np.ndarray:
    """Two images; segments of 24-bit ids, categories with gaps and out of order. Returns the second's classes."""
    ids = np.array([[0, 5, 5], [70_000, 1_000, 16_000_000]], np.uint32)
    classes = np.array([[255, 1, 1], [0, 2, 255]], np.uint8)
    folder = root / ("" if beside else "annotations") / "panoptic_train2017"
    for name, values in (("one", np.zeros((1, 2), np.uint32)), ("two", ids)):
        write(folder / f"{name}.png", np.stack([values & 255, values >> 8 & 255, values >> 16], 2).astype(np.uint8))
        photo(root / f"train2017/{name}.jpg", values.shape)
    found = {5: 7, 70_000: 1, 1_000: 90, 16_000_000: 1}
    segments = [{"id": i, "category_id": c, "iscrowd": int(i > 1e6)} for i, c in found.items()]
    content = {
        "categories": [{"id": i, "name": f"c{i}", "isthing": int(i < 90)} for i in (90, 1, 7)],
        "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in ((3, "one"), (8, "two"))],
        "annotations": [
            {"image_id": 3, "file_name": "one.png", "segments_info": []},
            {"image_id": 8, "file_name": "two.png", "segments_info": segments},
        ],
    } | changes
    file = root / "annotations/panoptic_train2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return classes


@pytest.mark.parametrize("beside", [False, True])
def test_coco_panoptic(tmp_path, beside):
    classes = panoptic(tmp_path, beside)
    assert segmentation_splits("coco_panoptic", tmp_path) == ("train",)
    source = open_segmentation("coco_panoptic", tmp_path, "train")
    assert (source.name, source.classes, len(source)) == ("coco_panoptic train", ("c1", "c7", "c90"), 2)
    assert source.mask(0).tolist() == [[255, 255]]
    assert source.mask(1).dtype == torch.uint8
    np.testing.assert_array_equal(source.mask(1).numpy(), classes)
    assert source.image(1).shape == (3, 2, 3)
    assert source.describe(1) == str(tmp_path / "train2017/two.jpg")


def annotation(image: int = 3, name: str = "one.png", **segment) -> dict:
    return {"image_id": image, "file_name": name, "segments_info": [segment] if segment else []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": []}, "no annotations: the split is empty"),
        ({"annotations": [annotation()]}, r"images 'two\.jpg' have no annotation"),
        ({"annotations": [annotation(), annotation(8), annotation(9, "x.png")]}, r"'x\.png' belong to no image"),
        ({"annotations": [annotation(), annotation(8), annotation(8)]}, "an image has two annotations"),
        ({"annotations": [annotation(id=1, category_id=4)]}, r"segment 1 of one\.png has category 4, which is not"),
        ({"annotations": [{"image_id": 3}]}, "an entry lacks 'segments_info'"),
        ({"categories": [{"id": 1, "name": "a"}] * 2}, "2 categories with 1 ids"),
        ({"images": {"a": 1}}, "no panoptic annotations of COCO"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, changes, message):
    panoptic(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"panoptic_train2017\.json.*{message}"):
        open_segmentation("coco_panoptic", tmp_path, "train")


def test_damaged_annotations(tmp_path):
    panoptic(tmp_path)
    file = tmp_path / "annotations/panoptic_train2017.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match=r"panoptic_train2017\.json: "):
        open_segmentation("coco_panoptic", tmp_path, "train")


def test_pngs_that_do_not_fit_the_annotations(tmp_path):
    panoptic(tmp_path)
    source = open_segmentation("coco_panoptic", tmp_path, "train")
    photo(tmp_path / "annotations/panoptic_train2017/two.png", (2, 3), value=1)
    with pytest.raises(ImageError, match=rf"two\.png: segment {1 + 256 + 65536} is not in the annotations"):
        source.mask(1)
    photo(tmp_path / "annotations/panoptic_train2017/two.png", (3, 2), value=0)
    with pytest.raises(ImageError, match=r"two\.png: the mask has 2 x 3 px.*two\.jpg has 3 x 2"):
        source.mask(1)
    write(tmp_path / "annotations/panoptic_train2017/two.png", indices(2, (2, 3)))
    with pytest.raises(ImageError, match=r"two\.png: a panoptic PNG has three channels"):
        source.mask(1)


# Parts


def test_holding_out_scenes(tmp_path):
    for i in range(20):
        pair(tmp_path, np.full((1, 1), i % 3, np.uint8), f"{i:02d}")
    source = pairs(tmp_path)
    kept, held = hold_out_scenes(source, 0.25, seed=1)
    assert (len(kept), len(held)) == (15, 5)
    assert sorted([*kept.indices, *held.indices]) == list(range(20))
    assert list(held.indices) == sorted(held.indices)
    assert held.name == "pairs train, 0.25 held out"
    assert held.classes == source.classes
    for i, index in enumerate(held.indices):
        assert held.mask(i).item() == index % 3
        assert held.describe(i) == source.describe(int(index))
        assert torch.equal(held.image(i), source.image(int(index)))
    more = hold_out_scenes(source, 0.5, seed=1)[1]
    assert set(held.indices) < set(more.indices)
    assert set(hold_out_scenes(source, 0.25, seed=2)[1].indices) != set(held.indices)
    # What a seed draws is for good: the numbers were read off once.
    assert held.indices.tolist() == [2, 3, 7, 10, 17]
    assert len(hold_out_scenes(source, 0.001, 0)[1]) == 1
    assert len(hold_out_scenes(source, 0.999, 0)[0]) == 1
    for index in (-1, 5):
        with pytest.raises(IndexError):
            held.mask(index)


def test_parts_that_cannot_be_held_out(tmp_path):
    pair(tmp_path, indices(3))
    source = pairs(tmp_path)
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"held-out share {share} is not between"):
            hold_out_scenes(source, share, 0)
    with pytest.raises(ValueError, match="has one image, nothing to hold out"):
        hold_out_scenes(source, 0.5, 0)
    assert len(SegmentationSubset(source, np.array([0, 0]))) == 2


def test_real_people(shared_data):
    source = open_segmentation("pairs", shared_data / "pennfudan", "test", masks="instances", binary=True)
    assert segmentation_splits("pairs", shared_data / "pennfudan") == ("train", "test")
    assert len(source) == 34
    mask = source.mask(0)
    assert mask.shape == source.image(0).shape[1:]
    assert mask.unique().tolist() == [0, 1]
