"""What a finished run finds on photos without annotations, in files for other programs and in pictures for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et import detecting, segmenting
from mae_et.config import ConfigError, DetectConfig, SegmentConfig
from mae_et.config.kept import kept_config, kept_task, names_of, read_kept
from mae_et.data.decode import ImageError
from mae_et.data.files import FileSource
from mae_et.data.loader import batches_of, build_loader
from mae_et.data.outlines import mask_tools
from mae_et.data.photos import open_photos, result_names
from mae_et.data.replacing import BadImage
from mae_et.data.requests import SampleRequest
from mae_et.dense import DenseConfig
from mae_et.engine.checkpoint import latest_checkpoint
from mae_et.engine.distributed import Ranks, choose_device
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.evaluation.features import InOrder
from mae_et.evaluation.objects import FittedDataset, Found, find_in_batch
from mae_et.evaluation.segmentation import predict_scene
from mae_et.models.detection import Detector
from mae_et.models.segmentation import Segmenter
from mae_et.running import Say, choose_workers, prepare_device
from mae_et.supervised import BACKBONE_FILE, CLASSES_FILE, Start, kept_start
from mae_et.tracking.dense_panels import DrawnObjects, objects_picture, scene_picture
from mae_et.tracking.tracker import warn

PREDICTIONS_FILE = "predictions.json"
CHANGEABLE = ("evaluation.", "engine.", "data.workers=")
_EVERY = 10  # seconds between lines of progress

M = TypeVar("M", Detector, Segmenter)
C = TypeVar("C", DetectConfig, SegmentConfig)


@dataclass(frozen=True)
class Network(Generic[M]):
    """A run's network on its device, in evaluation mode, and the names of its classes."""

    model: M
    classes: tuple[str, ...]
    device: torch.device
    precision: Precision


@dataclass(frozen=True)
class Photos:
    """What is looked at, and where results go.

    Attributes:
        source: the photos.
        names: of the results of each, without an ending: its path inside the folder of photos.
        out: folder of the results.
        pictures: whether each photo is drawn.
        workers: of the loader.
        say: where progress goes.
    """

    source: FileSource
    names: tuple[str, ...]
    out: Path
    pictures: bool
    workers: int
    say: Say


def predict(
    run: str | Path,
    photos: str | Path,
    out: str | Path | None = None,
    score: float | None = None,
    pictures: bool = True,
    overrides: Sequence[str] = (),
    say: Say = print,
) -> int:
    """Look at photos with the network of a run: of its last checkpoint, the average where it keeps one.

    A detector's run gets `predictions.json` written, a segmenter's `classes.txt` and `masks/`: see `write_objects` and
    `write_classes`. Both get `pictures/`.

    Args:
        run: a folder with its config.yaml, backbone.json, classes.json and checkpoints/; the images that it was
            trained on and the checkpoint that it began with are not needed.
        photos: a folder, in whatever folders below it they lie; or an image; or a list (.txt), a path a line.
        out: where to; None is `predictions/` in the run's folder.
        score: least score of an object, in [0, 1]; None is the run's `evaluation.shown`.
        pictures: whether each photo is drawn with what is found on it.
        overrides: `key=value` changes of the run's `evaluation.*`, `engine.*` and `data.workers`.
        say: where progress goes.

    Returns:
        0, or 1 where photos could not be read: they are left out, with a warning each.

    Raises:
        ConfigError: the folder holds no such run, or nothing to look with; no photos; changes of anything else.
        CheckpointError: no checkpoint is valid.
    """
    folder, place = Path(run).expanduser(), Path(photos).expanduser()
    task = _task(folder)
    _check_changes(overrides)
    target = folder / "predictions" if out is None else Path(out).expanduser()
    if place.is_dir() and target.resolve().is_relative_to(place.resolve()):
        raise ConfigError(f"{target} lies in {place}: its pictures would be taken for photos; choose another --out")
    opened = partial(_photos, place, target, pictures, say)
    if task == "detect":
        config = kept_config(folder / "config.yaml", DetectConfig, overrides)
        # What is less certain need not be outlined; it changes nothing of what is more certain.
        config.evaluation.score = _least_score(config.evaluation.shown if score is None else score)
        if detecting.wants_masks(config):
            _check_mask_tools()
        return _with_network(folder, config, partial(detecting.build_model, config), opened, write_objects)
    if score is not None:
        raise ConfigError(f"--score is of detectors, and {folder} is a segmenter's run: leave it out")
    config = kept_config(folder / "config.yaml", SegmentConfig, overrides)
    return _with_network(folder, config, partial(segmenting.build_model, config), opened, write_classes)


def _task(folder: Path) -> str:
    file = folder / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{folder} holds no run: there is no {file}")
    task = kept_task(file)
    if task not in ("detect", "segment"):
        raise ConfigError(
            f"{folder} holds a {task} run, by its config.yaml: predict takes the runs of `python -m mae_et detect` and "
            "`python -m mae_et segment`"
        )
    return task


def _check_changes(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.startswith("evaluation.score="):
            raise ConfigError(f"{override}: give --score, the least score of what is written and drawn")
        if not override.startswith(CHANGEABLE):
            raise ConfigError(f"{override}: only evaluation.*, engine.* and data.workers of a finished run can change")


def _least_score(score: float) -> float:
    if not 0 <= score <= 1:
        raise ConfigError(f"--score {score} must be at least 0 and at most 1")
    return score


def _check_mask_tools() -> None:
    try:
        mask_tools()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _with_network(
    folder: Path,
    config: C,
    build_model: Callable[[Start, int, Say], M],
    opened: Callable[[int, C, Ranks], Photos],
    write: Callable[[C, Network[M], Photos], int],
) -> int:
    """Read what the run keeps, then open the photos, and only then the network, which takes longest."""
    prepare_device(config)
    ranks = Ranks(0, 1, choose_device(config.engine.device, 0))
    start = kept_start(RunFolder(folder, writes=False), ranks)
    if start is None:
        raise ConfigError(f"{folder / BACKBONE_FILE} is missing: put back the one that the run wrote")
    classes = read_kept(folder / CLASSES_FILE, names_of)
    photos = opened(start.backbone.channels, config, ranks)
    model = build_model(start, len(classes), lambda _line: None)
    checkpoint = latest_checkpoint(folder / "checkpoints", warn)
    if checkpoint is None:
        raise ConfigError(f"{folder} holds no checkpoint yet")
    try:
        model.load_state_dict(checkpoint.tensors.get("average", checkpoint.tensors["model"]))
    except RuntimeError as error:
        raise ConfigError(
            f"{checkpoint.path} is not of the network that {folder / 'config.yaml'} and the files beside it describe: "
            f"{error}"
        ) from None
    photos.say(f"{checkpoint.path}: {config.model.head} on {start.backbone.name}, {len(classes)} classes")
    precision = Precision.choose(config.engine.precision, ranks.device)
    choose_attention(model, precision)
    return write(config, Network(model.to(ranks.device).eval(), classes, ranks.device, precision), photos)


def _photos(
    place: Path, out: Path, pictures: bool, say: Say, channels: int, config: DenseConfig, ranks: Ranks
) -> Photos:
    try:
        source = open_photos(place, channels, config.data.max_pixels)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    return Photos(source, tuple(result_names(source.paths)), out, pictures, choose_workers(config, ranks), say)


def write_objects(config: DetectConfig, network: Network[Detector], photos: Photos) -> int:
    """Write `predictions.json`, and a picture of each photo.

    The file is a set in COCO's format: images, categories (from 1 on, in the order of the run's classes), and
    annotations with a `score`, each image's surest first. Annotation tools open it, training reads it, and its
    annotations are what COCO's tools call results. Outlines are compressed run lengths. `file_name` is the path in the
    folder of photos, or as the list has it.

    Returns:
        The exit code of `predict`.
    """
    how = detecting.examination(config, Ranks(0, 1, network.device))
    dataset = FittedDataset(photos.source, leave_out=True)
    sampler = InOrder(list(range(len(photos.source))), how.size, how.batch)
    loader = build_loader(dataset, sampler, photos.workers, network.device.type == "cuda")
    images, annotations, progress = [], [], Progress(photos)
    with batches_of(loader) as batches:
        for batch in batches:
            progress.left_out(batch.bad)
            sizes = dict(zip(batch.indices, batch.original))
            for index, everything in find_in_batch(network.model, batch, how.masks, network.device, network.precision):
                found = _finite(everything)
                height, width = sizes[index]
                file_name = photos.source.paths[index]
                images.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
                annotations += _annotations(found, index + 1, len(annotations) + 1)
                if photos.pictures:
                    image = photos.source.image(index).permute(1, 2, 0).numpy()
                    _save(objects_picture(image, _drawn(found), network.classes), photos, "pictures", index)
                progress.one_more()
    categories = [{"id": number, "name": name} for number, name in enumerate(network.classes, 1)]
    path = photos.out / PREDICTIONS_FILE
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_text_atomic(path, json.dumps(content))
    return progress.end(f"{len(annotations):,} objects of score {config.evaluation.score:g} and more: {path}")


def _finite(found: Found) -> Found:
    """What has numbers: JSON has no others."""
    finite = found.boxes.isfinite().all(1) & found.scores.isfinite()
    masks = None if found.masks is None else found.masks[finite]
    return Found(found.boxes[finite], found.scores[finite], found.labels[finite], masks)


def _annotations(found: Found, image: int, first: int) -> list[dict[str, Any]]:
    """Rows of COCO's annotations, numbered from `first` on."""
    boxes = found.boxes.double()  # in which differences of float32 corners are exact
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    areas = (boxes[:, 2] * boxes[:, 3]).tolist() if found.masks is None else found.masks.sum((1, 2)).tolist()
    rows = [
        {"id": number, "image_id": image, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": 0}
        for number, (label, box, area) in enumerate(zip(found.labels.tolist(), boxes.tolist(), areas), first)
    ]
    for row, score in zip(rows, found.scores.tolist()):
        row["score"] = score
    if found.masks is not None and rows:
        bitmaps = np.asfortranarray(found.masks.permute(1, 2, 0).numpy())
        for row, runs in zip(rows, mask_tools().encode(bitmaps)):
            row["segmentation"] = {"size": list(runs["size"]), "counts": runs["counts"].decode("ascii")}
    return rows


def _drawn(found: Found) -> DrawnObjects:
    masks = None if found.masks is None else found.masks.numpy()
    return DrawnObjects(found.boxes.numpy(), found.labels.numpy(), found.scores.numpy(), masks)


class Photo(NamedTuple):
    """An image uint8 [C, H, W] and its number; or why it cannot be read."""

    image: Tensor | None
    number: int
    bad: tuple[BadImage, ...] = ()


class PhotoByPhoto:
    """Turns a request into an image as it is."""

    def __init__(self, source: FileSource):
        self.source = source

    def __getitems__(self, requests: Sequence[SampleRequest]) -> Photo:
        (request,) = requests
        try:
            return Photo(self.source.image(request.image), request.image)
        except ImageError as error:
            return Photo(None, request.image, (BadImage(request.image, str(error)),))


def write_classes(config: SegmentConfig, network: Network[Segmenter], photos: Photos) -> int:
    """Write `masks/<photo>.png`, 8 bits with the number of each pixel's class, `classes.txt`, and pictures.

    Masks have the size and the name of their photo, so that data.source=pairs reads the two as a training set. Photos
    are shown as the run's configuration says, at several scales and mirrored where `evaluation.scales` and
    `evaluation.flip` do.

    Returns:
        The exit code of `predict`.
    """
    how = segmenting.many_scales(config) or segmenting.examination(config)
    sampler = InOrder(list(range(len(photos.source))), (1, 1), 1)
    loader = build_loader(PhotoByPhoto(photos.source), sampler, photos.workers, network.device.type == "cuda")
    write_text_atomic(photos.out / "classes.txt", "".join(f"{name}\n" for name in network.classes))
    progress = Progress(photos)
    with batches_of(loader) as batches:
        for photo in batches:
            progress.left_out(photo.bad)
            if photo.image is None:
                continue
            found = predict_scene(network.model, photo.image, how, network.device, network.precision).cpu().numpy()
            _save(Image.fromarray(found), photos, "masks", photo.number)
            if photos.pictures:
                image = photo.image.permute(1, 2, 0).numpy()
                _save(scene_picture(image, found, network.classes), photos, "pictures", photo.number)
            progress.one_more()
    return progress.end(f"classes of their pixels: {photos.out / 'masks'}")


def _save(picture: Image.Image, photos: Photos, kind: str, number: int) -> None:
    """Write a PNG by the name of a photo, all of it or nothing."""
    path = photos.out / kind / f"{photos.names[number]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that waits there
            picture.save(file, format="PNG")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Progress:
    """Counts photos, and says so every now and then."""

    def __init__(self, photos: Photos):
        self.photos, self.done, self.bad, self.said = photos, 0, 0, time.monotonic()

    def one_more(self) -> None:
        """Another photo is done."""
        self.done += 1
        if time.monotonic() - self.said > _EVERY:
            self.said = time.monotonic()
            self.photos.say(f"{self.done + self.bad:,} of {len(self.photos.source):,} photos")

    def left_out(self, bad: Sequence[BadImage]) -> None:
        """Name photos that cannot be read."""
        self.bad += len(bad)
        for image in bad:
            warn(f"left out: {image.error}")

    def end(self, what: str) -> int:
        """Say what came of it; returns the exit code."""
        left_out = f" ({self.bad:,} could not be read)" if self.bad else ""
        self.photos.say(f"{self.done:,} photos{left_out}; {what}")
        return 1 if self.bad else 0
