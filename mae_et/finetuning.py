"""A run on labels put together from its configuration: fine-tuning, or supervised training from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from mae_et import supervised
from mae_et.calibration import calibration_records, settle_calibration
from mae_et.config import ConfigError, FinetuneConfig
from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.time_table import time_table
from mae_et.data.augment import TrainTransform
from mae_et.data.loader import RequestDataset
from mae_et.engine.distributed import Ranks
from mae_et.engine.optim import supervised_groups
from mae_et.engine.run_folder import RunFolder
from mae_et.engine.selection import choose_selection, selected
from mae_et.engine.state import TrainState
from mae_et.engine.tasks import Classification
from mae_et.evaluation.accuracy import AccuracyObserver, Examination
from mae_et.examination import conclude
from mae_et.exchange.backbone import Backbone
from mae_et.exchange.matching import load_weights
from mae_et.labelled import LabelledImages, open_labelled
from mae_et.labelled_plan import build_plan, examination_size
from mae_et.models.backbones import scaled_drop_path
from mae_et.models.classifier import Classifier, head_name, reset_head
from mae_et.planning import trial_config
from mae_et.running import (
    Assembly,
    Say,
    choose_workers,
    downsample_on_device,
    execute,
    loop_config,
    main_first,
)
from mae_et.supervised import Start, kept_start, records, settle_start


def drop_path(config: FinetuneConfig, epochs: float | None = None) -> float:
    """`model.drop_path`, in proportion to the budget where `model.drop_path_epochs` says for which it is meant.

    Args:
        config: of the run.
        epochs: of its plan; None takes `epochs` of the configuration.
    """
    reference = config.model.drop_path_epochs
    if reference is None:
        return config.model.drop_path
    return scaled_drop_path(config.model.drop_path, epochs or config.epochs, reference)


def build_transform(config: FinetuneConfig, backbone: Backbone) -> TrainTransform:
    """Crop, flip, RandAugment and erasing in the worker.

    Raises:
        ConfigError: empty ranges of scale or ratio.
    """
    data, augment = config.data, config.augment
    try:
        return TrainTransform(
            backbone.size,
            data.downsample,
            scale=(data.scale[0], data.scale[1]),
            ratio=(data.ratio[0], data.ratio[1]),
            flip=data.flip,
            randaugment=augment.randaugment,
            magnitude_std=augment.magnitude_std,
            staircase=augment.staircase,
            erasing=augment.erasing,
            mean=backbone.mean,
            std=backbone.std,
        )
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def build_model(
    config: FinetuneConfig, start: Start, classes: int, say: Say = print, epochs: float | None = None
) -> Classifier:
    """The classifier with its first weights: the checkpoint's under a new head, or timm's own.

    Args:
        config, start: of the run.
        classes: of the head.
        say: where the report on weights goes.
        epochs: of the plan, for drop path; None takes those of the configuration.

    Raises:
        ConfigError, WeightsError: the network cannot be built, or the checkpoint does not fit it.
    """
    torch.manual_seed(config.seed)
    pooling = "cls" if config.model.pooling == "cls" else "mean"
    net = start.backbone.build(classes, pooling, drop_path(config, epochs))
    if start.weights is not None:
        reset_head(net, config.model.head_std)
        say(load_weights(net, start.weights, fresh=("fc_norm.", f"{head_name(net)}.")).text())
    return Classifier(net, start.backbone.mean, start.backbone.std)


def build_state(config: FinetuneConfig, model: Classifier, ranks: Ranks) -> TrainState:
    """Optimizer, average and number format, on this rank's device."""
    optim = config.optim
    groups = partial(supervised_groups, model.net, optim.weight_decay, optim.layer_decay)
    return supervised.build_state(config, model, model.net, groups, ranks)


def build_task(config: FinetuneConfig, classes: int) -> Classification:
    """Cross-entropy with the configured mixing and smoothing."""
    augment = config.augment
    return Classification(
        classes=classes,
        downsample=downsample_on_device(config.data.downsample),
        seed=config.seed,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        probability=augment.mix_probability,
        switch=augment.switch_probability,
        smoothing=augment.smoothing,
    )


def examination(config: FinetuneConfig, backbone: Backbone, workers: int) -> Examination:
    """How images are shown for accuracy."""
    testing = config.evaluation
    size = examination_size(config, backbone)
    return Examination(size, testing.crop_fraction, testing.batch, workers, testing.follow_stage)


def finetune(
    config: FinetuneConfig,
    resume: str = "auto",
    say: Say = print,
    only_evaluate: bool = False,
    until: float = 1.0,
    images: LabelledImages | None = None,
) -> int:
    """Run, or continue, a run on labels; `running.execute` documents the rest.

    Args:
        config: of the run.
        resume, say, until: see `running.execute`.
        only_evaluate: examine the run's last checkpoint, and train nothing.
        images: in place of those that `config.data` names.
    """
    given = images

    def assemble(folder: RunFolder, ranks: Ranks, resuming: bool) -> Assembly:
        start = settle_start(config, kept_start(folder, ranks) if resuming else None)
        with main_first(ranks):
            images = open_labelled(config.data, start.backbone.channels) if given is None else given
        quiet = say if ranks.is_main else lambda _line: None
        again = partial(rehearse, config, start.backbone, images)
        calibration = settle_calibration(config, folder, ranks, resuming, again, quiet)
        return assemble_labelled(config, start, images, folder, ranks, quiet, calibration)

    return execute(config, assemble, resume, say, only_evaluate, until)


def rehearse(
    config: FinetuneConfig, backbone: Backbone | None, images: LabelledImages | None, ranks: Ranks
) -> Assembly:
    """The configured run with an endless plan and random weights, to time its steps.

    Args:
        config: of the run.
        backbone, images: its network and images; None opens them.
        ranks: of the run.
    """
    backbone = backbone or settle_start(config).backbone
    if images is None:
        with main_first(ranks):
            images = open_labelled(config.data, backbone.channels)
    trial, classes = trial_config(config), len(images.classes)
    # Drop path in proportion to an endless budget would drop all; how much it drops costs no time.
    trial.model = replace(trial.model, drop_path_epochs=None)
    return Assembly(
        title=f"{backbone.name} on {images.train.name}",
        plan=build_plan(trial, backbone, len(images.train), classes, ranks.count),
        dataset=RequestDataset(images.train, build_transform(config, backbone), replace=True),
        task=build_task(config, classes),
        state=build_state(config, build_model(trial, Start(backbone, None, None), classes), ranks),
        observers=[],
        loop=loop_config(config, config.protocol, ranks, config.optim.accumulation, config.optim.clip),
        repeats=config.data.repeats,
    )


def assemble_labelled(
    config: FinetuneConfig,
    start: Start,
    images: LabelledImages,
    folder: RunFolder,
    ranks: Ranks,
    say: Say,
    calibration: Calibration | None = None,
) -> Assembly:
    """`finetune` from its network and images on."""
    classes, backbone = len(images.classes), start.backbone
    plan = build_plan(config, backbone, len(images.train), classes, ranks.count, calibration=calibration)
    if calibration is not None:
        say(time_table(plan, calibration))
    dataset = RequestDataset(images.train, build_transform(config, backbone), replace=True)
    model = build_model(config, start, classes, say, plan.epochs)
    state = build_state(config, model, ranks)
    drop_last, repeats = config.curriculum.drop_last, config.data.repeats
    state.selection = choose_selection(config.selection, plan, config.seed, drop_last, repeats)
    how = examination(config, backbone, choose_workers(config, ranks))
    parameters = sum(p.numel() for p in model.parameters())
    return Assembly(
        title=f"{backbone.name} ({parameters / 1e6:.1f} M parameters), "
        f"{'from scratch' if start.parent is None else 'from ' + start.parent.path}; {images.describe()}",
        plan=plan,
        dataset=dataset,
        task=selected(build_task(config, classes), state.selection),
        state=state,
        observers=watch(state, images, how, ranks, config.evaluation.every),
        loop=loop_config(config, config.protocol, ranks, config.optim.accumulation, config.optim.clip),
        repeats=repeats,
        parent=start.parent,
        records={**records(start, images.classes), **calibration_records(calibration)},
        conclude=partial(conclude, state, plan, images, how, ranks, folder),
    )


def watch(
    state: TrainState, images: LabelledImages, how: Examination, ranks: Ranks, every: float | None
) -> Sequence[AccuracyObserver]:
    """Accuracy on held-out images during training, on all ranks; nothing where none are held out."""
    return [] if images.val is None else [AccuracyObserver(state, images.val, how, ranks, every)]
