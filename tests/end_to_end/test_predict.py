"""Finished runs look at photos without annotations, from their own folder alone."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mae_et.__main__ import main
from mae_et.config import ConfigError, SegmentConfig
from mae_et.config.kept import kept_config
from mae_et.data.detection import open_detection
from mae_et.data.files import FileSource
from mae_et.data.photos import open_photos, result_names
from mae_et.data.segmentation import open_segmentation
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.engine.distributed import Ranks
from mae_et.engine.run_folder import RunFolder
from mae_et.evaluation.segmentation import predict_scene
from mae_et.predicting import predict
from mae_et.segmenting import build_model, examination
from mae_et.supervised import kept_start
from tests.end_to_end.annotated import CLASSES, detect_here, segment_here, write_objects


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs with all that they came from gone, and the photos of their test: {"detect", "segment", "photos"}."""
    base = tmp_path_factory.mktemp("trained")
    images = write_objects(base / "images")
    changes = ["evaluation.every=null", "optim.ema=0.5", "tracking.pictures=false"]
    detect_here(images, base / "detect", *changes)
    parent = shutil.copytree(base / "detect", base / "parent")
    changes += [f"checkpoint={parent}", "model.name=null", "model.head=linear", "optim.lr=1e-2", "steps=16"]
    segment_here(images, base / "segment", *changes)
    shutil.copytree(images / "test" / "images", base / "photos")
    shutil.rmtree(images)
    shutil.rmtree(parent)
    return base


@pytest.fixture
def photos(trained, tmp_path):
    """A copy, to add to."""
    return shutil.copytree(trained / "photos", tmp_path / "photos")


def look(run, photos, out, *changes, score=None, pictures=False):
    return predict(run, photos, out, score, pictures, changes, say=lambda _line: None)


def found(out):
    return json.loads((out / "predictions.json").read_text())


def test_a_detector_finds_what_its_run_found(trained, tmp_path):
    """Those of the run's own files, of its average, in the order of the files' names."""
    assert look(trained / "detect", trained / "photos", tmp_path / "out", score=0.05) == 0
    content = found(tmp_path / "out")
    assert [image["file_name"] for image in content["images"]] == [f"{number:02}.png" for number in range(4)]
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    for image in content["images"]:
        with Image.open(trained / "photos" / image["file_name"]) as photo:
            assert (image["width"], image["height"]) == photo.size
    for name, key in (("boxes", "bbox"), ("masks", "segmentation")):
        expected = json.loads((trained / "detect" / f"{name}.json").read_text())
        assert len(expected) > 4
        expected = [(row["image_id"], {3: 1, 7: 2}[row["category_id"]], row["score"], row[key]) for row in expected]
        rows = [(row["image_id"], row["category_id"], row["score"], row[key]) for row in content["annotations"]]
        assert rows == expected
    assert [row["id"] for row in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))


def test_training_reads_what_a_detector_wrote(trained, tmp_path):
    assert look(trained / "detect", trained / "photos", tmp_path, score=0.05) == 0
    shutil.copytree(trained / "photos", tmp_path / "train")
    (tmp_path / "predictions.json").rename(tmp_path / "train.json")
    source = open_detection("coco", tmp_path, "train")
    rows = json.loads((tmp_path / "train.json").read_text())["annotations"]
    for number in range(4):
        objects = source.instances(number)
        mine = [row for row in rows if row["image_id"] == number + 1 and row["bbox"][2] > 0 < row["bbox"][3]]
        assert len(objects.boxes) == len(mine) > 0
        assert objects.masks is not None
        assert objects.masks.sum((1, 2)).tolist() == [row["area"] for row in mine]


def test_the_score_is_a_threshold(trained, tmp_path):
    scores = []
    for name, least in (("all", 0.05), ("default", None), ("sure", None)):
        changes = ["evaluation.shown=0.3"] if name == "sure" else []
        look(trained / "detect", trained / "photos", tmp_path / name, *changes, score=least)
        scores.append([row["score"] for row in found(tmp_path / name)["annotations"]])
    assert scores[1:] == [[s for s in scores[0] if s >= least] for least in (0.5, 0.3)]
    assert 0 < len(scores[2]) < len(scores[0])


def test_a_segmenters_masks_are_its_predictions(trained, tmp_path):
    assert look(trained / "segment", trained / "photos", tmp_path) == 0
    folder = trained / "segment"
    config = kept_config(folder / "config.yaml", SegmentConfig)
    start = kept_start(RunFolder(folder, writes=False), Ranks(0, 1, torch.device("cpu")))
    assert start is not None
    model = build_model(config, start, 3, lambda _line: None).eval()
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    model.load_state_dict(checkpoint.tensors["average"])
    source = FileSource("test", trained / "photos", [f"{number:02}.png" for number in range(4)])
    seen = set()
    for number in range(4):
        expected = predict_scene(model, source.image(number), examination(config), "cpu").numpy()
        with Image.open(tmp_path / "masks" / f"{number:02}.png") as mask:
            assert mask.mode == "L"
            assert np.array_equal(np.array(mask), expected)
        seen |= set(np.unique(expected))
    assert len(seen) > 1
    assert not (tmp_path / "pictures").exists()


def test_training_reads_what_a_segmenter_wrote(trained, tmp_path):
    """Masks have the names of their photos, in whatever folders they lie."""
    photos = tmp_path / "images"
    shutil.copytree(trained / "photos", photos / "a" / "b")
    Image.new("L", (40, 30), 120).save(photos / "grey.jpg")
    assert look(trained / "segment", photos, tmp_path / "out") == 0
    shutil.move(tmp_path / "out" / "masks", tmp_path)
    shutil.move(tmp_path / "out" / "classes.txt", tmp_path)
    source = open_segmentation("pairs", tmp_path, "train", 3)
    assert source.classes == ("wall", *CLASSES)
    assert [source.mask(i).shape == source.image(i).shape[1:] for i in range(len(source))] == [True] * 5


@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_unreadable_photos_are_left_out(kind, trained, photos, tmp_path, capsys):
    """A whole batch of them, too; the command's exit code tells."""
    for number in range(4):
        (photos / f"0-{number}.jpg").write_bytes(b"no photo")
    (photos / "05.png").write_bytes((photos / "00.png").read_bytes()[:300])
    out = tmp_path / "out"
    assert main(["predict", str(trained / kind), str(photos), "--out", str(out), "data.workers=1"]) == 1
    said = capsys.readouterr()
    assert [line.split(":")[1] for line in said.err.splitlines() if line.startswith("warning")] == [" left out"] * 5
    assert str(photos / "05.png") in said.err
    assert "4 photos (5 could not be read)" in said.out
    assert len(list((out / "pictures").iterdir())) == 4
    if kind == "detect":
        assert [image["id"] for image in found(out)["images"]] == [5, 6, 7, 8]
    else:
        assert len(list((out / "masks").iterdir())) == 4


@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_pictures(kind, trained, tmp_path):
    """Of the photo's own size where that is not large; grey photos are drawn in colours."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("L", (2000, 1000), 90).save(photos / "large.png")
    with Image.open(trained / "photos" / "01.png") as photo:
        photo.convert("L").save(photos / "small.tiff")
        size = photo.size
    assert look(trained / kind, photos, tmp_path / "out", score=0.05 if kind == "detect" else None, pictures=True) == 0
    for name, expected in (("small", size), ("large", (1600, 800))):
        with Image.open(tmp_path / "out" / "pictures" / f"{name}.png") as picture:
            assert picture.mode == "RGB"
            pixels = np.array(picture)
        width, height = expected
        assert pixels.shape[1] >= width
        assert pixels.shape[0] >= height
        if kind == "detect":
            assert pixels.shape[:2] == (height, width)
            assert (np.ptp(pixels.astype(int), axis=2) > 0).any() == any(
                row["image_id"] == (2 if name == "small" else 1) for row in found(tmp_path / "out")["annotations"]
            )
        else:
            with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as mask:
                assert mask.size == (size if name == "small" else (2000, 1000))
            assert (np.ptp(pixels[:height, :width].astype(int), axis=2) > 0).mean() > 0.5


def test_one_photo_and_a_list(trained, tmp_path):
    photo = trained / "photos" / "01.png"
    assert look(trained / "detect", photo, tmp_path / "one") == 0
    assert [image["file_name"] for image in found(tmp_path / "one")["images"]] == ["01.png"]
    (tmp_path / "list.txt").write_text(f"{photo}\n{photo}\n")
    assert look(trained / "segment", tmp_path / "list.txt", tmp_path / "many") == 0
    masks = sorted(path.relative_to(tmp_path / "many").as_posix() for path in (tmp_path / "many").rglob("*.png"))
    stem = str(photo.with_suffix("")).lstrip("/")
    assert masks == [f"masks/{stem}.png", f"masks/{stem}.png.png"]


def test_names_of_results():
    paths = ["a/1.jpg", "a/1.png", "../1.jpg", "/1.jpg", "1.jpg", "b.c/2.x.jpg", ".."]
    assert list(result_names(paths)) == ["a/1", "a/1.png", "1", "1.jpg", "1.jpg-2", "b.c/2.x", "."]


def test_folders_named_as_splits_are_folders(trained, tmp_path):
    for name in ("train", "val/deep", "mine"):
        shutil.copytree(trained / "photos", tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert len(open_photos(tmp_path)) == 12


def test_changes_may_follow_options(trained, tmp_path):
    """And results go into the run's folder, where nothing else is said."""
    line = ["predict", str(trained / "detect"), str(trained / "photos"), "--no-pictures", "--score", "0.05"]
    assert main([*line, "evaluation.size=64"]) == 0
    default = found(trained / "detect" / "predictions")
    assert not (trained / "detect" / "predictions" / "pictures").exists()
    look(trained / "detect", trained / "photos", tmp_path / "64", "evaluation.size=64", score=0.05)
    look(trained / "detect", trained / "photos", tmp_path / "32", score=0.05)
    assert default == found(tmp_path / "64")
    assert default != found(tmp_path / "32")
    with pytest.raises(SystemExit):
        main([*line, "--no-such-option"])
    with pytest.raises(SystemExit):
        main(["export", "x", "--to", "timm", "a=b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.head=retinanet"], r"model\.head=retinanet: only evaluation\.\*, engine\.\* and data\.workers"),
        (["data.size=64"], r"data\.size=64: only"),
        (["evaluation.score=0.2"], "give --score"),
        (["evaluation.size=40"], "sides must be multiples of 32 px"),
        (["evaluation.sise=64"], "sise"),
    ],
)
def test_it_refuses_changes(changes, message, trained, tmp_path):
    with pytest.raises(ConfigError, match=message):
        look(trained / "detect", trained / "photos", tmp_path, *changes)


def test_it_refuses(trained, tmp_path):
    run, photos = trained / "detect", trained / "photos"
    (tmp_path / "empty").mkdir()
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.yaml").write_text("run: x\nseed: 0\n")
    copies = {name: shutil.copytree(run, tmp_path / name) for name in ("unsaved", "nameless", "other")}
    shutil.rmtree(copies["unsaved"] / "checkpoints")
    (copies["nameless"] / "backbone.json").unlink()
    (copies["other"] / "classes.json").write_text('["one"]')
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((run, tmp_path / "empty"), "no photos in"),
        ((run, tmp_path / "nothing"), "does not exist"),
        ((tmp_path / "empty", photos), "holds no run"),
        ((tmp_path / "pretrained", photos), "holds a pretrain run"),
        ((copies["unsaved"], photos), "holds no checkpoint"),
        ((copies["nameless"], photos), r"backbone\.json is missing"),
        ((copies["other"], photos), "is not of the network"),
        ((run, photos, photos / "out"), "would be taken for photos"),
        ((run, photos, tmp_path / "out", 1.5), "--score 1.5 must be"),
        ((trained / "segment", photos, tmp_path / "out", 0.5), "is of detectors"),
    ]
    for arguments, message in refused:
        with pytest.raises(ConfigError, match=message):
            predict(*arguments)
