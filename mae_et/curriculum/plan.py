"""A plan: a curriculum made concrete in steps, before anything is spent."""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from mae_et.curriculum.schedule import LearningRate, ramp
from mae_et.curriculum.stage import format_size


@dataclass(frozen=True)
class PlannedStage:
    """One stage in steps.

    Attributes:
        index: position in the curriculum, from 0.
        start, end: the stage's stretch of the curriculum's axis, in [0, 1].
        bandwidth: B, (height, width) in px.
        grid: (rows, columns) of patches.
        visible, masked: patches per image that the encoder sees, and that it does not.
        batch: images per optimizer step, over all ranks.
        steps: optimizer steps.
        passes: passes over the data.
        cost_per_image: in the cost model's unit.
        flops_per_image: forward and backward, or None if no model was given.
        peak_learning_rate: highest learning rate within the stage.
        learning_rate_factor: of the schedule's peak, for a larger batch (EfficientTrain++ Eq. 2).
        magnitude: augmentation magnitude at the stage's start and end; None follows the plan's ramp.
        low_pass: radius in cycles per image of a low-pass filter; None filters nothing.
        replay: steps on images from the replay buffer after each step on fresh ones.
        replay_batches: fresh batches that the buffer holds.
    """

    index: int
    start: float
    end: float
    bandwidth: tuple[int, int]
    grid: tuple[int, int]
    visible: int
    masked: int
    batch: int
    steps: int
    passes: float
    cost_per_image: float
    flops_per_image: float | None
    peak_learning_rate: float
    learning_rate_factor: float = 1.0
    magnitude: tuple[float, float] | None = None
    low_pass: float | None = None
    replay: int = 0
    replay_batches: int = 0

    @property
    def name(self) -> str:
        """How messages call the stage: its number from 1 and its bandwidth."""
        return stage_name(self.index, self.bandwidth)

    @property
    def images(self) -> int:
        """Images that the stage trains on."""
        return self.steps * self.batch

    @property
    def fresh_steps(self) -> int:
        """Steps on images that the data path delivers; the others replay some of them."""
        return self.fresh_steps_before(self.steps)

    def fresh_steps_before(self, within: int) -> int:
        """Of the stage's first `within` steps, those on fresh images: the first, and every (replay + 1)-th after it."""
        return -(-within // (self.replay + 1))


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step sees.

    Attributes:
        step: from 0.
        u: position on the curriculum's axis before the step, in [0, 1).
        compute_fraction: share of the plan's total cost spent before the step, in [0, 1).
        images_seen: images trained on before the step, over all ranks.
        fresh_images: of these, those that the data path delivered.
        fresh: whether this step's images come from the data path, and not from the replay buffer.
        learning_rate: for this step.
        magnitude: augmentation magnitude m for this step.
        stage: the stage that the step belongs to.
    """

    step: int
    u: float
    compute_fraction: float
    images_seen: int
    fresh_images: int
    fresh: bool
    learning_rate: float
    magnitude: float
    stage: PlannedStage

    @property
    def bandwidth(self) -> tuple[int, int]:
        """B, (height, width) in px."""
        return self.stage.bandwidth

    @property
    def batch(self) -> int:
        """Images in this step, over all ranks."""
        return self.stage.batch


@dataclass(frozen=True)
class Plan:
    """A whole run in steps: pure data, the same for every rank and every restart.

    Attributes:
        name: the curriculum's name.
        axis: what u is a fraction of, "compute", "epoch" or "step".
        cost_unit: unit of `PlannedStage.cost_per_image`.
        images: images in the data set.
        epoch_images: images consumed per pass: `images`, less a last partial batch if that is dropped.
        stages: the stages in order.
        learning_rate: schedule over u.
        magnitude: augmentation magnitude at u = 0 and u = 1.
        reference_cost: cost of one image at the reference size, the unit of `equivalent_epochs`.
        reference_size: (height, width) in px, the final size.
        epochs: that the plan was made for; None in plans from before it was kept. No part of what makes plans equal.
    """

    name: str
    axis: str
    cost_unit: str
    images: int
    epoch_images: int
    stages: tuple[PlannedStage, ...]
    learning_rate: LearningRate
    magnitude: tuple[float, float]
    reference_cost: float
    reference_size: tuple[int, int]
    epochs: float | None = field(default=None, compare=False)

    @cached_property
    def _first_steps(self) -> list[int]:
        return list(accumulate((stage.steps for stage in self.stages), initial=0))

    @cached_property
    def _first_images(self) -> list[int]:
        return list(accumulate((stage.images for stage in self.stages), initial=0))

    @cached_property
    def _first_costs(self) -> list[float]:
        return list(accumulate((stage.images * stage.cost_per_image for stage in self.stages), initial=0.0))

    @cached_property
    def _first_fresh(self) -> list[int]:
        return list(accumulate((stage.fresh_steps * stage.batch for stage in self.stages), initial=0))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._first_steps[-1]

    @property
    def total_images(self) -> int:
        """Images that the whole run trains on, over all ranks."""
        return self._first_images[-1]

    @property
    def total_fresh(self) -> int:
        """Of these, those that the data path delivers; the others come from the replay buffer."""
        return self._first_fresh[-1]

    @property
    def boundaries(self) -> list[int]:
        """First step of each stage."""
        return self._first_steps[:-1]

    @property
    def equivalent_epochs(self) -> float:
        """The plan's cost in epochs at the reference size."""
        return self._first_costs[-1] / (self.reference_cost * self.epoch_images)

    @property
    def total_flops(self) -> float | None:
        """FLOPs of the whole run, forward and backward, or None if no model was given."""
        return self.flops_before(self.total_steps)

    def _locate(self, step: int) -> tuple[int, int]:
        """(stage index, step within the stage); the step after the last one belongs to the last stage."""
        if not 0 <= step <= self.total_steps:
            raise IndexError(f"step {step} is outside the plan's 0..{self.total_steps}")
        index = min(bisect_right(self._first_steps, step) - 1, len(self.stages) - 1)
        return index, step - self._first_steps[index]

    def images_before(self, step: int) -> int:
        """Images trained on before `step`, over all ranks."""
        index, within = self._locate(step)
        return self._first_images[index] + within * self.stages[index].batch

    def fresh_before(self, step: int) -> int:
        """Images that the data path delivered before `step`, over all ranks."""
        index, within = self._locate(step)
        stage = self.stages[index]
        return self._first_fresh[index] + stage.fresh_steps_before(within) * stage.batch

    def flops_before(self, step: int) -> float | None:
        """FLOPs spent before `step`, or None if no model was given."""
        index, within = self._locate(step)
        per_image = [stage.flops_per_image for stage in self.stages[: index + 1]]
        if any(flops is None for flops in per_image):
            return None
        images = [stage.images for stage in self.stages[:index]] + [within * self.stages[index].batch]
        return float(sum(n * flops for n, flops in zip(images, per_image) if flops is not None))

    def compute_fraction(self, step: int) -> float:
        """Share of the plan's cost spent before `step`, in [0, 1]."""
        index, within = self._locate(step)
        stage = self.stages[index]
        return (self._first_costs[index] + within * stage.batch * stage.cost_per_image) / self._first_costs[-1]

    def u(self, step: int) -> float:
        """Position on the curriculum's axis before `step`, in [0, 1]; stages join without a gap."""
        index, within = self._locate(step)
        stage = self.stages[index]
        return stage.start + (stage.end - stage.start) * within / stage.steps

    def first_step_at(self, u: float) -> int:
        """The first step that begins at or after `u`; the number of steps if none does."""
        return bisect_left(range(self.total_steps), u, key=self.u)

    def passes(self, every: float | None, done: int) -> bool:
        """Whether the last of `done` steps went past a multiple of `every`, a fraction of the compute.

        Not at the plan's end, and never for None.
        """
        if done == self.total_steps or every is None:
            return False
        return int(self.compute_fraction(done) / every) > int(self.compute_fraction(done - 1) / every)

    def at(self, step: int) -> StepPlan:
        """What `step` (0 .. total_steps - 1) sees.

        Raises:
            IndexError: the step is outside the plan.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the plan's 0..{self.total_steps - 1}")
        u = self.u(step)
        index, within = self._locate(step)
        stage = self.stages[index]
        peak = self.learning_rate.peak * stage.learning_rate_factor
        magnitude = ramp(self.magnitude, u)
        if stage.magnitude is not None:
            magnitude = ramp(stage.magnitude, within / stage.steps)
        return StepPlan(
            step=step,
            u=u,
            compute_fraction=self.compute_fraction(step),
            images_seen=self.images_before(step),
            fresh_images=self.fresh_before(step),
            fresh=within % (stage.replay + 1) == 0,
            learning_rate=replace(self.learning_rate, peak=peak)(u),
            magnitude=magnitude,
            stage=stage,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """A plan from what `to_dict` returned, also after a trip through JSON.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: the values are of no plan.
        """
        stages = tuple(PlannedStage(**_with_tuples(stage)) for stage in values["stages"])
        rate = LearningRate(**_with_tuples(values["learning_rate"]))
        # Plans from before there was a reference size took the largest stage.
        largest = max((stage.bandwidth for stage in stages), key=lambda size: size[0] * size[1])
        plain = _with_tuples({"reference_size": largest, **values})
        plan = cls(**{**plain, "stages": stages, "learning_rate": rate})
        for record in (plan, rate, *stages):
            _refuse_strange(record)
        if not plan._first_costs[-1] > 0 or not plan.reference_cost > 0:
            raise ValueError("its steps cost nothing")
        return plan


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_pair(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(of, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_count,
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "tuple[int, int]": lambda value: _is_pair(value, _is_count),
    "tuple[float, float]": lambda value: _is_pair(value, _is_number),
    "tuple[float, ...]": lambda value: isinstance(value, tuple) and all(map(_is_number, value)),
    "tuple[float, float] | None": lambda value: value is None or _is_pair(value, _is_number),
}
"""Whether a value is of a type, by the type's name."""


def _refuse_strange(record: Plan | PlannedStage | LearningRate) -> None:
    """Raise ValueError for a value that is not of its field's type, or no finite number."""
    for item in fields(record):
        fits = _FITS.get(str(item.type))
        if fits is not None and not fits(getattr(record, item.name)):
            raise ValueError(f"{item.name} is {getattr(record, item.name)!r}")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Values whose lists, as JSON has them, are tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def stage_name(index: int, bandwidth: tuple[int, int]) -> str:
    """How messages call a stage, e.g. `stage 2 (B=160)`."""
    return f"stage {index + 1} (B={format_size(bandwidth)})"
