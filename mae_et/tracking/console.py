"""A run's progress for a person: one line that rewrites itself on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from mae_et.tracking.tracker import plain_number

# Metrics of these names make the progress line; a metric of any other name is news, and gets a line that stays.
_PROGRESS_NAMES = ("step", "images_seen")
_PROGRESS_GROUPS = ("train/", "stage/", "throughput/", "compute/", "time/", "eta/")

# Where the terminal is narrow, fields leave in this order.
_LEAVES_FIRST = ("data wait", "lr", "rate", "u", "stage", "eta", "loss")


class ConsoleTracker:
    """Prints progress: `step 1200/3400  u 0.412  stage 2/3 B=160  loss 0.0312  lr 1.4e-03  1,240 img/s  ...`.

    On a terminal the line is rewritten in place (a carriage return, nothing else) and loses its least important fields
    where the terminal is too narrow; elsewhere each call prints a line. A stage that begins, metrics outside of the
    loop's own groups (such as "eval/knn") and pictures get lines that stay.

    Args:
        total_steps: the run's length in optimizer steps.
        stream: where to print; None is the process's stderr.
        is_terminal: None asks the stream.
        stages: the number of stages, for "stage 2/3"; None prints "stage 2".

    A stream that goes away (a closed terminal) ends the printing and not the run.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        stages: int | None = None,
    ):
        self.total_steps = total_steps
        self.stages = stages
        output: TextIO = sys.stderr if stream is None else stream
        self._stream: TextIO | None = output
        self._is_terminal = output.isatty() if is_terminal is None else is_terminal
        self._open_width = 0
        self._stage: int | None = None

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Print what is new in one row."""
        values = {name: plain_number(name, value) for name, value in metrics.items()}
        self._announce_stage(values, step)
        news = {name: value for name, value in values.items() if not _is_progress(name)}
        if news:
            self._print("  ".join([self._position(step), *(f"{name} {_short(v)}" for name, v in news.items())]))
        fields = self._fields(values)
        if fields:
            self._show_progress({"step": self._position(step), **fields})

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Print where each picture lies."""
        for name, path in pictures.items():
            self._print(f"{self._position(step)}  {name}: {path}")

    def finish(self, exit_code: int) -> None:
        """End the progress line, so that the shell's prompt starts on its own line."""
        self._end_progress()

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _stage_name(self, index: float | int | str) -> str:
        number = int(index) + 1
        return f"stage {number}" if self.stages is None else f"stage {number}/{self.stages}"

    def _announce_stage(self, values: Mapping[str, float | int | str], step: int) -> None:
        index = values.get("stage/index")
        if index is None or index == self._stage:
            return
        begun, self._stage = self._stage is not None, int(index)
        bandwidth = f": B={_short(values['stage/bandwidth'])}" if "stage/bandwidth" in values else ""
        verb = "begins" if begun else "runs"
        self._print(f"{self._position(step)}  {self._stage_name(index)} {verb}{bandwidth}")

    def _fields(self, values: Mapping[str, float | int | str]) -> dict[str, str]:
        """Format the fields of the progress line that these metrics have, in display order."""
        fields = {}
        if "compute/fraction" in values:
            fields["u"] = f"u {_fixed(values['compute/fraction'], 3)}"
        if "stage/index" in values:
            bandwidth = f" B={_short(values['stage/bandwidth'])}" if "stage/bandwidth" in values else ""
            fields["stage"] = self._stage_name(values["stage/index"]) + bandwidth
        if "train/loss" in values:
            fields["loss"] = f"loss {_fixed(values['train/loss'], 4)}"
        if "train/lr" in values:
            fields["lr"] = f"lr {float(values['train/lr']):.1e}"
        if "throughput/images_per_second" in values:
            fields["rate"] = f"{_count(values['throughput/images_per_second'])} img/s"
        if "throughput/data_wait" in values:
            fields["data wait"] = f"data wait {_fixed(100 * float(values['throughput/data_wait']), 0)}%"
        if "eta/hours" in values:
            fields["eta"] = f"eta {format_duration(3600 * float(values['eta/hours']))}"
        # An evaluation's row repeats the axes for the dashboard; that alone is no progress to show.
        return fields if "train/loss" in values else {}

    def _show_progress(self, fields: dict[str, str]) -> None:
        if not self._is_terminal:
            self._print("  ".join(fields.values()))
            return
        # The last column stays empty: writing to it wraps the line on some terminals.
        width = shutil.get_terminal_size().columns - 1
        kept = dict(fields)
        for name in _LEAVES_FIRST:
            if len("  ".join(kept.values())) <= width:
                break
            kept.pop(name, None)
        line = "  ".join(kept.values())[:width]
        self._write("\r" + line.ljust(min(self._open_width, width)))
        self._open_width = len(line)

    def _print(self, line: str) -> None:
        """Print a line that stays; the progress line, if any, gives way and comes back with the next row."""
        if self._open_width:
            self._write("\r" + " " * self._open_width + "\r")
            self._open_width = 0
        self._write(line + "\n")

    def _end_progress(self) -> None:
        if self._open_width:
            self._write("\n")
            self._open_width = 0

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "backslashreplace").decode())
            self._stream.flush()
        except (OSError, ValueError):
            # EIO or EPIPE where the terminal was closed, ValueError where the stream object was.
            self._stream = None


def format_duration(seconds: float) -> str:
    """Write a duration with its two leading units: "42s", "3m10s", "2h05m", "3d04h"; "?" where it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _is_progress(name: str) -> bool:
    return name in _PROGRESS_NAMES or name.startswith(_PROGRESS_GROUPS)


def _fixed(value: float | int | str, digits: int) -> str:
    return f"{float(value):.{digits}f}"


def _count(value: float | int | str) -> str:
    number = float(value)
    return f"{number:,.0f}" if number >= 10 or not math.isfinite(number) else f"{number:.1f}"


def _short(value: float | int | str) -> str:
    """Write a value with four significant digits, whole numbers and strings in full."""
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
