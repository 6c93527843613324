"""What goes wrong in a run that goes on: steps that are left out, saves that fail, and what is written down of them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mae_et.data.loader import Samples
from mae_et.engine.checkpoint import SaveError
from mae_et.engine.distributed import Ranks, as_told_by_main, gather_rows, on_main, told_by_main
from mae_et.engine.run_folder import write_text_atomic
from mae_et.engine.state import TrainState
from mae_et.tracking.tracker import warn

FAILED_SAVES = 3  # in a row, after which a run ends rather than train on for days unsaved


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class RecentSamples:
    """Which samples the last micro-batches of this rank held, in case their steps turn out not to be finite.

    Args:
        micro_batches: how many to remember.
    """

    def __init__(self, micro_batches: int):
        self._held: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=micro_batches)

    def note(self, step: int, batch: Samples) -> None:
        """Remember a micro-batch of a step; nothing of it may be on the device yet."""
        # Copies, because a worker's tensors hold on to pieces of shared memory.
        self._held.append((step, batch.indices.clone(), batch.seeds.clone()))

    def gather(self, steps: range) -> list[dict[str, int]]:
        """Samples of these steps on all ranks, as rows; all ranks call it together."""
        held = [entry for entry in self._held if entry[0] in steps]
        columns = [
            torch.cat([torch.full_like(indices, step) for step, indices, _ in held]),
            torch.cat([indices for _, indices, _ in held]),
            torch.cat([seeds for _, _, seeds in held]),
        ]
        rows = gather_rows(torch.stack(columns, dim=1)).tolist()
        return [{"step": step, "image": image, "seed": seed} for step, image, seed in sorted(rows)]


class NonFinite:
    """Stops a run whose losses or gradients have not been finite for too long, and says on which samples.

    Args:
        limit: steps in a row.
        path: of the list of samples, JSON lines.
        describe: an image's path by its index.
        ranks: of the run.
    """

    def __init__(self, limit: int, path: Path, describe: Callable[[int], str], ranks: Ranks):
        self.limit, self.path, self.describe, self.ranks = limit, path, describe, ranks

    def check(self, state: TrainState, recent: RecentSamples) -> None:
        """Look at the count, which waits for the device; all ranks call it together.

        Raises:
            TrainingError: there were `limit` such steps in a row, or more, since the last look. Under fp16 only once
                the scaler has no scale left to lower: overflow is its business.
        """
        longest, in_a_row = int(state.longest_skipped.item()), int(state.skipped_in_a_row.item())
        state.longest_skipped.copy_(state.skipped_in_a_row)
        if longest < self.limit or (state.scaler is not None and state.scaler.get_scale() >= 1):
            return
        # Where the row of bad steps has ended before the look, all steps that are remembered are listed.
        rows = recent.gather(range(state.step - in_a_row if in_a_row == longest else 0, state.step))
        on_main(self.ranks, lambda: self._write(rows))
        error = TrainingError(
            f"loss or gradients were not finite for {longest} steps in a row (engine.max_skipped={self.limit}) up to "
            f"step {state.step}; the weights are those from before, and the samples of these steps are listed in "
            f"{self.path}. engine.precision=fp32 continues the run from its last checkpoint; a lower optim.base_lr or "
            "optim.clip=1.0 is another run, with run=..."
        )
        raise error if self.ranks.is_main else as_told_by_main(error)

    def _write(self, rows: list[dict[str, int]]) -> None:
        lines = (json.dumps({**row, "path": self.describe(row["image"])}) + "\n" for row in rows)
        try:
            write_text_atomic(self.path, "".join(lines))
        except OSError as error:
            warn(f"{self.path} could not be written: {error.strerror or error}")


class Saving:
    """Saves that may fail for a while, as on a disk that is full until somebody makes room.

    Args:
        save: gathers and writes a checkpoint; all ranks call it together, and all raise what the main rank raises.
    """

    def __init__(self, save: Callable[[], None]):
        self.save, self.failures = save, 0

    def attempt(self, last: bool) -> None:
        """Save, or warn and leave it to the next occasion.

        Args:
            last: there is no other occasion.

        Raises:
            SaveError: it failed, and it was the last one or the third in a row.
        """
        try:
            self.save()
        except SaveError as error:
            self.failures += 1
            if last or self.failures >= FAILED_SAVES:
                raise
            if not told_by_main(error):
                warn(f"{error}. Training goes on, and the next save is tried ({self.failures} of {FAILED_SAVES})")
        else:
            self.failures = 0
