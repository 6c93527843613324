"""What all kinds of runs share: ranks, the locked folder, resuming, records, the loop, and errors for people."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from mae_et.config import ConfigError, ProtocolConfig, RunConfig, differences, dump_config, load_config
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.table import plan_table
from mae_et.data.decode import ImageError
from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.replay import replayed
from mae_et.data.sampler import PlanSampler
from mae_et.data.selection import PassSampler
from mae_et.data.sources import Source, open_source
from mae_et.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from mae_et.engine.distributed import Ranks, from_main, join_ranks, leave_ranks
from mae_et.engine.loop import LoopConfig, Observer, TrainingError, train
from mae_et.engine.memory import keep_freed_memory
from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.engine.tasks import Prepare, Task
from mae_et.exchange.weights import Origin, WeightsError
from mae_et.ops.lowfreq import Phase, low_frequency_crop
from mae_et.recording import open_trackers
from mae_et.tracking import MultiTracker, truncate_metrics
from mae_et.tracking.tracker import Tracker

# Errors that a person can act on: their message is enough.
EXPECTED_ERRORS = (ConfigError, RunFolderError, CheckpointError, WeightsError, TrainingError, ImageError, OSError)

# What may differ between the starts of one run: where and how it runs, not what it learns.
FREE_KEYS = (
    *("run", "data.root", "data.images", "data.classes", "data.download", "data.workers", "data.max_pixels"),
    *("engine.", "saving.", "tracking.", "evaluation.", "calibration."),
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Assembly:
    """What one kind of run puts together, before anything is written.

    Attributes:
        title: the network and the images, for people.
        plan: the run in steps.
        dataset: requests to batches.
        task: what a step asks.
        state: on this rank's device, at step 0.
        observers: of this rank.
        loop: intervals and limits.
        repeats: views of an image within a batch.
        parent: where the first weights came from, None for a run from scratch.
        records: further text files of the folder, by name.
        conclude: called when the plan is complete, on all ranks, with whether to conclude once more.
    """

    title: str
    plan: Plan
    dataset: RequestDataset
    task: Task
    state: TrainState
    observers: Sequence[Observer]
    loop: LoopConfig
    repeats: int = 1
    parent: Origin | None = None
    records: Mapping[str, str] = field(default_factory=dict)
    conclude: Callable[[Tracker, Say, bool], None] = lambda _tracker, _say, _again: None


Assemble = Callable[[RunFolder, Ranks, bool], Assembly]
"""(folder, ranks, whether the run continues) to what will run; raises ConfigError and the like for what cannot."""


def execute(
    config: RunConfig,
    assemble: Assemble,
    resume: str = "auto",
    say: Say = print,
    only_conclude: bool = False,
    until: float = 1.0,
) -> int:
    """Run, or continue, a run.

    Args:
        config: of the run.
        assemble: puts together what this kind of run needs.
        resume: "auto" continues what the run's folder holds, "never" refuses to, a path continues from that
            checkpoint.
        say: where announcements go.
        only_conclude: train nothing, and conclude from the last checkpoint, again if that was done.
        until: where on the curriculum's axis to stop, saved; the same run goes on from there when asked to.

    Returns:
        Exit code: 0 when the plan is complete, 128 + signal when a signal ended the run (it is saved then).

    Raises:
        ConfigError, RunFolderError, CheckpointError, WeightsError, TrainingError: see there.
    """
    prepare_device(config)
    ranks = join_ranks(config.engine.device)
    run = _conclude if only_conclude else partial(_execute, until=until)
    try:
        if not ranks.is_main:
            return run(config, assemble, resume, ranks, RunFolder(config.run), lambda _line: None)
        with RunFolder(config.run) as folder:
            return run(config, assemble, resume, ranks, folder, say)
    finally:
        leave_ranks()


def _execute(
    config: RunConfig, assemble: Assemble, resume: str, ranks: Ranks, folder: RunFolder, say: Say, until: float
) -> int:
    """`execute` on one rank, inside its locked folder: all that can be refused comes before anything is written."""
    checkpoint = find_checkpoint(folder, resume, ranks)
    assembly = assemble(folder, ranks, checkpoint is not None)
    plan, state = assembly.plan, assembly.state
    if checkpoint is not None:
        check_same_run(folder, config, plan)
        restore(state, checkpoint)
    workers = choose_workers(config, ranks)
    announce(assembly, folder, ranks, workers, checkpoint, say)

    accumulation = assembly.loop.accumulation
    share = (ranks.rank, ranks.count, accumulation)
    if state.selection is None:
        sampler, passes = PlanSampler(plan, config.seed, state.step, *share, assembly.repeats), (None,)
    else:
        sampler = PassSampler(state.selection.passes, *share)
        passes = state.selection.passes_from(state.step, sampler)
    loader = build_loader(assembly.dataset, sampler, workers, pin_memory=ranks.device.type == "cuda")
    save = partial(save_state, state, folder, config.saving.keep, ranks)
    tracker = open_records(config, folder, assembly) if ranks.is_main else MultiTracker([])
    exit_code = 1
    try:
        with batches_of(loader, passes) as fresh:
            batches = replayed(fresh, sampler)
            ended = train(state, plan, batches, assembly.task, assembly.loop, tracker, save, assembly.observers, until)
        exit_code = 0 if ended is None else 128 + ended
        over = state.step == plan.total_steps or assembly.loop.time_is_up(state)
        if ended is None and over:
            assembly.conclude(tracker, say, False)
    finally:
        tracker.finish(exit_code)
    if exit_code:
        say(f"{signal.Signals(exit_code - 128).name}: saved at step {state.step:,}; the same command continues the run")
    else:
        ending = "complete" if state.step == plan.total_steps else "time is up" if over else f"stopped at u = {until:g}"
        say(
            f"{ending}: {state.step:,} of {plan.total_steps:,} steps in {state.seconds / 60:.1f} min; everything is in "
            f"{folder.path}"
        )
    return exit_code


def _conclude(config: RunConfig, assemble: Assemble, resume: str, ranks: Ranks, folder: RunFolder, say: Say) -> int:
    """Conclude from what the folder holds, without training."""
    checkpoint = find_checkpoint(folder, resume, ranks)
    if checkpoint is None:
        raise ConfigError(f"{folder.path} holds no checkpoint to evaluate; set run=... to the folder of a run")
    assembly = assemble(folder, ranks, True)
    check_same_run(folder, config, assembly.plan)
    restore(assembly.state, checkpoint)
    say(f"{checkpoint.path}: step {assembly.state.step:,} of {assembly.plan.total_steps:,}")
    assembly.conclude(MultiTracker([]), say, True)
    return 0


def prepare_device(config: RunConfig) -> None:
    """Threads, memory and matrix precision of this process."""
    keep_freed_memory()
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32


def choose_workers(config: Any, ranks: Ranks) -> int:
    """`data.workers`, or one per spare core of this rank's share; a CPU that trains keeps its cores to itself."""
    if config.data.workers is not None:
        return config.data.workers
    if ranks.device.type == "cpu":
        return 1
    return max(1, min(16, (os.cpu_count() or 2) // max(1, torch.cuda.device_count()) - 1))


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """The block on the main rank, then on the others: they find what it has downloaded."""
    if not ranks.is_main:
        from_main(None)
    yield
    if ranks.is_main:
        from_main(None)


def open_images(section: str, kind: str, root: str | None, split: str, data: Any, channels: int) -> Source:
    """The images of a split; `data` says whether they may be downloaded, and how large they may be.

    Raises:
        ConfigError: there are none, or they cannot be downloaded.
    """
    try:
        return open_source(kind, root, split, data.download, channels, data.max_pixels)
    except (ValueError, RuntimeError, URLError) as error:  # torchvision's downloads raise all three
        raise ConfigError(f"{section}: {error}") from None


def downsample_on_device(method: str) -> Prepare:
    """What the device does to images before the model sees them: the exact low-frequency crop, or nothing."""
    phases: dict[str, Phase] = {"fourier": "centred", "fourier_pixel0": "pixel0"}
    phase = phases.get(method)

    def crop(images: Tensor, bandwidth: tuple[int, int]) -> Tensor:
        if phase is None or tuple(images.shape[2:]) == bandwidth:
            return images
        return low_frequency_crop(images, bandwidth, phase)

    return crop


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


def check_same_run(folder: RunFolder, config: RunConfig, plan: Plan) -> None:
    """Refuse to continue a run with another configuration or another plan than it began with.

    Raises:
        ConfigError: naming what differs.
    """
    if folder.config_path.exists():
        changed = differences(load_config(folder.config_path, schema=type(config)), config)
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


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint.

    Raises:
        CheckpointError: it is of another model.
    """
    try:
        state.restore(checkpoint)
    except (RuntimeError, ValueError, KeyError) as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise CheckpointError(f"{checkpoint.path} does not fit this configuration: {first}") from None


def open_records(config: RunConfig, folder: RunFolder, assembly: Assembly) -> Tracker:
    """Write down what is about to run, drop rows of steps that were lost, and open the trackers."""
    write_text_atomic(folder.config_path, dump_config(config))
    write_text_atomic(folder.plan_path, json.dumps(assembly.plan.to_dict(), indent=1))
    for name, text in assembly.records.items():
        write_text_atomic(folder.path / name, text)
    if folder.metrics_path.exists():
        truncate_metrics(folder.metrics_path, assembly.state.step)
    return open_trackers(config, folder, assembly.plan, assembly.parent, config.task)


def save_state(state: TrainState, folder: RunFolder, keep: int, ranks: Ranks) -> None:
    """Write a checkpoint, on the main rank; all ranks call it together."""
    if state.selection is not None:
        state.selection.gather()
    if ranks.is_main:
        save_checkpoint(folder.checkpoints, state.step, state.tensors(), state.values(), keep)


def loop_config(
    config: RunConfig, protocol: ProtocolConfig, ranks: Ranks, accumulation: int, clip: float | None
) -> LoopConfig:
    """The loop's share of the configuration.

    Raises:
        ConfigError: a protocol for other GPUs than these.
    """
    minutes, hours = config.saving.minutes, protocol.wall_hours
    if protocol.gpus is not None and (ranks.device.type != "cuda" or ranks.count != protocol.gpus):
        raise ConfigError(
            f"protocol.gpus={protocol.gpus}, and this run has {ranks.count} x {ranks.device.type}: start it with "
            "torchrun on so many GPUs, or set protocol.gpus=null for a race of your own"
        )
    return LoopConfig(
        accumulation=accumulation,
        clip=clip,
        log_every=config.tracking.every,
        save_every_steps=config.saving.steps,
        save_every_seconds=None if minutes is None else 60 * minutes,
        max_skipped=config.engine.max_skipped,
        wall_seconds=None if hours is None else 3600 * hours,
    )


def announce(
    assembly: Assembly, folder: RunFolder, ranks: Ranks, workers: int, checkpoint: Checkpoint | None, say: Say
) -> None:
    """Say what is about to run, and from where."""
    state, plan = assembly.state, assembly.plan
    say(
        f"{folder.path}: {assembly.title}; {state.precision.name} on {ranks.count} x {ranks.device.type} "
        f"({torch.get_num_threads()} threads), {workers} workers"
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
        say(f"note: {', '.join(changed)} since then; results are equally good, but not the same bits")


def exit_with(error: Exception) -> int:
    """Print an error for people and return its exit code: 2 for a configuration, 1 for anything else."""
    message = str(error)
    if "Original Traceback" in message:  # from a DataLoader worker, whose traceback says nothing to a person
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {message}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
