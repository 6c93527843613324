"""Saves that fail for a while, and samples that are remembered."""

from __future__ import annotations

import pytest
import torch

from mae_et.data.loader import Batch
from mae_et.engine.checkpoint import CheckpointError, SaveError
from mae_et.engine.faults import RecentSamples, Saving


class Disk:
    """A disk that has no room at some attempts, counted from 1."""

    def __init__(self, *full: int):
        self.full, self.attempts = full, 0

    def save(self) -> None:
        self.attempts += 1
        if self.attempts in self.full:
            raise SaveError("no space left on device")


def test_a_failed_save_warns_and_is_tried_again(capsys):
    disk = Disk(1, 2, 4, 5)
    saving = Saving(disk.save)
    for _ in range(6):  # two in a row, a good one, two in a row, a good one
        saving.attempt(last=False)
    assert disk.attempts == 6
    said = capsys.readouterr().err
    assert said.count("warning: no space left on device. Training goes on") == 4
    assert "(2 of 3)" in said


def test_three_failures_in_a_row_end_the_run():
    saving = Saving(Disk(2, 3, 4).save)
    for _ in range(3):
        saving.attempt(last=False)
    with pytest.raises(SaveError):
        saving.attempt(last=False)


def test_the_last_save_must_succeed():
    with pytest.raises(SaveError):
        Saving(Disk(1).save).attempt(last=True)


def test_weights_that_are_not_finite_are_no_matter_of_room():
    def save() -> None:
        raise CheckpointError("not saved: NaN")

    with pytest.raises(CheckpointError, match="NaN"):
        Saving(save).attempt(last=False)


def batch(first: int) -> Batch:
    indices = torch.arange(first, first + 3)
    return Batch(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), -torch.ones(3), indices + 100, indices)


def test_samples_of_the_last_steps_are_named():
    recent = RecentSamples(micro_batches=4)
    for step in range(5):
        for micro in range(2):
            recent.note(step, batch(10 * step + 3 * micro))
    assert recent.gather(range(3, 5)) == [
        {"step": step, "image": image, "seed": image + 100}
        for step in (3, 4)
        for image in range(10 * step, 10 * step + 6)
    ]
    assert recent.gather(range(4, 5))[0]["step"] == 4
    assert {row["step"] for row in recent.gather(range(5))} == {3, 4}  # no more than it was told to remember
