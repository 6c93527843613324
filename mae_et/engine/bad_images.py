"""The ledger of images that could not be read, in whose place a run has shown others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mae_et.data.loader import Samples
from mae_et.engine.distributed import any_rank, as_told_by_main, gather_objects
from mae_et.tracking.jsonl import JsonlTracker, truncate_metrics

NAMED = 3  # images that an error message names


class BadImagesError(RuntimeError):
    """More images cannot be read than the user allows."""


class BadImages:
    """Counts unreadable images over all ranks, lists them in a file, and ends a run that has too many.

    What is counted is part of a checkpoint, and the file follows it as the metrics do: a run that was interrupted has
    the rows of one that was not, whatever its ranks and workers.

    Args:
        path: of the file, JSON lines {"step", "image", "path", "error"}, one an image; the main rank alone writes it.
        describe: an image's path by its index.
        images: in the source.
        limit: share of them that may be unreadable.
        is_main: whether this is the main rank.
    """

    def __init__(self, path: Path, describe: Callable[[int], str], images: int, limit: float, is_main: bool):
        self.path, self.describe, self.images, self.limit, self.is_main = path, describe, images, limit, is_main
        self.replaced = 0  # samples of all ranks, as far as gathered
        self.listed: set[int] = set()
        self._first: list[str] = []  # what was wrong with the first listed ones
        self._unlisted: dict[int, str] = {}  # gathered, and without a row as yet
        self._noted: dict[int, str] = {}  # by this rank since it was last gathered
        self._noted_replaced = 0
        self._file_step: int | None = 0  # up to which the file's rows hold; None once the others are dropped

    def note(self, batch: Samples) -> None:
        """Remember what this rank could not read of a micro-batch."""
        if not batch.bad:
            return
        for image, error in batch.bad:
            self._noted.setdefault(image, printable(error))
        bad = {image for image, _ in batch.bad}
        self._noted_replaced += sum(image in bad for image in batch.indices.tolist())

    def gather(self) -> None:
        """Put together what the ranks noted, as every checkpoint needs it; all ranks call it together."""
        (something,) = any_rank([bool(self._noted)])
        if not something:
            return
        for noted, replaced in gather_objects((self._noted, self._noted_replaced)):
            self.replaced += replaced
            for image, error in noted.items():
                if image not in self.listed:
                    self._unlisted.setdefault(image, error)
        self._noted, self._noted_replaced = {}, 0

    def settle(self, step: int) -> dict[str, float]:
        """Bring the file up to date after `step` steps; all ranks call it together, at every row of metrics.

        Returns:
            "data/replaced": samples shown so far in place of unreadable ones, replays of them not counted again;
            "data/bad_images": how many images that were. Nothing while there are none.

        Raises:
            BadImagesError: there are more than the limit allows; on all ranks.
            OSError: the file cannot be written; on the main rank.
        """
        self.gather()
        new = sorted(self._unlisted.items())
        if self.is_main:
            self._write(new, step)
        self.listed.update(image for image, _ in new)
        self._first += [error for _, error in new[: NAMED - len(self._first)]]
        self._unlisted = {}
        if not self.listed:
            return {}
        if len(self.listed) > self.limit * self.images:
            error = BadImagesError(self._too_many())
            raise error if self.is_main else as_told_by_main(error)
        return {"data/replaced": self.replaced, "data/bad_images": len(self.listed)}

    def values(self) -> dict[str, Any]:
        """JSON values of a checkpoint; `gather` comes first."""
        return {
            "replaced": self.replaced,
            "listed": sorted(self.listed),
            "first": list(self._first),
            "unlisted": [[image, error] for image, error in sorted(self._unlisted.items())],
        }

    def restore(self, values: Mapping[str, Any], step: int) -> None:
        """Continue from a checkpoint after `step` steps, the same values on all ranks.

        The file's rows of later steps go when it is next settled.
        """
        self.replaced, self.listed, self._first = values["replaced"], set(values["listed"]), list(values["first"])
        self._unlisted = dict(values["unlisted"])
        self._noted, self._noted_replaced = {}, 0
        self._file_step = step

    def _write(self, new: list[tuple[int, str]], step: int) -> None:
        if self._file_step is not None:
            truncate_metrics(self.path, self._file_step)
            self._file_step = None
        if not new:
            return
        file = JsonlTracker(self.path)
        try:
            for image, error in new:
                path = printable(self.describe(image))
                file.log({"image": image, "path": path, "error": error.removeprefix(f"{path}: ")}, step)
        finally:
            file.finish(0)

    def _too_many(self) -> str:
        bad = len(self.listed)
        more = f"; and {bad - NAMED:,} more" if bad > NAMED else ""
        return (
            f"{bad:,} of {self.images:,} images could not be read, more than data.max_bad={self.limit:g} allows: "
            f"{'; '.join(self._first)}{more}. {self.path} lists them all. Mend them, or raise data.max_bad to do "
            "without them; the same command then continues the run from its last checkpoint"
        )


def printable(text: str) -> str:
    r"""A text in which bytes of file names that are no UTF-8 are spelled out, as \xff: JSON and fonts refuse them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
