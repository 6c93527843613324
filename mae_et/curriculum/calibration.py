"""`Calibration`: what a step of each stage takes on a machine, measured once and kept, so that plans repeat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mae_et.config.plain import parse_json
from mae_et.curriculum.cost import CostModel, Geometry
from mae_et.curriculum.plan import PlannedStage
from mae_et.curriculum.stage import format_size

FLOPS_TOLERANCE = 1e-3
"""A calibration is of another model where its FLOPs of an image differ from the plan's by a larger share."""


@dataclass(frozen=True)
class StageTiming:
    """What a step of one geometry takes. Seconds are medians over blocks of steps, of the slowest rank.

    Attributes:
        bandwidth: B, (height, width) in px.
        visible: patches that the encoder sees.
        batch: images per optimizer step, over all ranks.
        filtered: whether a low-pass filter acts on the images.
        seconds: of a step as in training, the data path beside it.
        spread: standard error of `seconds`, from the median absolute deviation of the blocks.
        step_seconds: of a step alone, on a batch that is there.
        data_seconds: of a batch from the data path alone.
        memory: peak bytes of a rank: of tensors on a GPU; of the whole process on a CPU, this stage's and smaller ones'
            together. None is unknown.
        image: (channels, height, width) of an image as it reaches the device, a byte each.
        flops_per_image: of the model that was measured, forward and backward; None is unknown.
        blocks: of steps that the medians are of.
    """

    bandwidth: tuple[int, int]
    visible: int
    batch: int
    filtered: bool
    seconds: float
    spread: float
    step_seconds: float
    data_seconds: float
    memory: int | None
    image: tuple[int, int, int]
    flops_per_image: float | None
    blocks: int

    @property
    def key(self) -> str:
        """The geometry in a word: see `stage_key`."""
        return _key(self.bandwidth, self.visible, self.batch, self.filtered)

    @property
    def batch_bytes(self) -> int:
        """uint8 pixels of a step's images, over all ranks."""
        channels, height, width = self.image
        return self.batch * channels * height * width


def stage_key(stage: PlannedStage) -> str:
    """What decides the time of a stage's step: `96/9/4096` is B, visible patches and batch; filtered ones say so."""
    return _key(stage.bandwidth, stage.visible, stage.batch, stage.low_pass is not None)


def _key(bandwidth: tuple[int, int], visible: int, batch: int, filtered: bool) -> str:
    return f"{format_size(bandwidth)}/{visible}/{batch}{'/low-pass' if filtered else ''}"


@dataclass(frozen=True)
class Calibration:
    """Timings of a run's stages on one machine.

    Attributes:
        timings: one for each geometry.
        title: the network and the images, for people.
        device: its name.
        processes: that shared a batch.
        threads: of each process's CPU work.
        workers: of each process's data path; 0 decodes between steps.
        precision: autocast type.
        torch: its version.
        date: when it was measured, ISO 8601.
    """

    timings: tuple[StageTiming, ...]
    title: str
    device: str
    processes: int
    threads: int
    workers: int
    precision: str
    torch: str
    date: str

    def timing(self, stage: PlannedStage) -> StageTiming:
        """The timing of a stage's geometry.

        Raises:
            ValueError: it was not measured, or of another model.
        """
        key = stage_key(stage)
        found = next((timing for timing in self.timings if timing.key == key), None)
        if found is None:
            known = ", ".join(timing.key for timing in self.timings)
            raise ValueError(
                f"the calibration holds no steps of {key} (B/visible patches/batch), only {known}: calibrate this "
                "configuration anew"
            )
        ours, theirs = stage.flops_per_image, found.flops_per_image
        if ours is not None and theirs is not None and abs(ours - theirs) > FLOPS_TOLERANCE * theirs:
            raise ValueError(
                f"{stage.name}: the calibration is of another model ({self.title}), of {theirs:.3g} FLOPs an image and "
                f"not {ours:.3g}: calibrate this configuration anew"
            )
        return found

    def seconds_per_step(self, stage: PlannedStage) -> float:
        """Seconds of a step of the stage, the mean over fresh and replayed ones.

        Without replay it is what was measured. With n replayed steps after each fresh one the data path has n + 1 steps
        for a batch. Workers beside the training take max(step, data / (n + 1)), and what both together took beyond
        the slower one (cores that they share) is paid for fresh steps alone; without workers the step waits for
        whatever the data path adds, once in n + 1 steps.
        """
        timing = self.timing(stage)
        alone, data, fresh = timing.step_seconds, timing.data_seconds, stage.replay + 1
        if fresh == 1:
            return timing.seconds
        if not self.workers:
            return alone + (timing.seconds - alone) / fresh
        return max(alone, data / fresh) + (timing.seconds - max(alone, data)) / fresh

    def seconds(self, stages: Sequence[PlannedStage]) -> float:
        """Seconds of all steps of the stages; pauses for scores and checkpoints come on top."""
        return sum(stage.steps * self.seconds_per_step(stage) for stage in stages)

    def uncertainty(self, stages: Sequence[PlannedStage]) -> float:
        """Two standard errors of `seconds` as a share of it, had the stages all erred to the same side."""
        errors = sum(stage.steps * 2 * self.timing(stage).spread for stage in stages)
        return errors / self.seconds(stages)

    def cost(self) -> CostModel:
        """Seconds per image, by bandwidth and visible patches: the measured cost in which a budget may be accounted."""
        by_geometry: dict[tuple[tuple[int, int], int], list[float]] = {}
        for timing in self.timings:
            by_geometry.setdefault((timing.bandwidth, timing.visible), []).append(timing.seconds / timing.batch)
        return CalibratedCost({key: sum(values) / len(values) for key, values in by_geometry.items()})

    def to_json(self) -> str:
        """The calibration as JSON; `from_json` is its inverse, to the bit."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """A calibration from what `to_json` returned.

        Raises:
            ValueError: the text is not a calibration.
        """
        try:
            values = parse_json(text)
            timings = tuple(StageTiming(**_with_tuples(timing)) for timing in values["timings"])
            found = cls(**{**values, "timings": timings})
            _check(found)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a calibration, as `python -m mae_et calibrate` writes it: {error}") from None
        return found


@dataclass(frozen=True)
class CalibratedCost:
    """Seconds per image that a calibration measured.

    Attributes:
        seconds: by ((height, width) in px, visible patches).
    """

    seconds: dict[tuple[tuple[int, int], int], float]
    unit = "seconds"

    def __call__(self, geometry: Geometry) -> float:
        """Seconds per image.

        Raises:
            ValueError: the geometry was not measured.
        """
        key = (geometry.bandwidth, geometry.visible)
        if key not in self.seconds:
            known = ", ".join(f"B={format_size(size)} with {visible}" for size, visible in self.seconds)
            raise ValueError(
                f"the calibration holds no steps at B={format_size(geometry.bandwidth)} with {geometry.visible} "
                f"visible patches, only {known}: calibrate this configuration anew; and one stage must have the final "
                "size, since an image of that is the budget's unit"
            )
        return self.seconds[key]


def _check(calibration: Calibration) -> None:
    """Raise ValueError where a number is of another type than `calibrate` writes, or impossible."""
    if not calibration.timings:
        raise ValueError("it has no timings")
    for name in ("title", "device", "precision", "torch", "date"):
        if not isinstance(getattr(calibration, name), str):
            raise ValueError(f"{name} is {getattr(calibration, name)!r}")
    counts = {name: getattr(calibration, name) for name in ("processes", "threads", "workers")}
    for timing in calibration.timings:
        if not isinstance(timing.filtered, bool):
            raise ValueError(f"filtered is {timing.filtered!r}")
        if len(timing.bandwidth) != 2 or len(timing.image) != 3:
            raise ValueError(f"bandwidth is {timing.bandwidth!r}, image {timing.image!r}")
        sides = {f"bandwidth and image, place {place}": n for place, n in enumerate((*timing.bandwidth, *timing.image))}
        counts |= sides | {name: getattr(timing, name) for name in ("visible", "batch", "blocks")}
        seconds = {name: getattr(timing, name) for name in ("seconds", "step_seconds", "data_seconds", "spread")}
        optional = {"memory": timing.memory, "flops_per_image": timing.flops_per_image}
        _check_numbers(counts, (int,))
        _check_numbers(seconds | {name: value for name, value in optional.items() if value is not None}, (int, float))
        if not timing.seconds > 0:
            raise ValueError(f"seconds is {timing.seconds}")


def _check_numbers(values: dict[str, Any], kinds: tuple[type, ...]) -> None:
    for name, value in values.items():
        if type(value) not in kinds or not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value!r}")


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Values whose lists, as JSON has them, are tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
