"""How long the steps of a run take on this machine, from real steps of a run that is thrown away."""

from __future__ import annotations

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path

import torch

from mae_et.config import CalibrationConfig, ConfigError, FinetuneConfig, PretrainConfig
from mae_et.config.kept import read_kept
from mae_et.curriculum.calibration import Calibration, StageTiming, stage_key
from mae_et.curriculum.plan import Plan, PlannedStage
from mae_et.data.loader import Batch, batches_of, build_loader
from mae_et.data.sampler import PlanSampler
from mae_et.engine.distributed import Ranks, any_rank, join_ranks, leave_ranks, on_main, slowest
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.engine.step import train_step
from mae_et.planning import needs_calibration, read_calibration
from mae_et.running import Assembly, Say, choose_workers, prepare_device

CALIBRATION_FILE = "calibration.json"

LEAST_STEPS = 8
"""Steps of a stage that are timed at least."""

PATIENCE = 3.0
"""Times its share of the seconds after which a block ends, however few of its steps are done."""

AHEAD = 4
"""Batches more than one of each worker after which the data path runs steadily."""

Rehearse = Callable[[Ranks], Assembly]
"""Ranks to the configured run with an endless plan, for steps that nothing is kept of."""


def settle_calibration(
    config: PretrainConfig | FinetuneConfig,
    folder: RunFolder,
    ranks: Ranks,
    resuming: bool,
    rehearse: Rehearse,
    say: Say,
) -> Calibration | None:
    """The calibration that a run's plan is made from; all ranks call it together.

    A run that continues reads the one it began with, so that its plan is the same. Another one takes
    `calibration.file`, or measures.

    Args:
        config, folder, ranks, resuming: of the run.
        rehearse: what to measure.
        say: where announcements go.

    Returns:
        None where the plan depends on none.

    Raises:
        ConfigError: the calibration of a run that continues is gone, or the file is none for these ranks.
    """
    if not needs_calibration(config):
        return None
    kept = folder.path / CALIBRATION_FILE
    found = on_main(ranks, lambda: read_kept(kept, Calibration.from_json) if resuming and kept.exists() else None)
    if found is not None:
        return found
    if config.calibration.file is not None:
        return read_calibration(config.calibration.file, ranks.count)
    if resuming:
        raise ConfigError(
            f"{kept} is missing: the plan of this run was made from it, and measured anew it would be another. Put it "
            "back, or name a copy with calibration=FILE"
        )
    return calibrate(config, ranks, rehearse, say)


def calibration_records(calibration: Calibration | None) -> dict[str, str]:
    """What a run's folder keeps of its calibration: a text file, by name."""
    return {} if calibration is None else {CALIBRATION_FILE: calibration.to_json()}


def calibrate_alone(
    config: PretrainConfig | FinetuneConfig, rehearse: Rehearse, say: Say, out: str | None = None
) -> Calibration:
    """`calibrate` for a process, or the processes of torchrun, that do nothing else; `out` keeps it in a file."""
    prepare_device(config)
    ranks = join_ranks(config.engine.device)
    quiet = say if ranks.is_main else lambda _line: None
    try:
        calibration = calibrate(config, ranks, rehearse, quiet)
        if out is not None and ranks.is_main:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(Path(out), calibration.to_json())
            say(f"calibration: {out}")
        return calibration
    finally:
        leave_ranks()


def calibrate(config: PretrainConfig | FinetuneConfig, ranks: Ranks, rehearse: Rehearse, say: Say) -> Calibration:
    """Measure the steps of every geometry of a run's stages; all ranks together, and the slowest counts.

    For each, three things in blocks of steps: the step with the data path beside it, as in training; the step alone,
    on a batch that is there; and the data path alone. The stages take turns, so that a machine's moods hit all of
    them alike, and medians of the blocks are kept. Random numbers are as they were before.

    Args:
        config: of the run, for its number of workers, its seed and `calibration`.
        ranks: of the run.
        rehearse: makes the run that is measured, with a state of its own.
        say: where announcements go.
    """
    devices = [ranks.device.index] if ranks.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        bench = Bench(rehearse(ranks), ranks, choose_workers(config, ranks), config.seed, config.calibration)
        timings = measure(bench, say)
    if hasattr(torch, "compiler"):
        torch.compiler.reset()  # compiled blocks of the run itself begin as those of a run that goes on
    state = bench.assembly.state
    return Calibration(
        timings=tuple(timings),
        title=bench.assembly.title,
        device=device_name(ranks.device),
        processes=ranks.count,
        threads=torch.get_num_threads(),
        workers=bench.workers,
        precision=state.precision.name,
        torch=str(torch.__version__),
        date=on_main(ranks, lambda: datetime.now().astimezone().isoformat(timespec="seconds")),
    )


@dataclass
class Trial:
    """One geometry under measurement.

    Attributes:
        stage: of the plan.
        step: of the plan that comes next; the images of every block are others.
        ready: micro-batches of a step, to repeat.
        fed, alone, data: seconds per step of each block.
        memory: peak bytes of this rank, None if unknown.
        counts: steps of a block of each kind.
    """

    stage: PlannedStage
    step: int
    ready: list[Batch] = field(default_factory=list)
    fed: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    data: list[float] = field(default_factory=list)
    memory: int | None = None
    counts: tuple[int, int, int] = (0, 0, 0)

    def timing(self) -> StageTiming:
        """Medians, and the standard error of the first."""
        stage, seconds, shape = self.stage, statistics.median(self.fed), self.ready[0].images.shape
        deviation = statistics.median(abs(value - seconds) for value in self.fed)
        return StageTiming(
            bandwidth=stage.bandwidth,
            visible=stage.visible,
            batch=stage.batch,
            filtered=stage.low_pass is not None,
            seconds=seconds,
            # 1.4826 MAD is a normal distribution's deviation, and a median errs 1.2533 times as much as a mean.
            spread=1.2533 * 1.4826 * deviation / math.sqrt(len(self.fed)),
            step_seconds=statistics.median(self.alone),
            data_seconds=statistics.median(self.data),
            memory=self.memory,
            image=(shape[1], shape[2], shape[3]),
            flops_per_image=stage.flops_per_image,
            blocks=len(self.fed),
        )


class Bench:
    """Times blocks of steps of a run that is thrown away."""

    def __init__(self, assembly: Assembly, ranks: Ranks, workers: int, seed: int, settings: CalibrationConfig):
        # Every step takes a batch from the data path here; what replay saves is reckoned, not measured.
        stages = tuple(replace(stage, replay=0, replay_batches=0) for stage in assembly.plan.stages)
        self.plan: Plan = replace(assembly.plan, stages=stages)
        self.assembly, self.ranks, self.workers, self.seed = assembly, ranks, workers, seed
        self.accumulation, self.rounds = assembly.loop.accumulation, settings.rounds
        self.block_seconds = settings.seconds / settings.rounds
        # Steps before and within a block: the data path must run steadily, and workers deliver in volleys.
        self.lead_in = math.ceil((workers + AHEAD) / self.accumulation) if workers else 1
        self.volley = math.ceil(max(1, workers) / self.accumulation)
        assembly.state.network.train()

    def trials(self) -> list[Trial]:
        """One for each geometry of the plan, those of smaller steps first."""
        found: dict[str, Trial] = {}
        for stage, first in zip(self.plan.stages, self.plan.boundaries):
            found.setdefault(stage_key(stage), Trial(stage, first))
        return sorted(found.values(), key=lambda trial: trial.stage.batch * math.prod(trial.stage.grid))

    @contextmanager
    def batches(self, trial: Trial) -> Iterator[Iterator[Batch]]:
        """Micro-batches of this rank from the trial's next step on, through the data path."""
        share = (self.ranks.rank, self.ranks.count, self.accumulation)
        sampler = PlanSampler(self.plan, self.seed, trial.step, *share, self.assembly.repeats)
        pinned = self.ranks.device.type == "cuda"
        with batches_of(build_loader(self.assembly.dataset, sampler, self.workers, pinned)) as batches:
            yield batches

    def step(self, trial: Trial, batches: Iterator[Batch]) -> None:
        """One step of training."""
        now, loop = self.plan.at(trial.step), self.assembly.loop
        train_step(self.assembly.state, batches, now, self.assembly.task, self.accumulation, loop.clip)
        trial.step += 1

    def take(self, trial: Trial, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of one step."""
        trial.step += 1
        return list(islice(batches, self.accumulation))

    def timed(self, call: Callable[[], object], count: int) -> float:
        """Seconds of a call on the slowest rank, the mean of `count` in a row; of fewer where that takes too long."""
        wait_for(self.ranks.device)
        started, done, late = time.perf_counter(), 0, False
        while done < count and not late:
            call()
            done += 1
            # The ranks agree after each step, as they do in training.
            late = any_rank([time.perf_counter() - started > PATIENCE * self.block_seconds])[0]
        wait_for(self.ranks.device)
        return slowest((time.perf_counter() - started) / done)

    def fed(self, trial: Trial, count: int) -> float:
        """Seconds of a step with the data path beside it."""
        with self.batches(trial) as batches:
            for _ in range(min(self.lead_in, max(count, self.volley))):
                self.step(trial, batches)
            return self.timed(lambda: self.step(trial, batches), count)

    def alone(self, trial: Trial, count: int) -> float:
        """Seconds of a step on a batch that is there."""
        return self.timed(lambda: self.step(trial, cycle(trial.ready)), count)

    def data(self, trial: Trial, count: int) -> float:
        """Seconds of a batch from the data path alone."""
        with self.batches(trial) as batches:
            for _ in range(self.volley):
                self.take(trial, batches)
            return self.timed(lambda: self.take(trial, batches), count)


def measure(bench: Bench, say: Say) -> list[StageTiming]:
    """Timings of every geometry, the stages in turn."""
    trials = bench.trials()
    say(f"calibration: steps of {len(trials)} sizes in {bench.rounds} rounds, nothing of which is kept")
    for trial in trials:
        warm_up(bench, trial)
    for turn in range(bench.rounds):
        for trial in trials if turn % 2 == 0 else reversed(trials):
            fed, alone, data = trial.counts
            trial.fed.append(bench.fed(trial, fed))
            trial.alone.append(bench.alone(trial, alone))
            trial.data.append(bench.data(trial, data))
    timings = [trial.timing() for trial in trials]
    for timing in timings:
        say(
            f"{timing.key}: {1000 * timing.seconds:.4g} ms a step ±{200 * timing.spread / timing.seconds:.1f} %; alone "
            f"{1000 * timing.step_seconds:.4g} ms, its batch {1000 * timing.data_seconds:.4g} ms"
        )
    return timings


def warm_up(bench: Bench, trial: Trial) -> None:
    """First steps, in which kernels are chosen and compiled; then how many fit into a block."""
    device = bench.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with bench.batches(trial) as batches:
        trial.ready = bench.take(trial, batches)
    bench.alone(trial, 2)
    alone = bench.alone(trial, 2)
    data = bench.data(trial, bench.volley)
    trial.memory = peak_memory(device)
    fed = max(alone, data) if bench.workers else alone + data
    block, least = bench.block_seconds, math.ceil(LEAST_STEPS / bench.rounds)

    def whole_volleys(seconds: float, minimum: int) -> int:
        return bench.volley * max(math.ceil(minimum / bench.volley), round(block * seconds / bench.volley))

    trial.counts = (
        whole_volleys(1 / fed, least),
        max(least, round(0.3 * block / alone)),
        whole_volleys(0.3 / data, 1),
    )


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes, the most of any rank: on a GPU of tensors since the last reset, on a CPU of the whole process."""
    if device.type == "cuda":
        return int(slowest(torch.cuda.max_memory_allocated(device)))
    if device.type != "cpu" or not sys.platform.startswith(("linux", "darwin")):
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(slowest(peak * (1024 if sys.platform.startswith("linux") else 1)))  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """What people call the device, e.g. `NVIDIA H100` or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
