"""A plan: a curriculum made concrete in steps, before anything is spent."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from mae_et.curriculum.cost import TRAINING_FLOPS_PER_MULTIPLY_ADD, CostModel, Geometry
from mae_et.curriculum.schedule import LearningRate, ramp
from mae_et.curriculum.stage import Stage, format_size, patch_grid, visible_tokens


@dataclass(frozen=True)
class PlannedStage:
    """One stage in steps.

    Attributes:
        index: position in the curriculum, from 0.
        start, end: the stage's stretch of the curriculum's axis, in [0, 1].
        bandwidth: B, (height, width) in px.
        grid: (rows, columns) of patches.
        visible, masked: patches per image that the encoder sees, and that are predicted.
        batch: images per optimizer step, over all ranks.
        steps: optimizer steps.
        passes: passes over the data.
        cost_per_image: in the cost model's unit.
        flops_per_image: forward and backward, or None if no model was given.
        peak_learning_rate: highest learning rate within the stage.
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

    @property
    def name(self) -> str:
        """How messages call the stage: its number from 1 and its bandwidth."""
        return stage_name(self.index, self.bandwidth)

    @property
    def images(self) -> int:
        """Images that the stage consumes."""
        return self.steps * self.batch


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step sees.

    Attributes:
        step: from 0.
        u: position on the curriculum's axis before the step, in [0, 1).
        compute_fraction: share of the plan's total cost spent before the step, in [0, 1).
        images_seen: images consumed before the step, over all ranks.
        learning_rate: for this step.
        magnitude: augmentation magnitude m for this step.
        stage: the stage that the step belongs to.
    """

    step: int
    u: float
    compute_fraction: float
    images_seen: int
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
        axis: what u is a fraction of, "compute" or "epoch".
        cost_unit: unit of `PlannedStage.cost_per_image`.
        images: images in the data set.
        epoch_images: images consumed per pass: `images`, less a last partial batch if that is dropped.
        stages: the stages in order.
        learning_rate: schedule over u.
        magnitude: augmentation magnitude at u = 0 and u = 1.
        reference_cost: cost of one image at the largest bandwidth, the unit of `equivalent_epochs`.
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

    @cached_property
    def _first_steps(self) -> list[int]:
        return list(accumulate((stage.steps for stage in self.stages), initial=0))

    @cached_property
    def _first_images(self) -> list[int]:
        return list(accumulate((stage.images for stage in self.stages), initial=0))

    @cached_property
    def _first_costs(self) -> list[float]:
        return list(accumulate((stage.images * stage.cost_per_image for stage in self.stages), initial=0.0))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._first_steps[-1]

    @property
    def total_images(self) -> int:
        """Images consumed by the whole run, over all ranks."""
        return self._first_images[-1]

    @property
    def boundaries(self) -> list[int]:
        """First step of each stage."""
        return self._first_steps[:-1]

    @property
    def equivalent_epochs(self) -> float:
        """The plan's cost in epochs at the largest bandwidth."""
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
        """Images consumed before `step`, over all ranks."""
        index, within = self._locate(step)
        return self._first_images[index] + within * self.stages[index].batch

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

    def at(self, step: int) -> StepPlan:
        """What `step` (0 .. total_steps - 1) sees.

        Raises:
            IndexError: the step is outside the plan.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is outside the plan's 0..{self.total_steps - 1}")
        u = self.u(step)
        return StepPlan(
            step=step,
            u=u,
            compute_fraction=self.compute_fraction(step),
            images_seen=self.images_before(step),
            learning_rate=self.learning_rate(u),
            magnitude=ramp(self.magnitude, u),
            stage=self.stages[self._locate(step)[0]],
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """A plan from what `to_dict` returned, also after a trip through JSON."""
        stages = tuple(
            PlannedStage(**{**stage, "bandwidth": tuple(stage["bandwidth"]), "grid": tuple(stage["grid"])})
            for stage in values["stages"]
        )
        rate, magnitude = LearningRate(**values["learning_rate"]), tuple(values["magnitude"])
        return cls(**{**values, "stages": stages, "learning_rate": rate, "magnitude": magnitude})


def stage_name(index: int, bandwidth: tuple[int, int]) -> str:
    """How messages call a stage, e.g. `stage 2 (B=160)`."""
    return f"stage {index + 1} (B={format_size(bandwidth)})"


def check_ends(stages: Sequence[Stage]) -> None:
    """Raise ValueError unless the stages' ends rise strictly from above 0 to 1."""
    if not stages:
        raise ValueError("a curriculum needs at least one stage")
    start = 0.0
    for index, stage in enumerate(stages):
        if not stage.end > start:
            raise ValueError(
                f"{stage_name(index, stage.bandwidth)} ends at {stage.end}, not after {start}: ends must rise"
            )
        start = stage.end
    if start != 1.0:
        raise ValueError(
            f"{stage_name(len(stages) - 1, stages[-1].bandwidth)} ends at {start}: the last one must end at 1"
        )


def stage_geometry(stage: Stage, index: int, patch_size: int, cell: int | None, mask_ratio: float) -> Geometry:
    """Patches of a stage, all and visible.

    Raises:
        ValueError: patch or cell do not fit, or no patch stays visible; the message names the stage.
    """
    try:
        rows, columns = patch_grid(stage.bandwidth, patch_size)
        if cell is not None and patch_size % cell:
            raise ValueError(f"the HOG cell of {cell} px does not divide the patch of {patch_size} px")
        ratio = mask_ratio if stage.mask_ratio is None else stage.mask_ratio
        return Geometry(stage.bandwidth, rows * columns, visible_tokens(rows * columns, ratio))
    except ValueError as error:
        raise ValueError(f"{stage_name(index, stage.bandwidth)}: {error}") from None


def make_plan(
    stages: Sequence[Stage],
    *,
    name: str,
    axis: str,
    epochs: float,
    images: int,
    batch: int,
    patch_size: int,
    mask_ratio: float,
    cell: int | None,
    cost: CostModel,
    flops: CostModel | None,
    learning_rate: LearningRate,
    magnitude: tuple[float, float],
    drop_last: bool,
    ranks: int,
    accumulation: int,
) -> Plan:
    """Turn stages into steps; `Curriculum.plan` documents the arguments.

    With e(B) the cost of an image relative to the largest bandwidth, a stage that holds a share f of the compute
    axis gets f * epochs * steps_per_epoch / e(B) steps, rounded to the nearest; on the epoch axis e(B) is 1.
    """
    check_ends(stages)
    if epochs <= 0 or images < 1 or batch < 1:
        raise ValueError(f"epochs, images and batch must be positive; got {epochs}, {images}, {batch}")
    geometries = [stage_geometry(stage, i, patch_size, cell, mask_ratio) for i, stage in enumerate(stages)]
    largest = max(geometries, key=lambda geometry: geometry.tokens)
    reference = cost(Geometry(largest.bandwidth, largest.tokens, visible_tokens(largest.tokens, mask_ratio)))
    # A data set smaller than a batch has no whole batch to keep: its passes run into each other instead.
    epoch_images = images // batch * batch if drop_last and images >= batch else images

    planned, start = [], 0.0
    for index, (stage, geometry) in enumerate(zip(stages, geometries)):
        label = stage_name(index, stage.bandwidth)
        if batch % (ranks * accumulation):
            raise ValueError(
                f"{label}: a batch of {batch} does not divide into {ranks} ranks x {accumulation} accumulation "
                f"steps; choose a multiple of {ranks * accumulation}"
            )
        per_image = cost(geometry)
        relative = per_image / reference if axis == "compute" else 1.0
        steps = round((stage.end - start) * epochs * epoch_images / batch / relative)
        if steps < 1:
            raise ValueError(
                f"{label} gets no step: {epochs:g} epochs of {epoch_images} images are too few for a batch of {batch}"
            )
        planned.append(
            PlannedStage(
                index=index,
                start=start,
                end=stage.end,
                bandwidth=stage.bandwidth,
                grid=patch_grid(stage.bandwidth, patch_size),
                visible=geometry.visible,
                masked=geometry.masked,
                batch=batch,
                steps=steps,
                passes=steps * batch / epoch_images,
                cost_per_image=per_image,
                flops_per_image=flops(geometry) * TRAINING_FLOPS_PER_MULTIPLY_ADD if flops else None,
                peak_learning_rate=learning_rate.highest(start, stage.end),
            )
        )
        start = stage.end
    return Plan(
        name=name,
        axis=axis,
        cost_unit=getattr(cost, "unit", "cost"),
        images=images,
        epoch_images=epoch_images,
        stages=tuple(planned),
        learning_rate=learning_rate,
        magnitude=magnitude,
        reference_cost=reference,
    )
