"""A pretraining run put together from its configuration."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor

from mae_et.config import ConfigError, PretrainConfig, as_dict, differences, dump_config, load_config
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.table import plan_table
from mae_et.data.decode import ImageError
from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.sampler import PlanSampler
from mae_et.data.sources import Source, open_source
from mae_et.data.transforms import CropTransform
from mae_et.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from mae_et.engine.distributed import Ranks, from_main, join_ranks, leave_ranks, replicate
from mae_et.engine.loop import LoopConfig, Observer, TrainingError, train
from mae_et.engine.memory import keep_freed_memory
from mae_et.engine.optim import build_optimizer
from mae_et.engine.precision import Precision, choose_attention
from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.engine.step import Prepare
from mae_et.evaluation.pictures import PictureObserver
from mae_et.evaluation.scores import LabelledSets, ScoreObserver
from mae_et.models.mae import MaskedAutoencoder
from mae_et.ops.lowfreq import Phase, low_frequency_crop
from mae_et.planning import build_plan, encoder_size, final_size
from mae_et.tracking import ConsoleTracker, JsonlTracker, MultiTracker, WandbTracker, truncate_metrics
from mae_et.tracking.tracker import Tracker

# Errors that a person can act on: their message is enough.
EXPECTED_ERRORS = (ConfigError, RunFolderError, CheckpointError, TrainingError, ImageError, OSError)

# What may differ between the starts of one run: where and how it runs, not what it learns.
FREE_KEYS = (
    *("run", "data.root", "data.images", "data.download", "data.workers", "data.max_pixels"),
    *("engine.", "checkpoint.", "tracking.", "evaluation."),
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
    try:
        return open_source(kind, root, split or data.split, data.download, data.channels, data.max_pixels)
    except (ValueError, RuntimeError, URLError) as error:  # torchvision's downloads raise all three
        raise ConfigError(f"{'evaluation' if evaluation else 'data'}: {error}") from None


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


def build_prepare(config: PretrainConfig) -> Prepare:
    """What the device does to images before the model sees them: the exact low-frequency crop, or nothing."""

    phases: dict[str, Phase] = {"fourier": "centred", "fourier_pixel0": "pixel0"}
    phase = phases.get(config.data.downsample)

    def crop(images: Tensor, bandwidth: tuple[int, int]) -> Tensor:
        if phase is None or tuple(images.shape[2:]) == bandwidth:
            return images
        return low_frequency_crop(images, bandwidth, phase)

    return crop


def choose_workers(config: PretrainConfig, ranks: Ranks) -> int:
    """`data.workers`, or one per spare core of this rank's share; a CPU that trains keeps its cores to itself."""
    if config.data.workers is not None:
        return config.data.workers
    if ranks.device.type == "cpu":
        return 1
    return max(1, min(16, (os.cpu_count() or 2) // max(1, torch.cuda.device_count()) - 1))


def prepare_device(config: PretrainConfig) -> None:
    """Threads, memory and matrix precision of this process."""
    keep_freed_memory()
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32


def build_state(config: PretrainConfig, ranks: Ranks) -> TrainState:
    """Model, optimizer and number format, on this rank's device."""
    model = build_model(config).to(ranks.device)
    wanted = config.engine.compile
    if wanted == "always" or (wanted == "auto" and ranks.device.type == "cuda"):
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile(dynamic=True)
    precision = Precision.choose(config.engine.precision, ranks.device)
    choose_attention(model, precision)
    return TrainState(
        model=model,
        network=replicate(model, ranks),
        optimizer=build_optimizer(model, config.optim.weight_decay, config.optim.betas),
        precision=precision,
        device=ranks.device,
        scaler=precision.scaler(),
    )


def find_checkpoint(folder: RunFolder, resume: str, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; None begins anew.

    Raises:
        ConfigError: the folder already holds a run and `resume` does not continue it.
        CheckpointError: there are checkpoints, and none is whole.
    """
    found = latest_checkpoint(folder.checkpoints) if ranks.is_main else None
    newest = from_main(None if found is None else str(found.path))
    wanted = newest if resume == "auto" else None if resume == "never" else resume
    if newest is not None and (wanted is None or Path(wanted).resolve() != Path(newest).resolve()):
        # To go back within a folder would leave later checkpoints behind, from which a crash would resume.
        raise ConfigError(
            f"{folder.path} already holds a run, up to {newest}; continue that with --resume auto, or choose another "
            "folder with run=..."
        )
    return None if wanted is None else found or load_checkpoint(Path(wanted))


def check_same_run(folder: RunFolder, config: PretrainConfig, plan: Plan) -> None:
    """Refuse to continue a run with another configuration or another plan than it began with.

    Raises:
        ConfigError: naming what differs.
    """
    if folder.config_path.exists():
        changed = differences(load_config(folder.config_path), config)
        essential = [change for change in changed if not change.startswith(FREE_KEYS)]
        if essential:
            raise ConfigError(
                f"{folder.path} holds a run of another configuration ({'; '.join(essential)}). Continue it with the "
                "values it began with, or choose another folder with run=..."
            )
    if folder.plan_path.exists():
        old = Plan.from_dict(json.loads(folder.plan_path.read_text()))
        if old != plan:
            raise ConfigError(
                f"the plan of {folder.path} was made for {old.images} images and {old.total_steps} steps, this one "
                f"for {plan.images} images and {plan.total_steps} steps: the data set has changed; choose run=..."
            )


def build_tracker(config: PretrainConfig, folder: RunFolder, plan: Plan) -> Tracker:
    """metrics.jsonl, and the console and W&B as configured."""
    settings = config.tracking
    trackers: list[Tracker] = [JsonlTracker(folder.metrics_path)]
    if settings.console:
        trackers.append(ConsoleTracker(plan.total_steps, stages=len(plan.stages)))
    if settings.wandb != "disabled":
        trackers.append(
            WandbTracker(
                settings.wandb,
                folder.path,
                project=settings.project,
                name=settings.name or folder.path.name,
                group=settings.group,
                job_type="pretrain",
                entity=settings.entity,
                tags=settings.tags,
                config={**as_dict(config), "plan": plan.to_dict()},
            )
        )
    return MultiTracker(trackers)


def build_observers(
    config: PretrainConfig, folder: RunFolder, state: TrainState, source: Source, workers: int
) -> list[Observer]:
    """Pictures at the end of stages, and scores if they are asked for."""
    observers: list[Observer] = []
    model = state.model
    assert isinstance(model, MaskedAutoencoder)
    if config.tracking.pictures:
        transform, prepare = build_transform(config), build_prepare(config)
        samples = config.tracking.picture_samples
        observers.append(
            PictureObserver(model, state.precision, source, transform, prepare, folder.pictures, samples, config.seed)
        )
    if config.evaluation.every is not None:
        splits = (config.evaluation.train_split, config.evaluation.test_split)
        sets = LabelledSets(*(build_source(config, split, evaluation=True) for split in splits))
        size = final_size(config)
        observers.append(ScoreObserver(model, state.precision, sets, config.evaluation, size, workers))
    return observers


def pretrain(config: PretrainConfig, resume: str = "auto", say: Callable[[str], None] = print) -> int:
    """Run, or continue, a pretraining run.

    Args:
        config: of the run.
        resume: "auto" continues what the run's folder holds, "never" refuses to, a path continues from that
            checkpoint.
        say: where announcements go.

    Returns:
        Exit code: 0 when the plan is complete, 128 + signal when a signal ended the run (it is saved then).

    Raises:
        ConfigError, RunFolderError, CheckpointError, TrainingError: see there.
    """
    prepare_device(config)
    ranks = join_ranks(config.engine.device)
    try:
        if not ranks.is_main:
            return _pretrain(config, resume, ranks, RunFolder(config.run), lambda _line: None)
        with RunFolder(config.run) as folder:
            return _pretrain(config, resume, ranks, folder, say)
    finally:
        leave_ranks()


def _pretrain(config: PretrainConfig, resume: str, ranks: Ranks, folder: RunFolder, say: Callable[[str], None]) -> int:
    """`pretrain` on one rank, inside its locked folder: all that can be refused comes before anything is written."""
    # The main rank first: the others find what it has downloaded.
    if not ranks.is_main:
        from_main(None)
    source = build_source(config)
    if ranks.is_main:
        from_main(None)
    plan = build_plan(config, len(source), ranks.count)
    dataset, prepare = RequestDataset(source, build_transform(config)), build_prepare(config)
    checkpoint = find_checkpoint(folder, resume, ranks)
    if checkpoint is not None:
        check_same_run(folder, config, plan)
    state = build_state(config, ranks)
    restore(state, checkpoint)
    workers = choose_workers(config, ranks)
    observers = build_observers(config, folder, state, source, workers) if ranks.is_main else []
    announce(config, folder, plan, state, ranks, workers, source, checkpoint, say)

    sampler = PlanSampler(plan, config.seed, state.step, ranks.rank, ranks.count, config.optim.accumulation)
    loader = build_loader(dataset, sampler, workers, pin_memory=ranks.device.type == "cuda")
    save = partial(save_state, state, folder, config.checkpoint.keep, ranks)
    tracker = open_records(config, folder, plan, state.step) if ranks.is_main else MultiTracker([])
    exit_code = 1
    try:
        with batches_of(loader) as batches:
            ended = train(state, plan, batches, prepare, loop_config(config), tracker, save, observers)
        exit_code = 0 if ended is None else 128 + ended
    finally:
        tracker.finish(exit_code)
    if exit_code:
        say(f"{signal.Signals(exit_code - 128).name}: saved at step {state.step:,}; the same command continues the run")
    else:
        say(f"complete: {plan.total_steps:,} steps in {state.seconds / 60:.1f} min; everything is in {folder.path}")
    return exit_code


def restore(state: TrainState, checkpoint: Checkpoint | None) -> None:
    """Continue from a checkpoint, if there is one.

    Raises:
        CheckpointError: it is of another model.
    """
    if checkpoint is None:
        return
    try:
        state.restore(checkpoint)
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise CheckpointError(f"{checkpoint.path} does not fit this configuration: {first}") from None


def open_records(config: PretrainConfig, folder: RunFolder, plan: Plan, step: int) -> Tracker:
    """Write down what is about to run, drop rows of steps that were lost, and open the trackers."""
    write_text_atomic(folder.config_path, dump_config(config))
    write_text_atomic(folder.plan_path, json.dumps(plan.to_dict(), indent=1))
    if folder.metrics_path.exists():
        truncate_metrics(folder.metrics_path, step)
    return build_tracker(config, folder, plan)


def save_state(state: TrainState, folder: RunFolder, keep: int, ranks: Ranks) -> None:
    """Write a checkpoint, on the main rank."""
    if ranks.is_main:
        save_checkpoint(folder.checkpoints, state.step, state.tensors(), state.values(), keep)


def loop_config(config: PretrainConfig) -> LoopConfig:
    """The loop's share of the configuration."""
    minutes = config.checkpoint.minutes
    return LoopConfig(
        accumulation=config.optim.accumulation,
        clip=config.optim.clip,
        log_every=config.tracking.every,
        save_every_steps=config.checkpoint.steps,
        save_every_seconds=None if minutes is None else 60 * minutes,
        max_skipped=config.engine.max_skipped,
    )


def announce(
    config: PretrainConfig,
    folder: RunFolder,
    plan: Plan,
    state: TrainState,
    ranks: Ranks,
    workers: int,
    source: Source,
    checkpoint: Checkpoint | None,
    say: Callable[[str], None],
) -> None:
    """Say what is about to run, and from where."""
    parameters = sum(p.numel() for p in state.model.parameters())
    say(
        f"{folder.path}: {config.model.name} ({parameters / 1e6:.1f} M parameters with decoder), target "
        f"{config.target.kind}, {state.precision.name} on {ranks.count} x {ranks.device.type} "
        f"({torch.get_num_threads()} threads), {workers} workers; {source.name}: {len(source):,} images"
    )
    say(plan_table(plan))
    if checkpoint is None:
        say("starting at step 0")
        return
    say(f"resuming from {checkpoint.path} at step {state.step:,} of {plan.total_steps:,}")
    before = checkpoint.state
    now = {"threads": torch.get_num_threads(), "precision": state.precision.name, "torch": str(torch.__version__)}
    changed = [f"{key} {before[key]} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        say(
            f"note: {', '.join(changed)} since then; results are equally good, but not the same bits",
        )


def exit_with(error: Exception) -> int:
    """Print an error for people and return its exit code: 2 for a configuration, 1 for anything else."""
    message = str(error)
    if "Original Traceback" in message:  # from a DataLoader worker, whose traceback says nothing to a person
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {message}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
