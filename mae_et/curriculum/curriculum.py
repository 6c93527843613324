"""`Curriculum`: what the model sees at each fraction of a budget, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mae_et.curriculum.cost import AreaCost, CostModel
from mae_et.curriculum.plan import Plan, check_ends, make_plan
from mae_et.curriculum.presets import PRESETS, preset_stages
from mae_et.curriculum.schedule import LearningRate
from mae_et.curriculum.stage import Stage, as_size

Axis = Literal["compute", "epoch"]


@dataclass(frozen=True)
class Curriculum:
    """Stages over an axis, and the augmentation ramp.

    Attributes:
        stages: in order; their ends rise to 1.
        name: for plans and messages.
        axis: what a stage's end is a fraction of: "compute" (EfficientTrain++) or "epoch" (EfficientTrain).
        magnitude: augmentation magnitude m at u = 0 and u = 1 (EfficientTrain++: 0 to 9; MAE uses none).

    Raises:
        ValueError: ends that do not rise to 1, or an unknown axis.
    """

    stages: tuple[Stage, ...]
    name: str = "custom"
    axis: Axis = "compute"
    magnitude: tuple[float, float] = (0.0, 9.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        check_ends(self.stages)
        if self.axis not in get_args(Axis):
            raise ValueError(f"unknown curriculum axis {self.axis!r}; known: {', '.join(get_args(Axis))}")

    @classmethod
    def preset(
        cls,
        name: str,
        final_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        magnitude: tuple[float, float] = (0.0, 9.0),
        floor: int | None = None,
    ) -> Curriculum:
        """A published schedule: "baseline", "efficienttrain", "efficienttrain_pp" or "efficienttrain_pp_deit".

        Args:
            name: the schedule.
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
        return cls(stages, name, PRESETS[name].axis, tuple(magnitude))  # pyright: ignore[reportArgumentType]

    def plan(
        self,
        *,
        epochs: float,
        images: int,
        batch: int,
        patch_size: int = 16,
        mask_ratio: float = 0.0,
        cell: int | None = None,
        cost: CostModel | None = None,
        flops: CostModel | None = None,
        learning_rate: LearningRate | None = None,
        drop_last: bool = True,
        ranks: int = 1,
        accumulation: int = 1,
    ) -> Plan:
        """The curriculum in steps, for one budget and one data set.

        Args:
            epochs: the budget, in epochs at the largest bandwidth (on the epoch axis: in epochs).
            images: images in the data set.
            batch: images per optimizer step, over all ranks and accumulation steps.
            patch_size: px, for the patch grid.
            mask_ratio: share of patches hidden; 0 for training that masks nothing.
            cell: HOG cell in px, checked against the patch; None for other targets.
            cost: cost of an image by `Geometry`; default `AreaCost()`, B^2.
            flops: multiply-adds of a forward pass by `Geometry`, for the plan's FLOPs; default none known.
            learning_rate: schedule over u; default a unit schedule that scales the caller's own peak.
            drop_last: leave out each pass's last partial batch, as the published scripts do.
            ranks: processes that share a batch.
            accumulation: micro-batches per step on each rank.

        Raises:
            ValueError: sizes that the patch or cell does not divide, no visible patch, a batch that ranks and
                accumulation do not divide, or a stage without a step; the message names the stage.
        """
        return make_plan(
            self.stages,
            name=self.name,
            axis=self.axis,
            epochs=epochs,
            images=images,
            batch=batch,
            patch_size=patch_size,
            mask_ratio=mask_ratio,
            cell=cell,
            cost=cost or AreaCost(),
            flops=flops,
            learning_rate=learning_rate or LearningRate(),
            magnitude=self.magnitude,
            drop_last=drop_last,
            ranks=ranks,
            accumulation=accumulation,
        )
