"""The metrics file of a run: one JSON object a line, append-only. It is the truth; everything else is a view of it.

Strict JSON has no NaN and no infinity, and a diverged loss must not become a hole, so these three values are written
as the strings "NaN", "Infinity" and "-Infinity"; `read_metrics` gives them back as floats.

A row reaches the kernel in one `write` on an O_APPEND descriptor. Killing the process (SIGKILL included) therefore
loses no finished row and leaves at most one torn last line: text without its newline.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_et.tracking.tracker import plain_number

_SPELLED_OUT = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlTracker:
    """Appends rows to a metrics file, which it creates; a torn last line left by a killed run is removed.

    One process at a time may write the file (the run folder's lock holds that).
    """

    essential = True

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        os.ftruncate(self._descriptor, _whole_lines_size(self.path))

    def log(self, metrics: Mapping[str, float | int | str], step: int) -> None:
        """Append one row: "step" first, then the metrics in their own order.

        Raises: TypeError for a value that is no number and no string; OSError where the disk is full or gone.
        """
        values = {name: plain_number(name, value) for name, value in metrics.items() if name != "step"}
        self._append({"step": int(step), **values})

    def images(self, pictures: Mapping[str, Path], step: int) -> None:
        """Append a row {"step", "pictures": {name: path relative to the metrics file's folder}}.

        Raises: OSError where the disk is full or gone.
        """
        folder = self.path.resolve().parent
        paths = {
            name: Path(os.path.relpath(Path(path).resolve(), folder)).as_posix() for name, path in pictures.items()
        }
        self._append({"step": int(step), "pictures": paths})

    def finish(self, exit_code: int) -> None:
        """Force the rows to the disk and close the file."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self._descriptor is not None, f"{self.path}: logged to after finish()"
        line = _to_line(row)
        size = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        if written < len(line):
            # A full disk takes the part that fits. Left there, it would become a corrupt middle line.
            os.ftruncate(self._descriptor, size)
            raise OSError(
                f"{self.path}: only {written} of the {len(line)} bytes of step {row['step']} could be written; "
                "free some space and resume the run"
            )


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, in the order written; rows of `images` have a "pictures" mapping.

    A torn last line (one without its newline: the process was killed in mid-write) is left out.

    Raises: FileNotFoundError; ValueError, naming file and line, for any other line that is not a JSON object.
    """
    return [row for _, _, row in _numbered_rows(Path(path))]


def truncate_metrics(path: Path | str, step: int) -> int:
    """Drop what lies after a checkpoint, so that a resumed run repeats no row; returns the number of rows dropped.

    Removes each row with row["step"] > step, and a torn last line. The kept lines stay the same to the byte. The file
    is replaced atomically (temporary file, fsync, rename), so a kill leaves the old file or the new one. A missing
    file is left missing. Call it before `JsonlTracker` opens the file: an open descriptor would write to the old one.

    Raises: ValueError, naming file and line, for a line that is not a JSON object with a "step".
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for number, line, row in _numbered_rows(path):
        if not isinstance(row.get("step"), int | float):
            raise ValueError(f'{path}, line {number} has no "step": {line[:80]!r}; remove that line')
        if row["step"] <= step:
            kept.append(line)
        else:
            dropped += 1
    _replace(path, b"".join(kept))
    return dropped


def _numbered_rows(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield (line number from 1, line with its newline, row) for every whole line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): {line[:80]!r}. A killed run tears the last line "
                    "only, so this file was damaged otherwise; repair or remove that line"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is JSON but no object: {line[:80]!r}; remove that line")
            yield number, line, {name: _unspell(value) for name, value in row.items()}


def _to_line(row: Mapping[str, Any]) -> bytes:
    strict = {name: _spell(value) for name, value in row.items()}
    return json.dumps(strict, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _spell(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _unspell(value: Any) -> Any:
    return _SPELLED_OUT.get(value, value) if isinstance(value, str) else value


def _whole_lines_size(path: Path) -> int:
    """Bytes up to and including the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:  # never through a link that waits there
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
