"""The training loop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mae_et.curriculum.plan import Plan
from mae_et.data.loader import Batch
from mae_et.engine.distributed import any_rank
from mae_et.engine.meter import Meter, TimedBatches, axes, row
from mae_et.engine.state import TrainState
from mae_et.engine.step import train_step
from mae_et.engine.tasks import Task
from mae_et.tracking.tracker import Tracker


class TrainingError(RuntimeError):
    """A run that cannot go on."""


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
        max_skipped: steps in a row with non-finite gradients before the run stops.
        wall_seconds: of training after which the run stops for good, wherever it is in its plan; None for no limit.
    """

    accumulation: int = 1
    clip: float | None = None
    log_every: int = 20
    save_every_steps: int | None = None
    save_every_seconds: float | None = 900.0
    max_skipped: int = 10
    wall_seconds: float | None = None

    def time_is_up(self, state: TrainState) -> bool:
        """Whether the run has had its time."""
        return self.wall_seconds is not None and state.seconds >= self.wall_seconds


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number


def train(
    state: TrainState,
    plan: Plan,
    batches: Iterator[Batch],
    task: Task,
    config: LoopConfig,
    tracker: Tracker,
    save: Callable[[], None],
    observers: Sequence[Observer] = (),
    until: float = 1.0,
) -> int | None:
    """Run the plan from the state's step to its end, until the clock, or until a signal.

    Args:
        state: changed in place.
        plan: the whole run.
        batches: micro-batches of this rank from the state's step on.
        task: what the network is asked.
        config: intervals and limits.
        tracker: receives rows and pictures; a silent one on all ranks but the main one.
        save: writes a checkpoint of the state (and does nothing on other ranks).
        observers: look at the model when they are due.
        until: where on the curriculum's axis to stop, before the plan's end.

    Returns:
        None at the end of the plan, at `until` or when the time is up; else the number of the signal that ended the
        run. Either way the last state is saved.

    Raises:
        TrainingError: too many steps in a row with non-finite gradients.
    """
    state.network.train()
    timed, meter, last_save, clock = TimedBatches(batches), Meter(), time.monotonic(), time.perf_counter()
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
            stopping, saving, late = any_rank([stop.received is not None, overdue, config.time_is_up(state)])
            done = state.step == last or late
            if done or state.step % config.log_every == 0 or plan.at(state.step).stage is not now.stage:
                tracker.log(row(plan, state, now, meter), state.step)
                check_finite(state, config.max_skipped)
                meter = Meter()
            paused = time.perf_counter()
            looked = observe(observers, plan, state, tracker)
            if done or stopping or saving:
                save()
                last_save = time.monotonic()
            if stopping and not done:
                return stop.received or signal.SIGTERM
            if looked or saving:  # not training: neither counts as its time
                clock = time.perf_counter()
                meter.started += clock - paused
    return None


def check_finite(state: TrainState, limit: int) -> None:
    """Stop a run whose gradients have not been finite for `limit` steps in a row."""
    in_a_row = int(state.skipped_in_a_row.item())
    if in_a_row >= limit and state.scaler is None:
        raise TrainingError(
            f"gradients were not finite for {in_a_row} steps in a row (engine.max_skipped={limit}) up to step "
            f"{state.step}; the weights are those from before. engine.precision=fp32 continues the run from its last "
            "checkpoint; a lower optim.base_lr or optim.clip=1.0 is another run, with run=..."
        )


def observe(observers: Sequence[Observer], plan: Plan, state: TrainState, tracker: Tracker) -> bool:
    """Let the observers that are due look; returns whether any did."""
    due = [observer for observer in observers if observer.due(plan, state.step)]
    for observer in due:
        state.network.eval()
        found = observer.observe(plan, state.step)
        if found.metrics:
            tracker.log({**axes(plan, state), **found.metrics}, state.step)
        if found.pictures:
            tracker.images(found.pictures, state.step)
    if due:
        state.network.train()
    return bool(due)
