"""Learning rate and augmentation as functions of u, the fraction of the curriculum's axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAYS = ("cosine", "linear", "steps")


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `peak`, then down to `minimum`: half a cosine, a line, or two steps.

    MAE's schedule (arXiv 2111.06377, appendix A.1) with its epoch axis replaced by u, so that it is continuous
    across stages whatever they cost. MAE's 40 of 400 warm-up epochs are `warmup=0.1`.

    Attributes:
        peak: highest learning rate (already scaled with the batch).
        warmup: fraction of the axis spent warming up, in [0, 1).
        minimum: learning rate at u = 1.
        decay: "cosine"; "linear", as semantic segmentation is trained (a "poly" schedule of power 1); "steps", a tenth
            from each of `drops` on, never below `minimum`.
        drops: fractions of the axis, in [0, 1]. The default is COCO's "1x" schedule: after epochs 8 and 11 of 12.
    """

    peak: float = 1.0
    warmup: float = 0.1
    minimum: float = 0.0
    decay: str = "cosine"
    drops: tuple[float, ...] = (8 / 12, 11 / 12)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is outside [0, 1): it is a fraction of the budget")
        if not 0 <= self.minimum <= self.peak:
            raise ValueError(f"learning rates must satisfy 0 <= minimum <= peak; got {self.minimum}, {self.peak}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay {self.decay!r} is unknown; use one of {', '.join(DECAYS)}")
        if not all(0 <= drop <= 1 for drop in self.drops):
            raise ValueError(f"drops {self.drops} are fractions of the budget: each must be in [0, 1]")

    def __call__(self, u: float) -> float:
        """Learning rate at u in [0, 1]."""
        if u < self.warmup:
            return self.peak * u / self.warmup
        if self.decay == "steps":
            return max(self.minimum, self.peak * 0.1 ** sum(u >= drop for drop in self.drops))
        progress = (u - self.warmup) / (1 - self.warmup)
        left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.minimum + (self.peak - self.minimum) * left

    def highest(self, start: float, end: float) -> float:
        """Highest learning rate within [start, end] of the axis."""
        return self(min(max(self.warmup, start), end))


def ramp(ends: tuple[float, float], u: float) -> float:
    """Linear interpolation from `ends[0]` at u = 0 to `ends[1]` at u = 1 (EfficientTrain++ section 4.3: m = 9u)."""
    return ends[0] + (ends[1] - ends[0]) * u
