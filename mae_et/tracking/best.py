"""The best of every score so far and what it had cost, from rows of metrics: what a table of runs is sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

SCORES = ("eval/", "val/")  # taken during training; all are the better the higher
COSTS = {"flops": "compute/flops", "hours": "time/hours", "fraction": "compute/fraction"}


class BestScores:
    """Follows rows of metrics, in their order; of equal scores the first counts.

    Args:
        rows: that are there already, as of a run that continues.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        self._best: dict[str, float] = {}
        self.summary: dict[str, float] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Take in one row.

        Returns:
            What is new in `summary`: "best/eval/probe", and "best/eval/probe_at_flops", "_at_hours", "_at_fraction"
            where the row has these axes.
        """
        new: dict[str, float] = {}
        for name, value in row.items():
            if not name.startswith(SCORES) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if value > self._best.get(name, -math.inf):
                self._best[name] = new[f"best/{name}"] = value
                new.update({f"best/{name}_at_{cost}": row[axis] for cost, axis in COSTS.items() if axis in row})
        self.summary.update(new)
        return new
