"""Tiny photos, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """45 small PNGs, so that passes of five batches of 8 leave images over."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(45):
        coarse = generator.integers(0, 255, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((28, 24)).save(folder / f"{index:02}.png")
    return folder
