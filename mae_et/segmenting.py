"""A run of semantic segmentation put together from its configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mae_et.config import ConfigError, SegmentConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.dense import SceneDataset
from mae_et.data.segmentation import SegmentationSource, hold_out_scenes, open_segmentation, segmentation_splits
from mae_et.data.segmentation_transforms import SceneTransform
from mae_et.dense import (
    AnnotatedImages,
    Parts,
    check_grain,
    dense_trunk,
    open_annotated,
    plan_dense,
    run_dense,
    size_of,
)
from mae_et.engine.dense_tasks import Segmentation
from mae_et.engine.distributed import Ranks, on_main
from mae_et.engine.meter import axes
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.evaluation.scenes import SegmentationObserver, draw_scenes, examine_segmenter, metrics
from mae_et.evaluation.segmentation import SceneExamination, SegmentationResult, worst_iou_table, write_iou_csv
from mae_et.examination import REPORT_FILE
from mae_et.models.segmentation import Segmenter, build_segmenter, segmenter_multiply_adds
from mae_et.running import Say, choose_workers
from mae_et.supervised import Start
from mae_et.tracking.tracker import Tracker

Images = AnnotatedImages[SegmentationSource]


def segment(
    config: SegmentConfig, resume: str = "auto", say: Say = print, only_evaluate: bool = False, until: float = 1.0
) -> int:
    """Train a segmenter, or continue to; see `dense.run_dense`."""
    return run_dense(config, parts(config), resume, say, only_evaluate, until)


def plan_segmentation(config: SegmentConfig) -> Plan:
    """The plan of a segmenter's run; see `dense.plan_dense`."""
    return plan_dense(config, parts(config))


def parts(config: SegmentConfig) -> Parts[SegmentationSource, Segmenter]:
    """What a segmenter's run is made of."""
    data = config.data
    try:
        scenes = SceneTransform((data.scale[0], data.scale[1]), data.category_share, data.flip, data.photometric)
    except ValueError as error:
        raise ConfigError(f"data.scale: {error}") from None
    return Parts(
        open_images=lambda channels, _say: open_scenes(config, channels),
        build_model=partial(build_model, config),
        multiply_adds=segmenter_multiply_adds,
        examined=partial(examined_sizes, config),
        dataset=lambda train: SceneDataset(train, scenes, replace=True),
        task=Segmentation(config.model.auxiliary),
        watch=partial(watch, config),
        conclude=partial(conclude, config),
    )


def open_scenes(config: SegmentConfig, channels: int) -> Images:
    """Open the splits.

    Raises:
        ConfigError: see `open_annotated`.
    """
    data = config.data

    def opened(root: Path, split: str, classes: tuple[str, ...]) -> SegmentationSource:
        names = classes if data.source == "pairs" and classes else data.names
        return open_segmentation(
            data.source, root, split, channels, data.max_pixels, names, data.masks, data.binary, data.ignore
        )

    return open_annotated(data, partial(segmentation_splits, data.source), opened, hold_out_scenes)


def build_model(config: SegmentConfig, start: Start, classes: int, say: Say) -> Segmenter:
    """The segmenter with its first weights, from torch's global generator.

    Raises:
        ConfigError, WeightsError: see `dense_trunk`; or a head that does not go with the network.
    """
    model = config.model
    trunk = dense_trunk(config, start, "map" if model.head == "linear" else "pyramid", say)
    window = examination(config).window
    if window is not None:
        check_grain("evaluation.window", window, trunk)
    try:
        return build_segmenter(
            trunk,
            model.head,
            classes,
            start.backbone.mean,
            start.backbone.std,
            channels=model.head_channels,
            norm="batch" if model.norm == "batch" else "group",
            auxiliary=model.auxiliary,
            dropout=model.dropout,
        )
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def examination(config: SegmentConfig) -> SceneExamination:
    """How scenes are shown for mIoU, at one scale.

    Raises:
        ConfigError: sizes or strides that do not go together.
    """
    testing = config.evaluation
    crop = size_of("data.size", config.data.size)
    whole = testing.window == "whole"
    window = None if whole else size_of("evaluation.window", testing.window, crop)
    steps = None if window is None else tuple(max(1, round(side * testing.stride)) for side in window)
    try:
        return SceneExamination(
            short=testing.short_side or min(crop),
            longest=testing.longest_side,
            window=window,
            stride=None if steps is None else (steps[0], steps[1]),
        )
    except ValueError as error:
        raise ConfigError(f"evaluation: {error}") from None


def examined_sizes(config: SegmentConfig, model: Segmenter) -> list[tuple[int, int]]:
    """Sizes in px that the trunk may see: the window, or for whole images an upright and a lying one."""
    how, grain = examination(config), model.trunk.grain
    if how.window is not None:
        return [how.window]
    short = -(-how.short // grain) * grain
    return [(short, short + grain), (short + grain, short)]


def many_scales(config: SegmentConfig) -> SceneExamination | None:
    """How scenes are shown at several scales, and mirrored; None where the configuration asks for neither.

    Raises:
        ConfigError: scales that are none.
    """
    testing = config.evaluation
    if tuple(testing.scales) == (1.0,) and not testing.flip:
        return None
    try:
        return replace(examination(config), scales=tuple(testing.scales), flip=testing.flip)
    except ValueError as error:
        raise ConfigError(f"evaluation.scales: {error}") from None


def watch(config: SegmentConfig, state: TrainState, images: Images, ranks: Ranks) -> list[SegmentationObserver]:
    """mIoU on held-out images during training, on all ranks; nothing where none are held out."""
    many_scales(config)  # refused before hours of training, if at all
    if images.val is None:
        return []
    pictures = RunFolder(config.run, writes=False).pictures if config.tracking.pictures else None
    testing, workers = config.evaluation, choose_workers(config, ranks)
    how = examination(config)
    return [SegmentationObserver(state, images.val, how, ranks, workers, testing.every, pictures, testing.drawn)]


def conclude(
    config: SegmentConfig,
    state: TrainState,
    plan: Plan,
    images: Images,
    ranks: Ranks,
    folder: RunFolder,
    tracker: Tracker,
    say: Say,
    again: bool = False,
) -> None:
    """Examine held-out and test images; write `report.json`, `per_class.csv` and a picture.

    The last two are of the test images, or of those held out where there is no test; these are also looked at with
    several scales and mirrored, where the configuration asks for it. A run that has its report is left as it is, unless
    `again`.
    """
    report_path = folder.path / REPORT_FILE
    if on_main(ranks, report_path.exists) and not again:
        say(f"examined before: {report_path}")
        return
    how, many, workers = examination(config), many_scales(config), choose_workers(config, ranks)
    sources = {name: part for name, part in (("val", images.val), ("test", images.test)) if part is not None}
    results = {name: examine_segmenter(state, source, how, ranks, workers) for name, source in sources.items()}
    if not results:
        return
    final = "test" if "test" in results else "val"
    scored = dict(results)
    if many is not None:
        scored[f"{final}_many_scales"] = examine_segmenter(state, sources[final], many, ranks, workers)
    if not ranks.is_main:
        return
    write_iou_csv(folder.path / "per_class.csv", results[final], images.classes)
    picture = folder.pictures / "scenes.png"
    draw_scenes(picture, state, sources[final], how, config.evaluation.drawn, f"{final}, step {state.step:,}")
    report = {"step": state.step, **{name: summary(result) for name, result in scored.items()}}
    write_text_atomic(report_path, json.dumps(report, indent=1))
    found = {key: value for name, result in scored.items() for key, value in metrics(name, result).items()}
    tracker.log({**axes(plan, state), **found}, state.step)
    tracker.images({f"{final}/scenes": picture}, state.step)
    for name, result in scored.items():
        say(
            f"{name.replace('_', ' ')}: mIoU {100 * result.miou:.2f} %, mean accuracy {100 * result.mean_accuracy:.2f} "
            f"%, pixel accuracy {100 * result.pixel_accuracy:.2f} % ({result.pixels:,} labelled pixels)"
        )
    say(worst_iou_table(results[final], images.classes))


def summary(result: SegmentationResult) -> dict[str, Any]:
    """The numbers of a report, in [0, 1]; null for classes that are absent."""
    return {
        "miou": result.miou,
        "mean_accuracy": result.mean_accuracy,
        "pixel_accuracy": result.pixel_accuracy,
        "iou": list(result.iou),
        "pixels": result.pixels,
    }
