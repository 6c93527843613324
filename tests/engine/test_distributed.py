"""What ranks tell each other: results and errors of the main one, checkpoints, the largest of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mae_et.config import ConfigError
from mae_et.engine.checkpoint import Checkpoint
from mae_et.engine.distributed import (
    gather_objects,
    join_ranks,
    largest,
    leave_ranks,
    on_main,
    share_of,
    told_by_main,
)
from mae_et.engine.parallel import share_checkpoint
from mae_et.running import main_first
from tests.engine.ranks import run_ranks


def talk() -> None:
    ranks = join_ranks("cpu")
    assert largest([3 - ranks.rank, 10 * ranks.rank, 0]) == [3, 10, 0]
    assert gather_objects({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
    assert on_main(ranks, lambda: ("of the main rank", ranks.rank)) == ("of the main rank", 0)
    assert share_of([5.0, 7.0]) == [5.0, 7.0][ranks.rank]
    assert share_of([5.0, 7.0, 9.0]) == 7.0
    assert share_of(4.0) == 4.0

    def fail() -> None:
        raise ConfigError("data.root=/nowhere: no such folder")

    with pytest.raises(ConfigError, match="no such folder") as caught:
        on_main(ranks, fail)
    assert told_by_main(caught.value) == (ranks.rank != 0)
    with pytest.raises(ConfigError, match="no such folder") as caught, main_first(ranks):  # noqa: PT012
        assert ranks.is_main, "the others wait, and hear of it"
        fail()
    order: list[int] = []
    with main_first(ranks):
        order.append(ranks.rank)
    assert order == [ranks.rank]
    leave_ranks()


def test_ranks_hear_results_and_errors_of_the_main_one():
    run_ranks(2, talk)


def share() -> None:
    ranks = join_ranks("cpu")
    tensors = {
        "model": {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "empty": torch.zeros(0, 2)},
        "optimizer": {"step": torch.tensor(7.0), "half": torch.arange(6).to(torch.bfloat16), "flag": torch.ones(3) > 0},
        "wide": {"long": torch.arange(4) << 40},
    }
    kept = Checkpoint(Path("/runs/x/checkpoints/step-00000007"), 7, tensors, {"seconds": 1.5, "list": [1, 2]})

    def read() -> Checkpoint:
        assert ranks.is_main, "the others have no folder"
        return kept

    got = share_checkpoint(read, ranks)
    assert got is not None
    assert (got.path, got.step, got.state) == (kept.path, kept.step, kept.state)
    for group, named in tensors.items():
        assert got.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            torch.testing.assert_close(got.tensors[group][name], tensor, rtol=0, atol=0)
            assert got.tensors[group][name].dtype == tensor.dtype
    assert share_checkpoint(lambda: None, ranks) is None
    leave_ranks()


def test_a_checkpoint_reaches_every_rank():
    run_ranks(2, share)
