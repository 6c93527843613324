"""COCO files: where they are found, what they say, and each kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.data.coco import CocoSource
from mae_et.data.decode import ImageError
from mae_et.data.detection import DetectionSubset, detection_splits, hold_out_images, open_detection
from mae_et.data.outlines import compress_counts

CATEGORIES = [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 70, "name": "bird"}]


def image_entry(identity: int, width: int = 12, height: int = 10) -> dict:
    return {"id": identity, "file_name": f"{identity}.png", "width": width, "height": height}


def box_entry(identity: int, image: int, category: int, box: list, **more) -> dict:
    return {"id": identity, "image_id": image, "category_id": category, "bbox": box, "area": 7.5, "iscrowd": 0, **more}


def content(**changes) -> dict:
    """Three images, the second without objects; boxes not in the images' order."""
    return {
        "images": [image_entry(30), image_entry(10), image_entry(20)],
        "categories": CATEGORIES,
        "annotations": [
            box_entry(1, 20, 9, [1, 2, 3, 4]),
            box_entry(2, 30, 70, [0, 0, 12, 10]),
            box_entry(3, 20, 4, [5.5, 1, 2, 2.25], iscrowd=1),
        ],
        **changes,
    }


def write(root: Path, data: dict | str, file: str = "train.json", folder: str = "train", images: bool = True) -> Path:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(data if isinstance(data, str) else json.dumps(data))
    (root / folder).mkdir(parents=True, exist_ok=True)
    if images and isinstance(data, dict):
        for entry in data["images"]:
            Image.new("RGB", (12, 10), (entry["id"], 0, 0)).save(root / folder / entry["file_name"])
    return root


def opened(root: Path, **changes) -> CocoSource:
    source = open_detection("coco", write(root, content(**changes)), "train")
    assert isinstance(source, CocoSource)
    return source


def refused(root: Path, data: dict | str) -> str:
    """The message, which names the file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at what it says
        open_detection("coco", write(root, data), "train")
    assert "train.json" in str(caught.value)
    return str(caught.value)


def test_objects_come_with_their_images_and_classes_without_gaps(tmp_path):
    source = opened(tmp_path)
    assert source.classes == ("dog", "cat", "bird")
    assert source.category_ids.tolist() == [4, 9, 70]
    assert source.image_ids.tolist() == [30, 10, 20]
    assert not source.has_masks
    assert source.remarks == ()
    assert [int(source.image(i)[0, 0, 0]) for i in range(3)] == [30, 10, 20]
    objects = source.instances(2)
    assert objects.boxes.tolist() == [[1, 2, 4, 6], [5.5, 1, 7.5, 3.25]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, True]
    assert objects.areas.tolist() == [7.5, 7.5]
    assert objects.masks is None
    kinds = [objects.boxes.dtype, objects.labels.dtype, objects.areas.dtype, objects.crowd.dtype]
    assert kinds == [torch.float32, torch.int64, torch.float32, torch.bool]
    assert source.instances(0).labels.tolist() == [2]
    assert source.instances(1).boxes.shape == (0, 4)


def test_what_a_reader_changes_stays_its_own(tmp_path):
    source = opened(tmp_path)
    source.instances(0).boxes.fill_(-1)
    assert source.instances(0).boxes.tolist() == [[0, 0, 12, 10]]


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("val.json", "val"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val.json", "images/val"),
        ("annotations/val.json", "images"),
        ("annotations/val.json", "val"),
        ("val/_annotations.coco.json", "val"),
        ("valid/_annotations.coco.json", "valid"),
    ],
)
def test_each_layout_is_found(tmp_path, file, folder):
    write(tmp_path, content(), file, folder)
    assert detection_splits("coco", tmp_path) == ("val",)
    source = open_detection("coco", tmp_path, "val")
    assert source.describe(0) == str(tmp_path / folder / "30.png")
    assert int(source.image(0)[0, 0, 0]) == 30
    with pytest.raises(ValueError, match=r"no COCO annotations of the split 'test'; looked for test\.json, .*of val$"):
        open_detection("coco", tmp_path, "test")


def test_annotations_without_their_folder_say_what_was_looked_for(tmp_path):
    write(tmp_path, content(), "annotations/train.json", "elsewhere")
    with pytest.raises(ValueError, match="looked for train, images/train, images in"):
        open_detection("coco", tmp_path, "train")


def test_a_second_split_takes_the_numbers_of_the_first(tmp_path):
    other = [{"id": 1, "name": "bird"}, {"id": 2, "name": "dog"}]
    annotations = [box_entry(1, 20, 1, [1, 2, 3, 4])]
    write(tmp_path, content(categories=other, annotations=annotations), "val.json", "val")
    source = open_detection("coco", tmp_path, "val", classes=("dog", "cat", "bird"))
    assert source.classes == ("dog", "cat", "bird")
    assert source.category_ids.tolist() == [2, -1, 1]
    assert source.instances(2).labels.tolist() == [2]
    with pytest.raises(ValueError, match=r"val\.json: its categories 'bird' are not among"):
        open_detection("coco", tmp_path, "val", classes=("dog", "cat"))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([-5, -5, 8, 9], [0, 0, 3, 4]),
        ([10, 8, 50, 50], [10, 8, 12, 10]),
        ([0.5, 0.5, 100, 1], [0.5, 0.5, 12, 1.5]),
    ],
)
def test_boxes_are_clipped_to_their_image(tmp_path, box, expected):
    source = opened(tmp_path, annotations=[box_entry(1, 20, 9, box, area=0)])
    objects = source.instances(2)
    assert objects.boxes.tolist() == [expected]
    left, top, right, bottom = expected
    assert objects.areas.item() == (right - left) * (bottom - top)  # none is stated
    assert source.remarks == ()


@pytest.mark.parametrize(
    "box", [[3, 3, 0, 4], [3, 3, 4, -1], [12, 0, 5, 5], [-9, 0, 9, 5], [0, float("nan"), 5, 5], [0, 0, float("inf"), 1],
            [10**400, 0, 3, 3]]
)  # fmt: skip
def test_boxes_without_area_in_the_image_are_left_out_with_a_remark(tmp_path, box):
    source = opened(tmp_path, annotations=[box_entry(1, 20, 9, [1, 1, 2, 2]), box_entry(77, 30, 9, box)])
    assert [len(source.instances(i)) for i in range(3)] == [0, 0, 1]
    (remark,) = source.remarks
    assert "train.json: 1 of 2 annotations are left out" in remark
    assert "annotation 77 of image 30" in remark
    assert "none of its 1 annotations has a box" in refused(tmp_path, content(annotations=[box_entry(77, 30, 9, box)]))


REFUSED = {
    "an unknown image": (content(annotations=[box_entry(5, 99, 9, [1, 1, 2, 2])]), "annotation 5 is of image 99"),
    "an unknown category": (content(annotations=[box_entry(5, 20, 1, [1, 1, 2, 2])]), "annotation 5 has category 1"),
    "an image twice": (content(images=[image_entry(20), image_entry(20)]), "two images have the id 20"),
    "a category twice": (content(categories=[CATEGORIES[0]] * 2), "two categories have the id 9"),
    "a name twice": (content(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "are named 'a'"),
    "no images": (content(images=[]), "lists no images"),
    "no objects": (content(annotations=[]), "lists no annotations"),
    "no key": ({"images": [image_entry(20)], "annotations": [{}]}, "has no list 'categories'"),
    "a list": ("[1, 2]", "is no COCO file"),
    "torn": (json.dumps(content())[:-20], "is truncated or damaged"),
    "not text": ("\x80\x81", "is truncated or damaged"),
    "too deep": ("[" * 100_000, "is truncated or damaged"),
    "no file name": (content(images=[{"id": 20, "width": 12, "height": 10}]), "image 20: 'file_name' should be a text"),
    "no width": (content(images=[{"id": 20, "file_name": "", "height": 9}]), "image 20: 'width' should be an integer"),
    "a width of 0": (content(images=[image_entry(20, width=0)]), "image 20 has a width of 0"),
    "an id of text": (content(images=[{**image_entry(20), "id": "20"}]), "'id' should be an integer, and is '20'"),
    "an image id of a list": (content(annotations=[box_entry(5, [], 9, [1, 1, 2, 2])]), "annotation 5: 'image_id'"),
    "no box": (content(annotations=[{"id": 5, "image_id": 20, "category_id": 9}]), "annotation 5: 'bbox' should be"),
    "three numbers": (content(annotations=[box_entry(5, 20, 9, [1, 1, 2])]), "annotation 5: 'bbox' should be"),
    "no object": (content(annotations=[17]), "annotation 1 of the list: 'image_id' should be an integer"),
    "a mask of another size": (
        content(annotations=[box_entry(5, 20, 9, [1, 1, 2, 2], segmentation={"size": [12, 10], "counts": [120]})]),
        "annotation 5 of image 20: its mask is of size [12, 10], its image of [height, width] = [10, 12]",
    ),
    "counts that do not add up": (
        content(annotations=[box_entry(5, 20, 9, [1, 1, 2, 2], segmentation={"size": [10, 12], "counts": [119]})]),
        "annotation 5 of image 20: its mask's counts add up to 119",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trusted_is_refused_by_name(tmp_path, what):
    data, expected = REFUSED[what]
    (tmp_path / "train").mkdir()
    for identity in (10, 20, 30):
        Image.new("RGB", (12, 10)).save(tmp_path / "train" / f"{identity}.png")
    (tmp_path / "train.json").write_text(data if isinstance(data, str) else json.dumps(data), encoding="latin-1")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        open_detection("coco", tmp_path, "train")
    assert "train.json" in str(caught.value)
    assert expected in str(caught.value)


def test_missing_images_are_remarked_and_unreadable_and_all_missing_are_refused(tmp_path):
    source = opened(tmp_path)
    (tmp_path / "train" / "10.png").unlink()
    source = open_detection("coco", tmp_path, "train")
    assert source.remarks == (
        f"1 of the 3 images of {tmp_path / 'train.json'} are not in {tmp_path / 'train'}: '10.png'",
    )
    with pytest.raises(ImageError, match=r"10\.png: cannot be read"):
        source.image(1)
    for name in ("20.png", "30.png"):
        (tmp_path / "train" / name).unlink()
    with pytest.raises(ValueError, match=r"none of the 3 images that .*train\.json lists is in .*'30\.png', '10\.png'"):
        open_detection("coco", tmp_path, "train")


def test_an_image_of_another_size_than_stated_is_an_image_error(tmp_path):
    source = opened(tmp_path)
    Image.new("RGB", (24, 20)).save(tmp_path / "train" / "20.png")
    with pytest.raises(ImageError, match=r"20\.png: it is 24 x 20 px, but .*train\.json says 12 x 10 px"):
        source.image(2)
    Image.new("RGB", (10, 12)).save(tmp_path / "train" / "20.png")  # turned, but not by EXIF
    with pytest.raises(ImageError, match="it is 10 x 12 px"):
        source.image(2)


@pytest.mark.parametrize("turned", [5, 6, 7, 8])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_a_turn_by_exif_is_undone_where_the_file_was_annotated_as_stored(tmp_path, turned, extension):
    values = np.linspace(0, 250, 16 * 24).reshape(16, 24).astype(np.uint8)  # smooth, so that JPEG keeps it
    exif = Image.Exif()
    exif[0x0112] = turned
    (tmp_path / "train").mkdir()
    stored = Image.fromarray(values).convert("RGB")
    stored.save(tmp_path / "train" / f"20.{extension}", exif=exif, quality=100)
    entry = {"id": 20, "file_name": f"20.{extension}"}
    annotations = [box_entry(1, 20, 9, [1, 1, 2, 2])]
    for width, height in ((24, 16), (16, 24)):
        data = content(images=[{**entry, "width": width, "height": height}], annotations=annotations)
        source = open_detection("coco", write(tmp_path, data, images=False), "train")
        image = source.image(0)
        assert image.shape == (3, height, width)
        if width == 24:
            # JPEG's own loss; a wrong turn is off by 100.
            assert np.abs(image[0].numpy().astype(int) - values).max() <= 3


def test_compressed_counts_are_those_of_cocos_own_code():
    tools = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(0, generator.choice([2, 40, 5000]), generator.integers(1, 30)).tolist()
        size = [sum(lengths), 1]
        assert compress_counts(lengths) == tools.frPyObjects({"size": size, "counts": lengths}, *size)["counts"]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools 2.0.11 on NumPy 2
def test_polygons_and_run_lengths_are_drawn_as_by_pycocotools(tmp_path):
    tools = pytest.importorskip("pycocotools.mask")
    pytest.importorskip("faster_coco_eval")
    generator = np.random.default_rng(1)
    bits = np.asfortranarray(generator.random((10, 12)) < 0.5).astype(np.uint8)
    runs = tools.encode(bits)
    changes = np.flatnonzero(np.diff(bits.ravel(order="F"))) + 1
    lengths = [0] * int(bits[0, 0]) + np.diff(np.r_[0, changes, bits.size]).tolist()  # the first run is of zeros
    rings = [np.round(generator.uniform(-2, 13, 10), 2).tolist() for _ in range(2)]
    outlines = [
        [rings[0]],
        rings,
        {"size": [10, 12], "counts": runs["counts"].decode()},
        {"size": [10, 12], "counts": lengths},
    ]
    expected = [
        tools.decode(tools.merge(tools.frPyObjects([rings[0]], 10, 12))),
        tools.decode(tools.merge(tools.frPyObjects(rings, 10, 12))),
        bits,
        bits,
    ]
    boxes = [box_entry(k + 1, 20, 9, [1, 1, 5, 5], segmentation=outline) for k, outline in enumerate(outlines)]
    source = opened(tmp_path, annotations=boxes)
    assert source.has_masks
    masks = source.instances(2).masks
    assert masks is not None
    assert masks.dtype == torch.uint8
    np.testing.assert_array_equal(masks.numpy(), np.stack(expected))
    assert source.instances(2, masks=False).masks is None
    empty = source.instances(1).masks
    assert empty is not None
    assert empty.shape == (0, 10, 12)


@pytest.mark.parametrize(
    "outline",
    [None, [], [[1, 1, 4, 4]], [[1, 1, 4, 4, 2]], [[0, 0, 1e9, 0, 5, 5]], [[0, 0, float("nan"), 0, 5, 5]], "?"],
)
def test_an_object_without_usable_outline_is_a_crowd_where_masks_are_asked_for(tmp_path, outline):
    pytest.importorskip("faster_coco_eval")
    good = box_entry(1, 20, 9, [1, 1, 4, 4], segmentation=[[1, 1, 5, 1, 5, 5, 1, 5]])
    source = opened(tmp_path, annotations=[good, box_entry(2, 20, 4, [6.5, 2, 3, 4], segmentation=outline)])
    objects = source.instances(2)
    assert objects.crowd.tolist() == [False, True]
    assert objects.masks is not None
    assert objects.masks[0].nonzero().min(0).values.tolist() == [1, 1]
    assert objects.masks[1].sum() == 4 * 4  # pixels 6 to 9, rows 2 to 5
    assert source.instances(2, masks=False).crowd.tolist() == [False, False]
    (remark,) = source.remarks
    assert "1 of 2 annotations have no usable outline" in remark
    assert "annotation 2 of image 20" in remark


def test_without_any_outline_there_are_no_masks_and_no_remark(tmp_path):
    source = opened(tmp_path, annotations=[box_entry(1, 20, 9, [1, 1, 4, 4], segmentation=[])])
    assert (source.has_masks, source.remarks, source.instances(2).masks) == (False, (), None)


@pytest.mark.parametrize("counts", ["", "zzzzzz", "04", "~~~~~~~~~~~~~~~~~~", "000000P"])
def test_damaged_run_lengths_are_the_image_s_error(tmp_path, counts):
    pytest.importorskip("faster_coco_eval")
    outline = {"size": [10, 12], "counts": counts}
    source = opened(tmp_path, annotations=[box_entry(1, 20, 9, [1, 1, 4, 4], segmentation=outline)])
    with pytest.raises(ImageError, match=r"20\.png: a mask in .*train\.json is damaged"):
        source.instances(2)
    assert len(source.instances(2, masks=False)) == 1


def test_masks_of_more_pixels_than_allowed_are_never_made(tmp_path):
    outline = {"size": [10**6, 10**6], "counts": [10**12]}
    data = content(
        images=[image_entry(20, 10**6, 10**6)], annotations=[box_entry(1, 20, 9, [1, 1, 4, 4], segmentation=outline)]
    )
    pytest.importorskip("faster_coco_eval")
    source = open_detection("coco", write(tmp_path, data), "train")
    with pytest.raises(ImageError, match=r"20\.png: too many pixels"):
        source.instances(0)


def test_held_out_images_depend_on_count_share_and_seed_alone(tmp_path):
    images = [image_entry(i) for i in range(1, 41)]
    source = opened(tmp_path, images=images, annotations=[box_entry(1, 20, 9, [1, 2, 3, 4])])
    kept, held = hold_out_images(source, 0.25, 7)
    assert (len(kept), len(held)) == (30, 10)
    assert sorted([*kept.indices, *held.indices]) == list(range(40))
    # Pinned: a run that is resumed with another release must hold out the same images.
    assert held.indices.tolist() == [2, 5, 9, 10, 12, 15, 18, 20, 28, 29]
    assert set(held.indices) < set(hold_out_images(source, 0.5, 7)[1].indices)
    assert held.indices.tolist() != hold_out_images(source, 0.25, 8)[1].indices.tolist()
    assert [len(part) for part in hold_out_images(source, 0.001, 0)] == [39, 1]
    assert [len(part) for part in hold_out_images(source, 0.999, 0)] == [1, 39]
    with pytest.raises(ValueError, match="not between 0 and 1"):
        hold_out_images(source, 1.0, 0)
    with pytest.raises(ValueError, match="nothing to hold out"):
        hold_out_images(DetectionSubset(source, np.array([3])), 0.5, 0)


def test_a_subset_numbers_its_images_anew(tmp_path):
    source = opened(tmp_path)
    part = DetectionSubset(source, np.array([2, 0]), "part")
    assert (len(part), part.name, part.classes, part.has_masks) == (2, "part", source.classes, False)
    assert part.image_ids.tolist() == [20, 30]
    assert int(part.image(0)[0, 0, 0]) == 20
    assert part.instances(0).labels.tolist() == [1, 0]
    assert part.describe(1) == source.describe(0)
    with pytest.raises(IndexError):
        part.image(2)


def test_an_unknown_kind_and_a_missing_root_are_named(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'coco'"):
        open_detection("coc", tmp_path, "train")
    with pytest.raises(ValueError, match="is not a folder"):
        open_detection("coco", tmp_path / "nowhere", "train")


def test_blood_cells_are_read_as_they_are(shared_data):
    counts = {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}
    assert detection_splits("coco", shared_data / "bccd") == tuple(counts)
    for split, (images, objects) in counts.items():
        source = open_detection("coco", shared_data / "bccd", split)
        stated = json.loads((shared_data / "bccd" / f"{split}.json").read_text())
        assert source.classes == ("Platelets", "RBC", "WBC")
        assert len(source) == images
        assert sum(len(source.instances(i)) for i in range(images)) + _left_out(source) == objects
        first = [a for a in stated["annotations"] if a["image_id"] == stated["images"][5]["id"]]
        left, top, width, height = np.array([a["bbox"] for a in first]).T
        expected = np.stack([left, top, np.minimum(left + width, 640), np.minimum(top + height, 480)], axis=1)
        np.testing.assert_array_equal(source.instances(5).boxes.numpy(), expected)
        assert source.image(5).shape == (3, 480, 640)


def _left_out(source) -> int:
    return sum(int(remark.split(": ")[1].split()[0]) for remark in source.remarks)
