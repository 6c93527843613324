"""What all kinds of runs share: ranks, the locked folder, resuming, records, the loop, and errors for people."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from mae_et.config import ConfigError, ProtocolConfig, RunConfig, dump_config
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.table import plan_table
from mae_et.data.decode import ImageError
from mae_et.data.loader import DataError, SampleDataset, batches_of, build_loader
from mae_et.data.replay import replayed
from mae_et.data.sampler import PlanSampler
from mae_et.data.selection import PassSampler
from mae_et.data.sources import Source, open_source
from mae_et.engine.bad_images import BadImages, BadImagesError
from mae_et.engine.checkpoint import Checkpoint, CheckpointError
from mae_et.engine.cores import gpu_cores
from mae_et.engine.distributed import (
    Ranks,
    any_rank,
    join_ranks,
    leave_ranks,
    lost_peer,
    on_main,
    told_by_main,
)
from mae_et.engine.faults import NonFinite, TrainingError
from mae_et.engine.loop import LoopConfig, Observer, train
from mae_et.engine.memory import keep_freed_memory
from mae_et.engine.run_folder import RunFolder, RunFolderError, write_text_atomic
from mae_et.engine.signals import requeue, slurm_job
from mae_et.engine.state import TrainState
from mae_et.engine.status import StatusFile
from mae_et.engine.tasks import Prepare, Task
from mae_et.engine.warmup import is_compiled, warm_up
from mae_et.exchange.weights import Origin, WeightsError
from mae_et.ops.lowfreq import Phase, low_frequency_crop
from mae_et.recording import open_trackers
from mae_et.resuming import (
    check_same_everywhere,
    check_same_run,
    find_checkpoint,
    lost_steps,
    restore,
    save_state,
)
from mae_et.tracking import MultiTracker, truncate_metrics
from mae_et.tracking.tracker import Tracker, warn

# Errors that a person can act on: their message is enough.
EXPECTED_ERRORS = (
    *(ConfigError, RunFolderError, CheckpointError, WeightsError, TrainingError, ImageError, BadImagesError, DataError),
    OSError,
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
    dataset: SampleDataset
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
        ConfigError, RunFolderError, CheckpointError, WeightsError, TrainingError, BadImagesError, DataError: see there.
    """
    prepare_device(config)
    ranks = join_ranks(config.engine.device, config.engine.timeout_minutes)
    run = _conclude if only_conclude else partial(_execute, until=until)
    held: list[RunFolder] = []
    on_main(ranks, lambda: held.append(RunFolder(config.run).acquire()))
    if held:
        with held[0] as folder:
            exit_code = run(config, assemble, resume, ranks, folder, say)
    else:
        exit_code = run(config, assemble, resume, ranks, RunFolder(config.run, writes=False), lambda _line: None)
    # Not after an error: under NCCL all ranks leave together, and the others may wait for this one elsewhere.
    leave_ranks()
    return exit_code


def _execute(
    config: RunConfig, assemble: Assemble, resume: str, ranks: Ranks, folder: RunFolder, say: Say, until: float
) -> int:
    """`execute` on one rank, inside its locked folder: all that can be refused comes before anything is written."""
    checkpoint = find_checkpoint(folder, resume, ranks)
    assembly = assemble(folder, ranks, checkpoint is not None)
    plan, state = assembly.plan, assembly.state
    state.bad_images = bad_images(config, folder, assembly, ranks)
    check_same_everywhere(assembly.dataset.source, plan)
    if checkpoint is not None:
        check_same_run(folder, config, plan, ranks)
        restore(state, checkpoint)
    workers = choose_workers(config, ranks)
    announce(assembly, folder, ranks, workers, checkpoint, say)
    if is_compiled(state.model) and state.selection is None:  # selection would note these losses
        sizes = (config.seed, assembly.loop.accumulation, assembly.repeats)
        took = warm_up(state, plan, assembly.task, assembly.dataset, ranks, *sizes)
        say(f"compiled for all stages in {took:.0f} s, before the clock starts")
    opened: list[Tracker] = []
    on_main(ranks, lambda: opened.append(open_records(config, folder, assembly)))
    tracker = opened[0] if opened else MultiTracker([])
    status = StatusFile(folder.status_path, None if checkpoint is None else state.step, ranks.is_main)
    status.update()
    del checkpoint  # as large as model and moments
    exit_code = 1
    try:
        ended = _train(config, assembly, folder, ranks, workers, tracker, status, until)
        exit_code = 0 if ended is None else 128 + ended
        over = any_rank([state.step == plan.total_steps or assembly.loop.time_is_up(state)])[0]
        if ended is None and over:
            state.refresh()
            assembly.conclude(tracker, say, False)
    except Exception as error:
        lost = ranks.count > 1 and lost_peer(error)
        status.update(state="failed", reason=LOST_PEER if lost else str(error))
        if lost:
            raise TrainingError(LOST_PEER) from error
        raise
    finally:
        tracker.finish(exit_code)
    if ended is not None:
        _say_interrupted(config, ranks, state, ended, status, say)
    else:
        ending = "complete" if state.step == plan.total_steps else "time is up" if over else "stopped"
        status.update(state=ending)
        at = f" at u = {until:g}" if ending == "stopped" else ""
        say(
            f"{ending}{at}: {state.step:,} of {plan.total_steps:,} steps in {state.seconds / 60:.1f} min; everything "
            f"is in {folder.path}"
        )
    return exit_code


def _train(
    config: Any,
    assembly: Assembly,
    folder: RunFolder,
    ranks: Ranks,
    workers: int,
    tracker: Tracker,
    status: StatusFile,
    until: float,
) -> int | None:
    """The loop on the run's data path; see `train` for what it returns."""
    plan, state, dataset, accumulation = assembly.plan, assembly.state, assembly.dataset, assembly.loop.accumulation
    share = (ranks.rank, ranks.count, accumulation)
    if state.selection is None:
        sampler, passes = PlanSampler(plan, config.seed, state.step, *share, assembly.repeats), (None,)
    else:
        sampler = PassSampler(state.selection.passes, *share)
        passes = state.selection.passes_from(state.step, sampler)
    pinned, silence = ranks.device.type == "cuda", 60 * config.data.timeout_minutes
    loader = build_loader(dataset, sampler, workers, pinned, silence)
    save = partial(save_state, state, folder, config.saving.keep, ranks, status)
    non_finite = NonFinite(config.engine.max_skipped, folder.non_finite_path, dataset.source.describe, ranks)
    with batches_of(loader, passes) as fresh:
        batches = replayed(fresh, sampler)
        return train(
            state, plan, batches, assembly.task, assembly.loop, tracker, save, non_finite, assembly.observers, until
        )


LOST_PEER = "another rank ended, or cannot be reached; what it printed itself says why"


def bad_images(config: Any, folder: RunFolder, assembly: Assembly, ranks: Ranks) -> BadImages:
    """The ledger of images that cannot be read, beside the run's metrics."""
    source = assembly.dataset.source
    return BadImages(folder.bad_images_path, source.describe, len(source), config.data.max_bad, ranks.is_main)


def _say_interrupted(
    config: RunConfig, ranks: Ranks, state: TrainState, ended: int, status: StatusFile, say: Say
) -> None:
    """Report a run that a signal ended, and have SLURM start it again where that signal means that time is short."""
    name, job = signal.Signals(ended).name, slurm_job()
    status.update(state="interrupted", reason=name)
    say(f"{name}: saved at step {state.step:,}; the same command continues the run")
    if ended != signal.SIGUSR1 or job is None or not config.engine.requeue:
        return
    status.update(requeued=True)  # before SLURM ends this process for it
    problem = on_main(ranks, partial(requeue, job))  # the others wait: a rank that leaves may end the job
    if problem is None:
        say(f"SLURM starts job {job} again")
    elif ranks.is_main:
        status.update(requeued=False)
        warn(f"SLURM was asked to start job {job} again, and did not: {problem}")


def _conclude(config: RunConfig, assemble: Assemble, resume: str, ranks: Ranks, folder: RunFolder, say: Say) -> int:
    """Conclude from what the folder holds, without training."""
    checkpoint = find_checkpoint(folder, resume, ranks)
    if checkpoint is None:
        raise ConfigError(f"{folder.path} holds no checkpoint to evaluate; set run=... to the folder of a run")
    assembly = assemble(folder, ranks, True)
    check_same_run(folder, config, assembly.plan, ranks)
    restore(assembly.state, checkpoint)
    assembly.state.refresh()
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
    return max(1, min(16, gpu_cores() - 1))


@contextmanager
def main_first(ranks: Ranks) -> Iterator[None]:
    """The block on the main rank, then on the others: they find what it has downloaded, or raise what it raised."""
    if not ranks.is_main:
        on_main(ranks, _succeed)
        yield
        return
    try:
        yield
    except Exception as error:
        on_main(ranks, partial(_fail, error))
    else:
        on_main(ranks, _succeed)


def _succeed() -> None:
    pass


def _fail(error: Exception) -> None:
    raise error


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


def open_records(config: RunConfig, folder: RunFolder, assembly: Assembly) -> Tracker:
    """Write down what is about to run, drop rows of steps that were lost, and open the trackers."""
    write_text_atomic(folder.config_path, dump_config(config))
    write_text_atomic(folder.plan_path, json.dumps(assembly.plan.to_dict(), indent=1))
    for name, text in assembly.records.items():
        write_text_atomic(folder.path / name, text)
    try:
        truncate_metrics(folder.metrics_path, assembly.state.step)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return open_trackers(config, folder, assembly.plan, assembly.parent, config.task)


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
        say("starting at step 0" + lost_steps(folder))
        return
    say(f"resuming from {checkpoint.path} at step {state.step:,} of {plan.total_steps:,}")
    before = checkpoint.state
    now = {"threads": torch.get_num_threads(), "precision": state.precision.name, "torch": str(torch.__version__)}
    changed = [f"{key} {before[key]} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        say(f"note: {', '.join(changed)} since then; results are equally good, but not the same bits")


def exit_with(error: Exception) -> int:
    """Print an error for people, once for all ranks, and return its exit code: 2 for a configuration, else 1."""
    message = str(error)
    if "Original Traceback" in message:  # from a DataLoader worker, whose traceback says nothing to a person
        message = message.strip().splitlines()[-1].partition(": ")[2]
    if not told_by_main(error):
        print(f"error: {message}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
