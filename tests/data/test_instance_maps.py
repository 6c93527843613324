"""Maps of numbered objects: their kinds of PNG, their boxes, and each kind of damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.data.decode import ImageError
from mae_et.data.detection import detection_splits, open_detection
from mae_et.data.instance_maps import InstanceMapSource

NUMBERS = np.zeros((8, 10), np.int32)
NUMBERS[1:4, 2:5] = 7
NUMBERS[2, 3] = 2  # an object inside another
NUMBERS[5:8, 0:10] = 4
NUMBERS[6, 4:6] = 0


def write(root: Path, numbers: dict[str, Image.Image], split: str = "train") -> Path:
    """An image of 10 x 8 px for each map."""
    for kind in ("images", "instances"):
        (root / split / kind).mkdir(parents=True, exist_ok=True)
    for name, picture in numbers.items():
        Image.new("RGB", (10, 8), (9, 9, 9)).save(root / split / "images" / f"{name}.jpg")
        picture.save(root / split / "instances" / f"{name}.png")
    return root


def grey(values: np.ndarray = NUMBERS) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def palette(values: np.ndarray = NUMBERS) -> Image.Image:
    """The colours of all numbers are one and the same: only the numbers tell."""
    picture = Image.fromarray(values.astype(np.uint8), "L")
    picture.putpalette([5, 6, 7] * 256)
    return picture


def deep(values: np.ndarray = NUMBERS) -> Image.Image:
    return Image.fromarray((values * 1000).astype(np.uint16))


@pytest.mark.parametrize("kind", [grey, palette, deep])
def test_objects_are_those_of_the_numbers(tmp_path, kind):
    source = open_detection("instances", write(tmp_path, {"a": kind()}), "train", classes=("person",))
    assert (source.classes, source.has_masks, source.remarks) == (("person",), True, ())
    assert source.image(0).shape == (3, 8, 10)
    objects = source.instances(0)
    assert objects.boxes.tolist() == [[3, 2, 4, 3], [0, 5, 10, 8], [2, 1, 5, 4]]
    assert objects.boxes.dtype == torch.float32
    assert objects.labels.tolist() == [0, 0, 0]
    assert objects.areas.tolist() == [1, 28, 8]
    assert not objects.crowd.any()
    assert objects.masks is not None
    assert objects.masks.dtype == torch.uint8
    np.testing.assert_array_equal(objects.masks.numpy(), np.stack([number == NUMBERS for number in (2, 4, 7)]))
    without = source.instances(0, masks=False)
    assert without.masks is None
    assert without.boxes.tolist() == objects.boxes.tolist()


def test_a_map_of_two_tones_is_one_object_and_an_empty_one_none(tmp_path):
    write(tmp_path, {"one": Image.fromarray(NUMBERS == 7), "none": grey(0 * NUMBERS)})
    source = open_detection("instances", tmp_path, "train")
    assert source.classes == ("object",)
    nothing, one = source.instances(0), source.instances(1)
    assert one.boxes.tolist() == [[2, 1, 5, 4]]
    assert (nothing.boxes.shape, nothing.areas.shape) == ((0, 4), (0,))
    assert nothing.masks is not None
    assert nothing.masks.shape == (0, 8, 10)


def test_an_image_without_map_is_refused_and_a_map_without_image_remarked(tmp_path):
    write(tmp_path, {"a": grey(), "b": grey(), "c": grey()})
    (tmp_path / "train" / "images" / "b.jpg").unlink()
    source = open_detection("instances", tmp_path, "train")
    assert len(source) == 2
    assert source.remarks == (f"1 maps in {tmp_path / 'train' / 'instances'} have no image: 'b.png'",)
    (tmp_path / "train" / "instances" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 images in .* have no map in .*, which would be named 'c\.png'"):
        open_detection("instances", tmp_path, "train")


def test_a_map_of_another_size_names_both_files(tmp_path):
    source = open_detection("instances", write(tmp_path, {"a": grey(NUMBERS.T)}), "train")
    with pytest.raises(ImageError, match=r"images/a\.jpg is 10 x 8 px, and its map .*instances/a\.png 8 x 10 px"):
        source.instances(0)


def test_a_map_is_compared_with_the_upright_image(tmp_path):
    source = open_detection("instances", write(tmp_path, {"a": grey()}), "train")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 10)).save(tmp_path / "train" / "images" / "a.jpg", exif=exif)
    assert source.image(0).shape == (3, 8, 10)
    assert len(source.instances(0)) == 3


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (grey().convert("RGB"), r"instances/a\.png: a mask in colours \(RGB\).*class or object"),
        (grey().convert("LA"), r"instances/a\.png: a mask in colours \(LA\).*class or object"),
    ],
)
def test_maps_without_numbers_are_image_errors(tmp_path, picture, message):
    source = open_detection("instances", write(tmp_path, {"a": picture}), "train")
    with pytest.raises(ImageError, match=message):
        source.instances(0)


@pytest.mark.parametrize("damage", ["cut", "empty", "jpeg", "image"])
def test_damaged_files_are_image_errors(tmp_path, damage):
    source = open_detection("instances", write(tmp_path, {"a": grey()}), "train")
    target = tmp_path / "train" / ("images/a.jpg" if damage == "image" else "instances/a.png")
    whole = target.read_bytes()
    if damage == "jpeg":
        grey().save(target, "JPEG")
    else:
        target.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "image": b"?"}[damage])
    with pytest.raises(ImageError, match=target.name):
        source.instances(0)


def test_maps_of_more_pixels_than_allowed_are_not_read(tmp_path):
    source = open_detection("instances", write(tmp_path, {"a": grey()}), "train", max_pixels=79)
    with pytest.raises(ImageError, match=r"a\.png: too many pixels: 10 x 8, above data\.max_pixels=79"):
        source.instances(0)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="no instance maps of the split 'train'"):
        open_detection("instances", tmp_path, "train")
    write(tmp_path, {"a": grey()})
    assert detection_splits("instances", tmp_path) == ("train",)
    with pytest.raises(ValueError, match=r"no instance maps of the split 'val'.*it has train"):
        open_detection("instances", tmp_path, "val")
    with pytest.raises(ValueError, match="instance maps have one class, not 2"):
        open_detection("instances", tmp_path, "train", classes=("a", "b"))
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    with pytest.raises(ValueError, match="images is empty"):
        open_detection("instances", tmp_path, "train")


def test_pedestrians_are_read_as_they_are(shared_data):
    source = open_detection("instances", shared_data / "pennfudan", "test", classes=("person",))
    assert isinstance(source, InstanceMapSource)
    assert len(source) == 34
    for i in range(0, 34, 8):
        values = np.asarray(Image.open(source.map_path(i)))
        objects = source.instances(i)
        assert objects.masks is not None
        assert len(objects) == values.max() > 0
        assert objects.masks.shape[1:] == source.image(i).shape[1:]
        for number in range(1, values.max() + 1):
            rows, columns = np.nonzero(values == number)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert objects.boxes[number - 1].tolist() == expected
            assert objects.areas[number - 1] == len(rows) == objects.masks[number - 1].sum()
