"""`Curriculum`: what the model sees at each fraction of a budget, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mae_et.curriculum.making import AXES, Terms, check_ends, make_plan
from mae_et.curriculum.plan import Plan
from mae_et.curriculum.presets import PRESETS, grow, preset_stages
from mae_et.curriculum.stage import Stage, as_size, replace_stage


@dataclass(frozen=True)
class Curriculum:
    """Stages over an axis, and the augmentation ramp.

    Attributes:
        stages: in order; their ends rise to 1.
        name: for plans and messages.
        axis: what a stage's end is a fraction of: "compute" (EfficientTrain++), "epoch" (EfficientTrain) or "step".
        magnitude: augmentation magnitude m at u = 0 and u = 1 (EfficientTrain++: 0 to 9; MAE uses none).

    Raises:
        ValueError: ends that do not rise to 1, or an unknown axis.
    """

    stages: tuple[Stage, ...]
    name: str = "custom"
    axis: str = "compute"
    magnitude: tuple[float, float] = (0.0, 9.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        check_ends(self.stages)
        if self.axis not in AXES:
            raise ValueError(f"unknown curriculum axis {self.axis!r}; known: {', '.join(AXES)}")

    @classmethod
    def preset(
        cls,
        name: str,
        final_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        magnitude: tuple[float, float] = (0.0, 9.0),
        floor: int | None = None,
    ) -> Curriculum:
        """A published schedule.

        Args:
            name: of the schedule, one of `PRESETS`.
            final_size: px of the last stage, one number or (height, width).
            patch_size: px; every stage's B is a multiple of it.
            magnitude: augmentation magnitude at u = 0 and u = 1.
            floor: smallest B in px of any stage, for a final size of 224 (160 for ConvNeXt: appendix A.1); in
                proportion for a final size not above it. None leaves the preset as published.

        Raises:
            ValueError: unknown name, or a final size that the patch does not divide.
        """
        size = as_size(final_size if isinstance(final_size, int) else (final_size[0], final_size[1]))
        stages = preset_stages(name, size, patch_size, floor)
        return cls(stages, name, PRESETS[name].axis, (magnitude[0], magnitude[1]))

    @classmethod
    def growth(
        cls,
        first: int,
        step: int,
        every: float,
        epochs: float,
        final_size: int | Sequence[int] = 224,
        magnitude: tuple[float, float] = (0.0, 9.0),
    ) -> Curriculum:
        """B from `first` px, `step` px more every `every` epochs, to the final size (arXiv 2211.05187, section 2.2).

        Args:
            first, step: px of the shorter side; the longer one keeps the aspect ratio of the final size.
            every: epochs, of the run's `epochs`.
            epochs: of the run.
            final_size: px, one number or (height, width).
            magnitude: augmentation magnitude at u = 0 and u = 1.

        Raises:
            ValueError: the run ends before the final size is reached, or numbers out of range.
        """
        size = as_size(final_size if isinstance(final_size, int) else (final_size[0], final_size[1]))
        return cls(grow(first, step, every, epochs, size), "growth", "epoch", magnitude)

    def early_large_batch(self, final_size: tuple[int, int], scales: Sequence[int] = (1, 2, 4)) -> Curriculum:
        """The curriculum with each stage's batch as large as its smaller images allow (EfficientTrain++ section 5.3).

        The paper states neither batches nor a rule; here a stage takes the largest of `scales` with which a step has
        no more patches than at the final size. A stage that scales its batch already is left as it is.
        """

        def scaled(stage: Stage) -> Stage:
            if stage.batch_scale != 1:
                return stage
            ratio = final_size[0] * final_size[1] / (stage.bandwidth[0] * stage.bandwidth[1])
            return replace_stage(stage, batch_scale=max(scale for scale in scales if scale <= max(ratio, 1)))

        return replace(self, stages=tuple(scaled(stage) for stage in self.stages))

    def plan(self, **terms: Any) -> Plan:
        """The curriculum in steps, for one budget and one data set.

        Args, by name; None takes the default:
            epochs: the budget, in epochs at the final size (on the epoch axis: in epochs; on the step axis: in epochs
                of the plain batch).
            images: images in the data set.
            batch: images per optimizer step, over all ranks and accumulation steps, where a stage does not scale it.
            patch_size: px, for the patch grid; default 16.
            mask_ratio: share of patches hidden; default 0, for training that masks nothing.
            cell: HOG cell in px, checked against the patch; None for other targets.
            final_size: (height, width) in px at which an image costs 1; default the largest stage's.
            cost: cost of an image by `Geometry`; default `AreaCost()`, B^2.
            flops: multiply-adds of a forward pass by `Geometry`, for the plan's FLOPs; default none known.
            learning_rate: schedule over u; default a unit schedule that scales the caller's own peak.
            learning_rate_cap: that larger batches may reach (Eq. 2); required where a stage scales its batch.
            more_tokens: let a scaled batch have more patches than a batch at the final size; default no.
            replay: steps on images decoded before; default none.
            drop_last: leave out each pass's last partial batch, as the published scripts do; default yes.
            ranks: processes that share a batch.
            accumulation: micro-batches per step on each rank.

        Raises:
            ValueError: sizes that the patch or cell does not divide, no visible patch, a batch that ranks and
                accumulation do not divide or that has too many patches, or a stage without a step; the message names
                the stage.
        """
        given = {name: value for name, value in terms.items() if value is not None}
        return make_plan(self.stages, self.name, self.axis, self.magnitude, Terms(**given))
