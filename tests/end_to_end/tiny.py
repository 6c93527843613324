"""A tiny run, and what of it must repeat."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mae_et.config import load_config
from mae_et.pretraining import pretrain
from mae_et.tracking import read_metrics

# Rates, times and waits differ between any two runs; nothing else may.
CLOCKS = ("time/", "throughput/", "eta/")
TINY = [
    *("data.source=folder", "data.size=16", "data.workers=0", "data.channels=3", "seed=3", "epochs=3"),
    *("model.patch_size=2", "model.width=16", "model.depth=2", "model.heads=2"),
    *("model.decoder_width=16", "model.decoder_depth=1", "model.decoder_heads=2"),
    *("optim.batch=8", "optim.base_lr=1e-2", "engine.threads=1", "engine.device=cpu"),
    *("tracking.every=1", "tracking.console=false", "tracking.pictures=false", "saving.minutes=null"),
]


def arguments(photos: Path, run: Path, *changes: str) -> list[str]:
    return [*TINY, f"data.root={photos}", f"run={run}", *changes]


def history(run: Path) -> list[dict[str, float]]:
    """Rows of metrics without what a clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in rows]


def run_here(photos: Path, run: Path, *changes: str) -> Path:
    assert pretrain(load_config(None, arguments(photos, run, *changes)), say=lambda _: None) == 0
    return run


def weights(run: Path) -> str:
    """Hash of the newest checkpoint's model and optimizer."""
    newest = max((run / "checkpoints").iterdir())
    files = [newest / name for name in ("model.safetensors", "optimizer.safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
