"""The picture of a search: its cells, their numbers and their frames."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mae_et.tracking.search import Tried, search_picture

FRAME, NOTHING = (0xD5, 0x5E, 0x00), (0xED, 0xEF, 0xF2)
# Names as of candidates with mask ratios and batches; given out of order.
NAMES = ["160", "96m0.75k2", "96x192"]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 3)


def share(path, colour) -> float:
    return float((pixels(path) == colour).all(axis=1).mean())


@pytest.mark.parametrize(("score", "reference"), [("probe", None), ("loss", None), ("top1", 0.5), ("loss", 0.5)])
def test_kept_cells_are_framed_and_all_are_drawn(tmp_path, score, reference):
    shares = []
    for kept in (0, 1, 3):
        tried = [Tried(s, name, 0.5 + 0.01 * s * i, i < kept) for s in range(3) for i, name in enumerate(NAMES)]
        path = tmp_path / "new" / f"{kept}.png"
        search_picture(tried, 4, path, "found", score, reference=reference)
        shares.append(share(path, FRAME))
        assert share(path, NOTHING) == 0  # every candidate of every stage was tried
    assert shares[0] == 0 < shares[1]
    assert shares[2] == pytest.approx(3 * shares[1], rel=0.05)


def test_what_was_not_tried_is_grey(tmp_path):
    path = tmp_path / "search.png"
    search_picture([Tried(3, "28", 0.8, True), Tried(2, "20", 0.8, True)], 4, path, "found", "top1", "epoch", 0.8)
    assert share(path, NOTHING) > 0.15  # two of four cells
    with Image.open(path) as image:
        assert min(image.size) > 250
