"""A detector's run put together from its configuration."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mae_et.config import ConfigError, DetectConfig
from mae_et.curriculum.plan import Plan
from mae_et.data.dense import DetectionDataset
from mae_et.data.detection import DetectionSource, detection_splits, hold_out_images, open_detection
from mae_et.data.detection_transforms import JitterTransform
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
from mae_et.engine.dense_tasks import Detection
from mae_et.engine.distributed import Ranks, on_main
from mae_et.engine.meter import axes
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.evaluation.detection import (
    DetectionResult,
    PrecisionSummary,
    check_installed,
    worst_classes_table,
    write_coco_results,
    write_per_class_csv,
)
from mae_et.evaluation.objects import (
    DetectionExamination,
    DetectionObserver,
    draw_detections,
    examine_detector,
    metrics,
)
from mae_et.examination import REPORT_FILE
from mae_et.models.detection import Detector, build_detector, head_multiply_adds
from mae_et.models.retinanet import LEAST_STRIDE
from mae_et.models.trunk import trunk_multiply_adds
from mae_et.running import Say, choose_workers
from mae_et.supervised import Start
from mae_et.tracking.tracker import Tracker

Images = AnnotatedImages[DetectionSource]


def detect(
    config: DetectConfig, resume: str = "auto", say: Say = print, only_evaluate: bool = False, until: float = 1.0
) -> int:
    """Train a detector, or continue to; see `dense.run_dense`."""
    return run_dense(config, parts(config), resume, say, only_evaluate, until)


def plan_detection(config: DetectConfig) -> Plan:
    """The plan of a detector's run; see `dense.plan_dense`."""
    return plan_dense(config, parts(config))


def wants_masks(config: DetectConfig) -> bool:
    """Whether the configured head finds masks."""
    return "mask" in config.model.head


def parts(config: DetectConfig) -> Parts[DetectionSource, Detector]:
    """What a detector's run is made of."""
    try:
        jitter = JitterTransform((config.data.scale[0], config.data.scale[1]), config.data.flip)
    except ValueError as error:
        raise ConfigError(f"data.scale: {error}") from None
    return Parts(
        open_images=partial(open_objects, config),
        build_model=partial(build_model, config),
        multiply_adds=multiply_adds,
        examined=lambda _model: [examined_size(config)],
        dataset=lambda train: DetectionDataset(train, jitter, wants_masks(config), replace=True),
        task=Detection(),
        watch=partial(watch, config),
        conclude=partial(conclude, config),
    )


def open_objects(config: DetectConfig, channels: int, say: Say) -> Images:
    """Open the splits, and say what was left out of them.

    Raises:
        ConfigError: see `open_annotated`; where masks are wanted, a set without; or packages for AP are missing.
    """
    data = config.data
    try:
        check_installed()  # before hours of training that could not be scored
    except ValueError as error:
        raise ConfigError(str(error)) from None

    def opened(root: Path, split: str, classes: tuple[str, ...]) -> DetectionSource:
        return open_detection(data.source, root, split, channels, data.max_pixels, classes or data.names)

    images = open_annotated(data, partial(detection_splits, data.source), opened, hold_out_images)
    sources = [source for source in (images.train, images.val, images.test) if source is not None]
    for source in sources:
        if wants_masks(config) and not source.has_masks:
            instead = "cascade_rcnn" if "cascade" in config.model.head else "faster_rcnn"
            raise ConfigError(
                f"model.head={config.model.head} is for masks, and {source.name} has none: choose model.head={instead}"
            )
    for remark in dict.fromkeys(remark for source in sources for remark in source.remarks):
        say(remark)
    return images


def build_model(config: DetectConfig, start: Start, classes: int, say: Say) -> Detector:
    """The detector with its first weights, from torch's global generator.

    Raises:
        ConfigError, WeightsError: see `dense_trunk`.
    """
    model, testing = config.model, config.evaluation
    trunk = dense_trunk(config, start, "pyramid", say, LEAST_STRIDE if model.head == "retinanet" else 1)
    check_grain("evaluation.size", examined_size(config), trunk)
    return build_detector(
        trunk,
        model.head,  # pyright: ignore[reportArgumentType] - validated by the configuration
        classes,
        start.backbone.mean,
        start.backbone.std,
        box_head="conv" if model.box_head == "conv" else "mlp",
        representation=model.representation,
        mask_channels=model.mask_channels,
        samples=model.samples,
        anchor_scale=model.anchor_scale,
        detections=testing.most,
        score_threshold=testing.score,
        nms_threshold=testing.overlap,
    )


def multiply_adds(detector: Detector, size: tuple[int, int]) -> float:
    """Of a forward pass of one training image: exact in the network, an estimate in the head."""
    return trunk_multiply_adds(detector.trunk, size, len(detector.mean)) + head_multiply_adds(detector, size)


def examined_size(config: DetectConfig) -> tuple[int, int]:
    """(height, width) in px that images are fitted into: the training size, or `evaluation.size`."""
    return size_of("evaluation.size", config.evaluation.size, size_of("data.size", config.data.size))


def examination(config: DetectConfig, ranks: Ranks) -> DetectionExamination:
    """How images are shown for AP."""
    testing = config.evaluation
    workers = choose_workers(config, ranks)
    return DetectionExamination(
        examined_size(config), wants_masks(config), testing.batch, workers, testing.shown, testing.drawn
    )


def watch(config: DetectConfig, state: TrainState, images: Images, ranks: Ranks) -> list[DetectionObserver]:
    """AP on held-out images during training, on all ranks; nothing where none are held out."""
    if images.val is None:
        return []
    pictures = RunFolder(config.run, writes=False).pictures if config.tracking.pictures else None
    every = config.evaluation.every
    return [DetectionObserver(state, images.val, examination(config, ranks), ranks, every, pictures)]


def conclude(
    config: DetectConfig,
    state: TrainState,
    plan: Plan,
    images: Images,
    ranks: Ranks,
    folder: RunFolder,
    tracker: Tracker,
    say: Say,
    again: bool = False,
) -> None:
    """Examine held-out and test images; write `report.json`, `per_class.csv`, results in COCO's format and a picture.

    The last three are of the test images, or of those held out where there is no test. A run that has its report is
    left as it is, unless `again`.
    """
    report_path = folder.path / REPORT_FILE
    if on_main(ranks, report_path.exists) and not again:
        say(f"examined before: {report_path}")
        return
    how = examination(config, ranks)
    sources = {name: part for name, part in (("val", images.val), ("test", images.test)) if part is not None}
    tallies = {name: examine_detector(state, source, how, ranks) for name, source in sources.items()}
    if not ranks.is_main or not tallies:
        return
    results = {name: tally.result() for name, tally in tallies.items()}
    final = "test" if "test" in results else "val"
    source = sources[final]
    write_per_class_csv(folder.path / "per_class.csv", results[final], images.classes)
    for masks in (False, True) if how.masks else (False,):
        path = folder.path / f"{'masks' if masks else 'boxes'}.json"
        write_coco_results(path, tallies[final], source.image_ids, source.category_ids, masks)
    picture = folder.pictures / "detections.png"
    draw_detections(picture, state, source, how, f"{final}, step {state.step:,}")
    report = {"step": state.step, "size": list(how.size), **{name: summary(found) for name, found in results.items()}}
    write_text_atomic(report_path, json.dumps(report, indent=1))
    found = {key: value for name in results for key, value in metrics(name, results[name]).items()}
    tracker.log({**axes(plan, state), **found}, state.step)
    tracker.images({f"{final}/detections": picture}, state.step)
    for name, result in results.items():
        say(f"{name}: {in_words(result)} ({result.images:,} images, {result.objects:,} objects)")
    say(worst_classes_table(results[final], images.classes))


def summary(result: DetectionResult) -> dict[str, Any]:
    """The numbers of a report, in [0, 1]; null where there is no object to find."""
    return asdict(result)


def in_words(result: DetectionResult) -> str:
    """COCO's first numbers for people."""

    def words(found: PrecisionSummary) -> str:
        numbers = (("AP", found.ap), ("AP50", found.ap50), ("AP75", found.ap75))
        return ", ".join(f"{name} {'-' if value is None else f'{100 * value:.1f}'}" for name, value in numbers)

    boxes = f"boxes: {words(result.boxes)}"
    return boxes if result.masks is None else f"{boxes}; masks: {words(result.masks)}"
