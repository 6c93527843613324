"""With W&B broken in every way, training is the one without W&B, to the bit. The long form is `make torture`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.torture.wandb_faults import FAULTS, Outcome, without_wandb

pytest.importorskip("wandb")

SHORT = (
    "training killed",
    "install missing",
    "logged out",
    "server dies",
    "helper killed",
    "helper stopped under many rows",
    "finish exits",
)


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Iterator[dict[str, Future[Outcome]]]:
    """All of them, two at a time: each is a process of its own that mostly imports."""
    without_wandb()
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(FAULTS[name], tmp_path_factory.mktemp("fault")) for name in SHORT}


@pytest.mark.parametrize("fault", SHORT)
def test_training_does_not_notice(fault, trials):
    assert trials[fault].result().code == 0


def test_the_run_without_wandb_means_something():
    rows, _ = without_wandb()
    assert len(rows) >= 20
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
