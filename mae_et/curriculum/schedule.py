"""Learning rate and augmentation as functions of u, the fraction of the curriculum's axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `minimum`.

    MAE's schedule (arXiv 2111.06377, appendix A.1) with its epoch axis replaced by u, so that it is continuous
    across stages whatever they cost. MAE's 40 of 400 warm-up epochs are `warmup=0.1`.

    Attributes:
        peak: highest learning rate (already scaled with the batch).
        warmup: fraction of the axis spent warming up, in [0, 1).
        minimum: learning rate at u = 1.
    """

    peak: float = 1.0
    warmup: float = 0.1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is outside [0, 1): it is a fraction of the budget")
        if not 0 <= self.minimum <= self.peak:
            raise ValueError(f"learning rates must satisfy 0 <= minimum <= peak; got {self.minimum}, {self.peak}")

    def __call__(self, u: float) -> float:
        """Learning rate at u in [0, 1]."""
        if u < self.warmup:
            return self.peak * u / self.warmup
        progress = (u - self.warmup) / (1 - self.warmup)
        return self.minimum + (self.peak - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))

    def highest(self, start: float, end: float) -> float:
        """Highest learning rate within [start, end] of the axis."""
        return self(min(max(self.warmup, start), end))


def ramp(ends: tuple[float, float], u: float) -> float:
    """Linear interpolation from `ends[0]` at u = 0 to `ends[1]` at u = 1 (EfficientTrain++ section 4.3: m = 9u)."""
    return ends[0] + (ends[1] - ends[0]) * u
