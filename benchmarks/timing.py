"""Alternating timings of rival functions in one process, by their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(rivals: Mapping[str, Callable[[], object]], rounds: int = 9, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each rival; every round calls all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warmup + rounds):
        for name, call in rivals.items():
            started = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, timings: Mapping[str, float]) -> None:
    """Milliseconds of each rival, and how many times as long as the first it takes."""
    first = next(iter(timings.values()))
    parts = [f"{name} {1000 * value:.2f} ms ({value / first:.2f}x)" for name, value in timings.items()]
    print(f"{title}: {', '.join(parts)}", flush=True)
