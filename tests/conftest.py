"""Shared fixtures: one thread (their number changes the bits), and the optional folder of real photos."""

from __future__ import annotations

import os
from pathlib import Path

# Here and in the processes that tests start: several test processes share the cores (see the Makefile), and threads
# that wait for each other would take them. Libraries of linear algebra read it when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _pinned_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds `mae_et/`, `configs/` and `pretrain.py`."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small sets of real photos beside the checkout; present for developers and CI, not for users."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the photos of {folder}, which come with a developer's checkout only")
    return folder
