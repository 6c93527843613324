"""A pretraining run put together from its configuration."""

from __future__ import annotations

from functools import partial

import torch

from mae_et.calibration import calibration_records, settle_calibration
from mae_et.config import ConfigError, PretrainConfig
from mae_et.curriculum.time_table import time_table
from mae_et.data.scaled import build_dataset
from mae_et.data.sources import Source
from mae_et.data.splits import hold_out
from mae_et.data.transforms import CropTransform
from mae_et.engine.distributed import Ranks
from mae_et.engine.loop import Observer
from mae_et.engine.optim import adam_settings, build_optimizer, decay_groups
from mae_et.engine.parallel import parallelise, whole_copy
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder
from mae_et.engine.selection import choose_selection, selected
from mae_et.engine.state import TrainState
from mae_et.engine.tasks import Reconstruction
from mae_et.evaluation.pictures import PictureObserver
from mae_et.evaluation.scores import LabelledSets, ScoreObserver
from mae_et.models.mae import MaskedAutoencoder
from mae_et.planning import build_plan, encoder_size, final_size, trial_config
from mae_et.running import (
    Assembly,
    Say,
    choose_workers,
    downsample_on_device,
    execute,
    loop_config,
    main_first,
    open_images,
)


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The configured model with the weights that the seed gives it.

    Raises:
        ConfigError: whatever the model refuses.
    """
    size, model = encoder_size(config), config.model
    torch.manual_seed(config.seed)
    try:
        return MaskedAutoencoder(
            size=final_size(config),
            patch_size=model.patch_size,
            channels=config.data.channels,
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            mlp_ratio=model.mlp_ratio,
            decoder_width=model.decoder_width,
            decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
            target=config.target.kind,  # pyright: ignore[reportArgumentType] - validated by the configuration
            cell=config.target.cell,
            bins=config.target.bins,
            positions=model.positions,  # pyright: ignore[reportArgumentType]
            mean=config.data.mean,
            std=config.data.std,
            decoder=model.decoder,  # pyright: ignore[reportArgumentType]
            prediction_ratio=model.prediction_ratio,
            inter_block=model.inter_block,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def build_source(config: PretrainConfig, split: str | None = None, evaluation: bool = False) -> Source:
    """The images of a split; for scores, those of `evaluation.source` and `.root` where they are set.

    Raises:
        ConfigError: there are none, or they cannot be downloaded.
    """
    data = config.data
    kind, root = data.source, data.root
    if evaluation:
        other = config.evaluation
        # Another kind of source has a place of its own; the same kind may have another folder.
        root = other.root if other.source is not None or other.root is not None else root
        kind = other.source or kind
    return open_images("evaluation" if evaluation else "data", kind, root, split or data.split, data, data.channels)


def build_labelled_sets(config: PretrainConfig) -> LabelledSets:
    """Images that scores learn from, and those that they are taken on: another split, or a share held out of the first.

    What is held out depends on the images alone, so that all runs are scored on the same.

    Raises:
        ConfigError: there are none, or none to hold out.
    """
    scores = config.evaluation
    train = build_source(config, scores.train_split, evaluation=True)
    if scores.holdout is None:
        return LabelledSets(train, build_source(config, scores.test_split, evaluation=True))
    try:
        return LabelledSets(*hold_out(train, scores.holdout, seed=0))
    except ValueError as error:
        raise ConfigError(f"evaluation.holdout={scores.holdout}: {error}") from None


def build_transform(config: PretrainConfig) -> CropTransform:
    """Crop and flip in the worker, down to B unless the device does that.

    Raises:
        ConfigError: empty ranges of scale or ratio.
    """
    data = config.data
    scale, ratio = (data.scale[0], data.scale[1]), (data.ratio[0], data.ratio[1])
    try:
        return CropTransform(final_size(config), data.downsample, scale, ratio, data.flip)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def build_state(config: PretrainConfig, ranks: Ranks) -> TrainState:
    """Model, optimizer and number format, on this rank's device."""
    model = build_model(config)
    wanted = config.engine.compile
    if wanted == "always" or (wanted == "auto" and ranks.device.type == "cuda"):
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile(dynamic=True)
        if ranks.device.type == "cuda":
            model.compile_targets()
    precision = Precision.choose(config.engine.precision, ranks.device)
    choose_attention(model, precision)
    # The main rank alone looks at it.
    twin = whole_copy(model, ranks, config.engine.parallel) if ranks.is_main else None
    network = parallelise(model, ranks, config.engine.parallel)
    groups = decay_groups(model, config.optim.weight_decay)
    return TrainState(
        model=model,
        network=network,
        twin=twin,
        optimizer=build_optimizer(groups, adam_settings(config.optim.weight_decay, config.optim.betas)),
        precision=precision,
        device=ranks.device,
        scaler=precision.scaler(),
    )


def build_observers(
    config: PretrainConfig, folder: RunFolder, state: TrainState, source: Source, workers: int
) -> list[Observer]:
    """Pictures at the end of stages, and scores if they are asked for."""
    observers: list[Observer] = []
    model = state.evaluated
    assert isinstance(model, MaskedAutoencoder)
    if config.tracking.pictures:
        transform, prepare = build_transform(config), downsample_on_device(config.data.downsample)
        samples = config.tracking.picture_samples
        observers.append(
            PictureObserver(model, state.precision, source, transform, prepare, folder.pictures, samples, config.seed)
        )
    if config.evaluation.every is not None:
        sets, size = build_labelled_sets(config), final_size(config)
        observers.append(ScoreObserver(model, state.precision, sets, config.evaluation, size, workers))
    return observers


def rehearse(config: PretrainConfig, source: Source | None, ranks: Ranks) -> Assembly:
    """The configured run with an endless plan, to time its steps.

    Args:
        config: of the run.
        source: its images; None opens them.
        ranks: of the run.
    """
    if source is None:
        with main_first(ranks):
            source = build_source(config)
    return Assembly(
        title=f"{config.model.name}, target {config.target.kind}, on {source.name}",
        plan=build_plan(trial_config(config), len(source), ranks.count),
        dataset=build_dataset(source, build_transform(config), config.data.decoder, replace=True),
        task=Reconstruction(downsample_on_device(config.data.downsample)),
        state=build_state(config, ranks),
        observers=[],
        loop=loop_config(config, config.protocol, ranks, config.optim.accumulation, config.optim.clip),
    )


def pretrain(
    config: PretrainConfig, resume: str = "auto", say: Say = print, until: float = 1.0, source: Source | None = None
) -> int:
    """Run, or continue, a pretraining run; `running.execute` documents the rest.

    Args:
        config: of the run.
        resume, say, until: see `running.execute`.
        source: images in place of those that `config.data` names.
    """
    given = source

    def assemble(folder: RunFolder, ranks: Ranks, resuming: bool) -> Assembly:
        with main_first(ranks):
            source = build_source(config) if given is None else given
        quiet = say if ranks.is_main else lambda _line: None
        calibration = settle_calibration(config, folder, ranks, resuming, partial(rehearse, config, source), quiet)
        plan = build_plan(config, len(source), ranks.count, calibration)
        if calibration is not None:
            quiet(time_table(plan, calibration))
        dataset = build_dataset(source, build_transform(config), config.data.decoder, replace=True)
        state = build_state(config, ranks)
        drop_last = config.curriculum.drop_last
        state.selection = choose_selection(config.selection, plan, config.seed, drop_last=drop_last)
        workers = choose_workers(config, ranks)
        parameters = sum(p.numel() for p in state.model.parameters())
        return Assembly(
            title=f"{config.model.name} ({parameters / 1e6:.1f} M parameters with decoder), target "
            f"{config.target.kind}; {source.name}: {len(source):,} images",
            plan=plan,
            dataset=dataset,
            task=selected(Reconstruction(downsample_on_device(config.data.downsample)), state.selection),
            state=state,
            observers=build_observers(config, folder, state, source, workers) if ranks.is_main else [],
            loop=loop_config(config, config.protocol, ranks, config.optim.accumulation, config.optim.clip),
            records=calibration_records(calibration),
        )

    return execute(config, assemble, resume, say, until=until)
