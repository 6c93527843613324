"""What the data path delivers, without the step."""

from __future__ import annotations

import math

from mae_et.bench.report import DataPath
from mae_et.bench.steps import Geometry

CHUNK = 32
"""Images of a batch here. Large batches would take seconds each; how large they are makes no difference."""

TURNS = 2
"""In which a worker is timed at every stage; the means of them are kept."""


def delivered(geometry: Geometry, workers: int, seconds: float, turn: int = 0) -> float:
    """Images a second of each process's workers, of the slowest process.

    Args:
        geometry: whose images.
        workers: processes, which do nothing else.
        seconds: of measuring, after each has delivered once.
        turn: every one reads other images.
    """
    rehearsal = geometry.rehearsal
    repeats = rehearsal.assembly.repeats
    chunk = repeats * math.ceil(CHUNK / repeats)
    # Well past what earlier turns read, which the system keeps in memory.
    first = min(geometry.first + 1000 * turn, geometry.first + geometry.stage.steps - 1)
    with rehearsal.batches(first, workers, chunk) as batches:
        for _ in range(workers):
            next(batches)
        once = rehearsal.timed(lambda: next(batches), workers)
        rounds = max(1, round((seconds - once * workers) / (once * workers)))
        return chunk / rehearsal.timed(lambda: next(batches), rounds * workers)


def measure_workers(geometries: list[Geometry], seconds: float) -> list[DataPath]:
    """One worker at each geometry, the geometries in turns."""
    share = seconds / (TURNS * len(geometries))
    rates: list[list[float]] = [[] for _ in geometries]
    for turn in range(TURNS):
        places = range(len(geometries)) if turn % 2 == 0 else reversed(range(len(geometries)))
        for place in places:
            rates[place].append(delivered(geometries[place], 1, share, turn))
    return [DataPath(TURNS / sum(1 / rate for rate in values)) for values in rates]
