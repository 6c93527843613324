"""Drop path does not know how a step is divided into ranks and micro-batches."""

from __future__ import annotations

import pytest

from tests.end_to_end.labelled import TINY_VIT, finetune_here, write_classes
from tests.end_to_end.tiny import history
from tests.engine.ranks import run_ranks

CHANGES = [
    *(*TINY_VIT, "model.depth=4", "model.drop_path=0.3", "engine.precision=fp32", "optim.layer_decay=null"),
    *("epochs=7", "optim.base_lr=0.1", "evaluation.every=null"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    return losses(finetune_here(images, tmp_path_factory.mktemp("alone") / "run", *CHANGES))


def losses(run) -> list[float]:
    found = [row["train/loss"] for row in history(run) if "train/loss" in row][:20]
    assert len(found) == 20
    return found


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_drop_what_the_whole_batch_drops(images, alone, tmp_path, accumulation):
    run = finetune_here(images, tmp_path / "run", *CHANGES, f"optim.accumulation={accumulation}")
    # fp32 sums in another order, grown by 20 steps of training.
    assert losses(run) == pytest.approx(alone, rel=1e-5)


def test_drop_path_matters_here(images, alone, tmp_path):
    without = losses(finetune_here(images, tmp_path / "run", *CHANGES, "model.drop_path=0"))
    # A hundred times what the tests here let pass.
    assert without != pytest.approx(alone, rel=1e-3)


def test_two_ranks_drop_what_one_drops(images, alone, tmp_path):
    run_ranks(2, finetune_here, images, tmp_path / "run", *CHANGES, "optim.accumulation=2")
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)
