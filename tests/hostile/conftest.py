"""Small runs, as a stranger hands them over."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from mae_et.engine.checkpoint import save_checkpoint
from mae_et.exchange.weights import open_weights
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.vit import build_vit
from tests.engine.test_checkpoint import Payload
from tests.hostile.small import BACKBONE, CONFIG, SHAPE


@pytest.fixture
def sentinel(tmp_path):
    """A path that the payload makes; that it would is tried first."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A small pretraining run."""
    numbers = {name: getattr(SHAPE, name) for name in ("size", "patch_size", "width", "depth", "heads", "mlp_ratio")}
    model = MaskedAutoencoder(**numbers, channels=3, decoder_width=8, decoder_depth=1, decoder_heads=2, target="pixel")
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", 4, {"model": model.state_dict(), "optimizer": {}}, {"step": 4})
    (run / "config.yaml").write_text(json.dumps(CONFIG))
    (run / "run_id.txt").write_text("abc123\n")
    assert open_weights(run).shape == SHAPE
    return run


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A small run on labels."""
    tensors = {f"net.{name}": tensor for name, tensor in build_vit(SHAPE, classes=2).state_dict().items()}
    run = tmp_path / "tuned"
    save_checkpoint(run / "checkpoints", 4, {"model": tensors}, {"step": 4})
    (run / "backbone.json").write_text(BACKBONE.to_json())
    assert open_weights(run).shape == SHAPE
    return run
