"""Where a run's numbers and pictures go: one protocol, and a tracker that passes on to several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """A consumer of metrics, called by one process of the run (rank 0).

    `metrics` is flat: names such as "train/loss", "eval/knn" or "compute/fraction" mapped to finite or non-finite
    numbers, or to short strings. `step` is the number of optimizer steps done; where metrics has a "step" of its own,
    the argument wins.

    A tracker with a class attribute `essential = True` ends the run when it fails (the metrics file: the truth must
    have no holes). Any other one must not: `MultiTracker` reports its first error and goes on without it.
    """

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Record one row of metrics."""
        ...

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Record picture files that exist already, by name."""
        ...

    def finish(self, exit_code: int) -> None:
        """Write out what is pending and close; 0 means that the run ended as planned. Nothing is logged after it."""
        ...


class MultiTracker:
    """Passes every call to each of its trackers, in the order given.

    The essential ones should come first, so that the truth is written before anything else gets the row.
    """

    def __init__(self, trackers: Iterable[Tracker]):
        self.trackers = list(trackers)

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Record one row of metrics with every tracker.

        Raises: whatever an essential tracker raises.
        """
        for tracker in list(self.trackers):
            self._attempt(tracker, lambda tracker: tracker.log(metrics, step))

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Record picture files with every tracker.

        Raises: whatever an essential tracker raises.
        """
        for tracker in list(self.trackers):
            self._attempt(tracker, lambda tracker: tracker.images(pictures, step))

    def finish(self, exit_code: int) -> None:
        """Close every tracker, even when one of them fails to.

        Raises: the error of an essential tracker, after all others are closed.
        """
        with ExitStack() as stack:
            for tracker in reversed(self.trackers):
                stack.callback(self._attempt, tracker, lambda tracker: tracker.finish(exit_code))

    def _attempt(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        """Call a tracker; where it fails and is not essential, say so and go on without it."""
        try:
            call(tracker)
        except Exception as error:
            if getattr(tracker, "essential", False):
                raise
            self.trackers.remove(tracker)
            warn(
                f"{type(tracker).__name__} failed and is off for the rest of the run "
                f"({type(error).__name__}: {error}); training continues"
            )


def plain_number(name: str, value: object) -> float | int | str:
    """Turn a metric into a Python float, int or str, so that every tracker records the same value.

    NumPy scalars and one-element arrays or tensors are unwrapped through their `item()`.

    Raises: TypeError, naming the metric, for anything else.
    """
    item = getattr(value, "item", None)
    try:
        plain = item() if callable(item) else value
    except (ValueError, RuntimeError):
        # NumPy's and torch's answers for an array of several elements.
        plain = value
    if isinstance(plain, float | int | str):
        return plain
    raise TypeError(
        f"metric {name!r} is a {type(value).__name__}; a tracker takes numbers and strings: log a float instead"
    )


def warn(message: str) -> None:
    """Print a warning to stderr, on a line of its own; a terminal that was closed must not stop a run."""
    with suppress(OSError, ValueError):
        # A terminal's progress line has no newline yet: the warning takes its place.
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}warning: {message}", file=sys.stderr)
