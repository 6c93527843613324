"""Shared fixtures: one thread count (it changes the bits), and the optional folder of real photos."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _pinned_threads():
    torch.set_num_threads(2)


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
