"""How far a packing is: one line that is written over on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
import time

_SECONDS = {True: 0.5, False: 30.0}  # between two lines, on a terminal and elsewhere


class Progress:
    """Counts images, and says so now and then.

    Args:
        title: what is packed.
        total: images.
        done: of them before this process began.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.before, self.done = title, total, done, done
        self.started = self.shown = time.monotonic()
        self.is_terminal = sys.stdout.isatty()
        if done:
            self.say(f"{title}: {done:,} of {total:,} images are packed already")

    def add(self, images: int, bad: int) -> None:
        """Count so many more; `bad` is how many could not be read in all."""
        self.done += images
        now = time.monotonic()
        if now - self.shown < _SECONDS[self.is_terminal]:
            return
        self.shown = now
        rate = (self.done - self.before) / (self.seconds)
        left = f", {(self.total - self.done) / rate / 60:.0f} min to go" if rate else ""
        line = f"{self.title}: {self.done:,} of {self.total:,} images, {rate:,.0f} a second, {bad:,} left out{left}"
        print(f"\r{line}\x1b[K" if self.is_terminal else line, end="" if self.is_terminal else "\n", flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        print(f"\r\x1b[K{text}" if self.is_terminal else text, flush=True)

    @property
    def seconds(self) -> float:
        """Since this process began."""
        return time.monotonic() - self.started

    def end(self) -> None:
        """Leave no line behind."""
        if self.is_terminal:
            print("\r\x1b[K", end="", flush=True)
