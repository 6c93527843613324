"""Compiled blocks beside plain ones."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mae_et.bench.report import CompileTrial
from mae_et.bench.steps import ROUNDS, Geometry, turns_within
from mae_et.bench.subject import Subject
from mae_et.engine.distributed import Ranks, any_rank
from mae_et.rehearsal import Rehearsal

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps what it has compiled, by its documentation."""


@contextmanager
def empty_cache() -> Iterator[None]:
    """Compile as for the first time on a machine."""
    before = os.environ.get(CACHE)
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            torch.compiler.reset()
            if before is None:
                del os.environ[CACHE]
            else:
                os.environ[CACHE] = before


def compare_compiled(
    subject: Subject, ranks: Ranks, places: Sequence[int], images: Sequence[int], seconds: float
) -> tuple[dict[int, CompileTrial], str | None]:
    """Steps of both kinds in turns, on a state each.

    Args:
        subject, ranks: of the run.
        places: of the geometries that are measured, in the order in which a run meets them.
        images: of a micro-batch at each.
        seconds: of steps, for all of it; compiling comes on top.

    Returns:
        Trials by place; and why there are none, in words, or None.
    """
    failure = None
    with empty_cache():
        try:
            found = _compare(subject, ranks, places, images, seconds)
        except RuntimeError as error:  # the compiler's errors, and those of memory, which holds two states here
            found, failure = {}, str(error).strip().splitlines()[0]
    if any_rank([failure is not None])[0]:
        return {}, f"compiling failed: {failure or 'on another rank'}"
    return found, None


def _compare(
    subject: Subject, ranks: Ranks, places: Sequence[int], images: Sequence[int], seconds: float
) -> dict[int, CompileTrial]:
    """`compare_compiled`, raising what goes wrong."""
    block = seconds / (2 * ROUNDS * len(places))
    runs = []
    for choice in ("never", "always"):
        rehearsal = Rehearsal(subject.rehearse(ranks, choice), ranks, subject.config.seed, 3 * block)
        pairs = rehearsal.geometries()
        runs.append([Geometry(rehearsal, *pairs[place]) for place in places])
    plain, compiled = runs
    found = {}
    for place, size, before, after in zip(places, images, plain, compiled):
        once = [before.seconds(size) for _ in range(2)][-1]
        first = [after.seconds(size) for _ in range(3)]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in turns_within(seconds / len(places)):
            for geometry, values in zip((before, after), times):
                values.append(geometry.seconds(size, max(1, round(block / once))))
        usual = statistics.median(times[1])
        spent = sum(max(0.0, value - usual) for value in first)
        found[place] = CompileTrial(size, statistics.median(times[0]), usual, spent)
    return found
