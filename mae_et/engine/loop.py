"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mae_et.curriculum.plan import Plan
from mae_et.data.loader import Samples
from mae_et.engine.distributed import largest
from mae_et.engine.faults import NonFinite, RecentSamples, Saving
from mae_et.engine.meter import Meter, TimedBatches, axes, row
from mae_et.engine.signals import StopSignal
from mae_et.engine.state import TrainState
from mae_et.engine.step import train_step
from mae_et.engine.tasks import Task
from mae_et.tracking.tracker import Tracker


@dataclass(frozen=True)
class Observation:
    """What an observer found: numbers for the metrics, and pictures by name."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)


class Observer(Protocol):
    """Looks at the model now and then: scores, pictures. Changes nothing.

    On the main rank alone, or on all ranks alike: `due` says the same everywhere.
    """

    def due(self, plan: Plan, done: int) -> bool:
        """Whether to look after `done` steps."""
        ...

    def observe(self, plan: Plan, done: int) -> Observation:
        """Look."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know besides the plan.

    Attributes:
        accumulation, clip: of the step.
        log_every: steps between rows of metrics.
        save_every_steps, save_every_seconds: between checkpoints; None does not save for that reason.
        wall_seconds: of training after which the run stops for good, wherever it is in its plan; None for no limit.
    """

    accumulation: int = 1
    clip: float | None = None
    log_every: int = 20
    save_every_steps: int | None = None
    save_every_seconds: float | None = 900.0
    wall_seconds: float | None = None

    def time_is_up(self, state: TrainState) -> bool:
        """Whether the run has had its time."""
        return self.wall_seconds is not None and state.seconds >= self.wall_seconds


def train(
    state: TrainState,
    plan: Plan,
    batches: Iterator[Samples],
    task: Task,
    config: LoopConfig,
    tracker: Tracker,
    save: Callable[[], None],
    non_finite: NonFinite,
    observers: Sequence[Observer] = (),
    until: float = 1.0,
) -> int | None:
    """Run the plan from the state's step to its end, until the clock, or until a signal.

    A save that fails for want of room is tried again when the next one is due; see `faults.Saving`.

    Args:
        state: changed in place.
        plan: the whole run.
        batches: micro-batches of this rank from the state's step on.
        task: what the network is asked.
        config: intervals and limits.
        tracker: receives rows and pictures; a silent one on all ranks but the main one.
        save: writes a checkpoint of the state; all ranks call it together, and fail together.
        non_finite: knows when there were too many steps without a finite gradient.
        observers: look at the model when they are due.
        until: where on the curriculum's axis to stop, before the plan's end.

    Returns:
        None at the end of the plan, at `until` or when the time is up; else the number of the signal that ended the
        run, the same on all ranks. Either way the last state is saved.

    Raises:
        TrainingError: too many steps in a row with non-finite gradients.
        BadImagesError: too many images that cannot be read.
        SaveError: the last checkpoint, or three in a row, could not be saved.
    """
    state.network.train()
    recent = RecentSamples((non_finite.limit + config.log_every) * config.accumulation)
    ledger = state.bad_images
    assert ledger is not None, "the run has its folder by now"
    timed = TimedBatches(batches, ledger.note, lambda batch: recent.note(state.step, batch))
    meter, saving, last_save, clock = Meter(), Saving(save), time.monotonic(), time.perf_counter()
    last, late = plan.first_step_at(until), config.time_is_up(state)
    with StopSignal() as stop:
        while state.step < last and not late:
            now = plan.at(state.step)
            result = train_step(state, timed, now, task, config.accumulation, config.clip)
            meter.add(state, result, now.batch, timed.take_waited())
            state.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            overdue = config.save_every_seconds is not None and time.monotonic() - last_save > config.save_every_seconds
            overdue |= config.save_every_steps is not None and state.step % config.save_every_steps == 0
            due = [observer for observer in observers if observer.due(plan, state.step)]
            signalled, must_save, late, looking = largest(
                [stop.received or 0, overdue, config.time_is_up(state), bool(due)]
            )
            done = state.step == last or bool(late)
            if done or state.step % config.log_every == 0 or plan.at(state.step).stage is not now.stage:
                tracker.log({**row(plan, state, now, meter), **ledger.settle(state.step)}, state.step)
                non_finite.check(state, recent)
                meter = Meter()
            paused = time.perf_counter()
            if looking:
                observe(due, plan, state, tracker)
            if done or signalled or must_save:
                saving.attempt(last=done or bool(signalled))
                last_save = time.monotonic()
            if signalled and not done:
                stop.hear(signalled)
                return signalled
            if looking or must_save:  # not training: neither counts as its time
                clock = time.perf_counter()
                meter.started += clock - paused
    return None


def observe(due: Sequence[Observer], plan: Plan, state: TrainState, tracker: Tracker) -> None:
    """Let these observers look; all ranks call it together, some without any."""
    state.refresh()
    for observer in due:
        state.network.eval()
        found = observer.observe(plan, state.step)
        if found.metrics:
            tracker.log({**axes(plan, state), **found.metrics}, state.step)
        if found.pictures:
            tracker.images(found.pictures, state.step)
    state.dismiss()
    state.network.train()
