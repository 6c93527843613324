"""Pictures show every masked patch, whatever part of them training predicts."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from mae_et.config import load_config
from mae_et.data.sources import Source
from mae_et.data.transforms import CropTransform
from mae_et.engine.precision import Precision
from mae_et.evaluation import pictures
from mae_et.evaluation.pictures import PictureObserver
from mae_et.models.mae import MaskedAutoencoder
from mae_et.planning import build_plan


class Photos(list[torch.Tensor]):
    """What of a source `draw` asks for."""

    def describe(self, index: int) -> str:
        return f"photo {index}"


@pytest.mark.parametrize("target", ["hog", "norm_pixel"])
def test_every_masked_patch_is_predicted(target, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        *((32, 32), 4, 3, 16, 2, 2, 2.0, 16, 1, 2), target=target, decoder="crossmae", prediction_ratio=0.25
    )
    changes = [f"target.kind={target}", "model.patch_size=4", "data.size=32", "model.width=16", "model.heads=2"]
    stage = build_plan(load_config(None, changes), 100_000).stages[-1]
    drawn: list[Any] = []
    panel = "stage_panel" if target == "hog" else "pixel_panel"
    monkeypatch.setattr(pictures, panel, lambda path, samples, title: drawn.extend(samples))
    transform = CropTransform((32, 32), "resize", (0.5, 1.0), (1.0, 1.0), True)
    photos, precision = cast("Source", Photos()), Precision("fp32", "cpu")
    observer = PictureObserver(model, precision, photos, transform, lambda images, _bandwidth: images, tmp_path, 0, 0)
    photo = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    observer.draw(stage, tmp_path / "panel.png", [(0, photo)])
    (sample,) = drawn
    assert sample.mask.sum() == 48
    if target == "hog":
        told = np.abs(sample.prediction).sum(axis=(0, 1)).reshape(8, 2, 8, 2).sum(axis=(1, 3)) > 0
    else:
        # A patch that is not predicted is flat, of the mean of the true one.
        told = sample.reconstruction.reshape(8, 4, 8, 4, 3).astype(float).std(axis=(1, 3)).max(axis=2) > 0
    assert (told == sample.mask).all()
