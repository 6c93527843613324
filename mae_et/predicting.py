"""What a finished run finds on photos without annotations, in files for other programs and in pictures for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_et import detecting, segmenting
from mae_et.config import ConfigError, DetectConfig, SegmentConfig
from mae_et.config.kept import kept_config, kept_task, names_of, read_kept
from mae_et.data.decode import ImageError
from mae_et.data.files import IMAGE_EXTENSIONS, FileSource
from mae_et.data.folders import walk_images
from mae_et.data.index import Watch
from mae_et.data.loader import batches_of, build_loader
from mae_et.data.outlines import mask_tools
from mae_et.data.replacing import BadImage
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import open_source
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
    if task == "detect":
        config = kept_config(folder / "config.yaml", DetectConfig, overrides)
        # What is less certain need not be pasted and written; it cannot change what is more certain.
        config.evaluation.score = _least_score(config.evaluation.shown if score is None else score)
        if detecting.wants_masks(config):
            _check_mask_tools()
        look = _open(folder, config, place, target, pictures, say)
        return write_objects(config, look, _restored(look, partial_build(detecting.build_model, config, look)))
    if score is not None:
        raise ConfigError(f"--score is of detectors, and {folder} is a segmenter's run: leave it out")
    config = kept_config(folder / "config.yaml", SegmentConfig, overrides)
    look = _open(folder, config, place, target, pictures, say)
    return write_classes(config, look, _restored(look, partial_build(segmenting.build_model, config, look)))
