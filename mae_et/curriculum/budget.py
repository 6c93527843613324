"""Budgets in the units that people have, and the epochs that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mae_et.curriculum.calibration import Calibration
from mae_et.curriculum.plan import Plan

SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0, "days": 86400.0}
UNITS = ("epochs", "flops", "gpu_hours", *SECONDS)

PlanOf = Callable[[float, float], Plan]
"""(epochs, times) to the plan of a curriculum for so many epochs, each of its stages `times` as long."""


@dataclass(frozen=True)
class Budget:
    """What a run may spend.

    Attributes:
        amount: in the unit.
        unit: one of `UNITS`. Epochs are those of `Curriculum.plan`; FLOPs those of the plan, forward and backward;
            `gpu_hours` the hours of all processes together, on GPUs or not; the others time on the clock, of training
            alone.
    """

    amount: float
    unit: str

    @property
    def is_time(self) -> bool:
        """Whether it takes a calibration to convert it."""
        return self.unit in SECONDS or self.unit == "gpu_hours"

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """A budget from words: `400 epochs`, `2e18 flops`, `24 gpu_hours`, `30 minutes`, `1.5 hours`, `2 days`.

    Raises:
        ValueError: not a positive number and a unit; the units are listed.
    """
    number, _, unit = text.strip().partition(" ")
    unit = unit.strip().lower()
    unit = next((known for known in UNITS if unit in (known, known[:-1])), "")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not unit or not (math.isfinite(amount) and amount > 0):
        raise ValueError(
            f"{text!r} is not a budget: write a number above 0 and one of {', '.join(UNITS)}, e.g. '400 epochs' or "
            "'30 minutes'"
        )
    return Budget(amount, unit)


def spent(plan: Plan, budget: Budget, calibration: Calibration | None = None) -> float:
    """What a plan spends, in the budget's unit, epochs excepted.

    Raises:
        ValueError: a time without the calibration that it takes, or one that does not hold the plan's steps.
    """
    if budget.unit == "flops":
        assert plan.total_flops is not None
        return plan.total_flops
    if calibration is None:
        raise ValueError(f"{budget} can be converted to steps by a calibration alone")
    seconds = calibration.seconds(plan.stages)
    return seconds * calibration.processes / 3600 if budget.unit == "gpu_hours" else seconds / SECONDS[budget.unit]


# Plans so long, and stages stretched so far beyond, that rounding to whole steps is nothing beside them.
LONG, TIMES = 1e4, 1e4


def epochs_for(budget: Budget, plan_of: PlanOf, calibration: Calibration | None = None) -> float:
    """Epochs of the plan that spends a budget, to nine digits.

    But for the rounding to whole steps, what a plan spends is affine in its epochs: in proportion to them, or, for
    sizes that grow every so many epochs, the growth's cost and then in proportion. So two long plans tell the epochs
    whose unrounded plan spends the budget; the plan itself rounds each stage to the nearest step, and spends at most
    half a step of every stage more or less.

    Raises:
        ValueError: too little for the curriculum, or whatever `spent` and `plan_of` refuse.
    """
    if budget.unit == "epochs":
        return budget.amount
    one, two = (spent(plan_of(epochs, TIMES), budget, calibration) / TIMES for epochs in (LONG, 2 * LONG))
    epochs = LONG + (budget.amount - one) / (two - one) * LONG
    if epochs <= 0:
        raise ValueError(f"{budget} is too little for a step of every stage")
    return float(f"{epochs:.9g}")
