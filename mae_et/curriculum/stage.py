"""One stage of a curriculum, and the exact counting of patches."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any


def as_size(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) in px from one number (square) or a pair.

    Raises:
        ValueError: a side is not a positive whole number, or there are not one or two of them.
    """
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"a size is one positive whole number or (height, width), in px; got {value!r}")
    return sides


def format_size(size: tuple[int, int]) -> str:
    """`96` for a square, `96x192` (height x width) otherwise."""
    height, width = size
    return str(height) if height == width else f"{height}x{width}"


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of `size` px.

    Raises:
        ValueError: the patch does not divide both sides.
    """
    if any(side % patch_size for side in size):
        raise ValueError(f"B={format_size(size)} px is not a multiple of the patch size {patch_size} px")
    return size[0] // patch_size, size[1] // patch_size


def visible_tokens(tokens: int, mask_ratio: float) -> int:
    """How many of `tokens` patches stay visible: floor(tokens * (1 - mask_ratio)), in exact arithmetic.

    In floating point `int(100 * (1 - 0.8))` is 19; here it is 20. For MAE's ratio of 0.75 both give
    9 of 36, 25 of 100 and 49 of 196.

    Raises:
        ValueError: the ratio is outside [0, 1), or no patch would stay visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} is outside [0, 1)")
    visible = int(tokens * (1 - Fraction(str(mask_ratio))))
    if visible < 1:
        raise ValueError(f"mask_ratio={mask_ratio} leaves none of {tokens} patches visible: lower the ratio")
    return visible


@dataclass(frozen=True)
class Stage:
    """A stretch of the budget at one bandwidth.

    Attributes:
        end: fraction of the curriculum's axis at which the stage ends, in (0, 1].
        bandwidth: B, the (height, width) in px fed to the model; one number means a square.
        mask_ratio: share of the patches hidden in this stage; None takes the plan's.
        visible: patches that stay visible, in place of a mask ratio.
        batch_scale: the stage's batch in multiples of the plan's (EfficientTrain++ section 5.3: early large batch).
        magnitude: augmentation magnitude at the stage's start and end, one number for both; None takes the
            curriculum's ramp.
        low_pass: radius in cycles per image of a circular low-pass filter on what the model sees (EfficientTrain++
            Table 2); None filters nothing.
        replay: steps on images from the replay buffer after each step on fresh ones; None takes the plan's.

    Raises:
        ValueError: mask ratio and visible patches at once, or numbers out of range.
    """

    end: float
    bandwidth: tuple[int, int]
    mask_ratio: float | None = None
    visible: int | None = None
    batch_scale: int = 1
    magnitude: tuple[float, float] | None = None
    low_pass: float | None = None
    replay: int | None = None

    def __init__(
        self,
        end: float,
        bandwidth: int | tuple[int, int],
        mask_ratio: float | None = None,
        *,
        visible: int | None = None,
        batch_scale: int = 1,
        magnitude: float | tuple[float, float] | None = None,
        low_pass: float | None = None,
        replay: int | None = None,
    ):
        if mask_ratio is not None and visible is not None:
            raise ValueError(f"mask_ratio={mask_ratio} and visible={visible}: a stage takes one of them")
        if batch_scale < 1:
            raise ValueError(f"batch_scale={batch_scale} of a stage must be at least 1")
        if replay is not None and replay < 0:
            raise ValueError(f"replay={replay} of a stage must be at least 0")
        if low_pass is not None and not low_pass > 0:
            raise ValueError(f"low_pass={low_pass:g} of a stage must be a radius above 0, in cycles per image")
        ends = (magnitude, magnitude) if isinstance(magnitude, int | float) else magnitude
        if ends is not None and (len(ends) != 2 or not all(isinstance(m, int | float) and m >= 0 for m in ends)):
            raise ValueError(f"magnitude={magnitude!r} of a stage must be a number or [first, last], at least 0")
        object.__setattr__(self, "end", float(end))
        object.__setattr__(self, "bandwidth", as_size(bandwidth))
        object.__setattr__(self, "mask_ratio", mask_ratio)
        object.__setattr__(self, "visible", visible)
        object.__setattr__(self, "batch_scale", batch_scale)
        object.__setattr__(self, "magnitude", ends)
        object.__setattr__(self, "low_pass", low_pass)
        object.__setattr__(self, "replay", replay)


def stage_in_proportion(stage: Stage, found_for: tuple[int, int], size: tuple[int, int], stride: int) -> Stage:
    """A stage of a curriculum for one final (height, width) in px, for another one.

    Its B keeps its proportion to the final size, to the nearest multiple of `stride` px, the larger one in a tie.
    """
    sides = (int(side * new / (old * stride) + 0.5) for side, old, new in zip(stage.bandwidth, found_for, size))
    height, width = (max(1, side) * stride for side in sides)
    return replace_stage(stage, bandwidth=(height, width))


def replace_stage(stage: Stage, **changes: Any) -> Stage:
    """The stage with some attributes changed."""
    return Stage(**{**vars(stage), **changes})
