"""How long the steps of a run take on this machine, from real steps of a run that is thrown away."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import cycle
from pathlib import Path

import torch

from mae_et.config import CalibrationConfig, ConfigError, FinetuneConfig, PretrainConfig
from mae_et.config.kept import read_kept
from mae_et.curriculum.calibration import Calibration, StageTiming
from mae_et.curriculum.plan import PlannedStage
from mae_et.data.loader import Batch
from mae_et.engine.distributed import Ranks, join_ranks, leave_ranks, on_main
from mae_et.engine.run_folder import RunFolder, write_text_atomic
from mae_et.planning import needs_calibration, read_calibration
from mae_et.rehearsal import Rehearsal, Rehearse, device_name, forget_peak_memory, peak_memory
from mae_et.running import Assembly, Say, choose_workers, prepare_device

CALIBRATION_FILE = "calibration.json"

LEAST_STEPS = 8
"""Steps of a stage that are timed at least."""

PATIENCE = 3.0
"""Times its share of the seconds after which a block ends, however few of its steps are done."""

AHEAD = 4
"""Batches more than one of each worker after which the data path runs steadily."""


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
        blocks = Blocks(rehearse(ranks), ranks, choose_workers(config, ranks), config.seed, config.calibration)
        timings = measure(blocks, say)
    if hasattr(torch, "compiler"):
        torch.compiler.reset()  # compiled blocks of the run itself begin as those of a run that goes on
    state = blocks.assembly.state
    return Calibration(
        timings=tuple(timings),
        title=blocks.assembly.title,
        device=device_name(ranks.device),
        processes=ranks.count,
        threads=torch.get_num_threads(),
        workers=blocks.workers,
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


class Blocks(Rehearsal):
    """Times blocks of steps of a run that is thrown away."""

    def __init__(self, assembly: Assembly, ranks: Ranks, workers: int, seed: int, settings: CalibrationConfig):
        self.block_seconds = settings.seconds / settings.rounds
        super().__init__(assembly, ranks, seed, PATIENCE * self.block_seconds)
        self.workers, self.rounds = workers, settings.rounds
        # Steps before and within a block: the data path must run steadily, and workers deliver in volleys.
        self.lead_in = math.ceil((workers + AHEAD) / self.accumulation) if workers else 1
        self.volley = math.ceil(max(1, workers) / self.accumulation)

    def trials(self) -> list[Trial]:
        """One for each geometry of the plan, those of smaller steps first."""
        return [Trial(stage, first) for stage, first in self.geometries()]

    def train(self, trial: Trial, batches: Iterator[Batch]) -> None:
        """The trial's next step of training."""
        self.step(trial.step, batches)
        trial.step += 1

    def fetch(self, trial: Trial, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the trial's next step."""
        trial.step += 1
        return self.take(batches)

    def fed(self, trial: Trial, count: int) -> float:
        """Seconds of a step with the data path beside it."""
        with self.batches(trial.step, self.workers) as batches:
            for _ in range(min(self.lead_in, max(count, self.volley))):
                self.train(trial, batches)
            return self.timed(lambda: self.train(trial, batches), count)

    def alone(self, trial: Trial, count: int) -> float:
        """Seconds of a step on a batch that is there."""
        return self.timed(lambda: self.train(trial, cycle(trial.ready)), count)

    def data(self, trial: Trial, count: int) -> float:
        """Seconds of a batch from the data path alone."""
        with self.batches(trial.step, self.workers) as batches:
            for _ in range(self.volley):
                self.fetch(trial, batches)
            return self.timed(lambda: self.fetch(trial, batches), count)


def measure(blocks: Blocks, say: Say) -> list[StageTiming]:
    """Timings of every geometry, the stages in turn."""
    trials = blocks.trials()
    say(f"calibration: steps of {len(trials)} sizes in {blocks.rounds} rounds, nothing of which is kept")
    for trial in trials:
        warm_up(blocks, trial)
    for turn in range(blocks.rounds):
        for trial in trials if turn % 2 == 0 else reversed(trials):
            fed, alone, data = trial.counts
            trial.fed.append(blocks.fed(trial, fed))
            trial.alone.append(blocks.alone(trial, alone))
            trial.data.append(blocks.data(trial, data))
    timings = [trial.timing() for trial in trials]
    for timing in timings:
        say(
            f"{timing.key}: {1000 * timing.seconds:.4g} ms a step ±{200 * timing.spread / timing.seconds:.1f} %; alone "
            f"{1000 * timing.step_seconds:.4g} ms, its batch {1000 * timing.data_seconds:.4g} ms"
        )
    return timings


def warm_up(blocks: Blocks, trial: Trial) -> None:
    """First steps, in which kernels are chosen and compiled; then how many fit into a block."""
    device = blocks.ranks.device
    forget_peak_memory(device)
    with blocks.batches(trial.step, blocks.workers) as batches:
        trial.ready = blocks.fetch(trial, batches)
    blocks.alone(trial, 2)
    alone = blocks.alone(trial, 2)
    data = blocks.data(trial, blocks.volley)
    trial.memory = peak_memory(device)
    fed = max(alone, data) if blocks.workers else alone + data
    block, least = blocks.block_seconds, math.ceil(LEAST_STEPS / blocks.rounds)

    def whole_volleys(seconds: float, minimum: int) -> int:
        return blocks.volley * max(math.ceil(minimum / blocks.volley), round(block * seconds / blocks.volley))

    trial.counts = (
        whole_volleys(1 / fed, least),
        max(least, round(0.3 * block / alone)),
        whole_volleys(0.3 / data, 1),
    )
