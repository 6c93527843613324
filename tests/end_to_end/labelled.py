"""Tiny runs on labels: ten pixels of colour tell the class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.config import FinetuneConfig, ProbeConfig, load_config
from mae_et.finetuning import finetune
from mae_et.probing import neighbours, probe

CLASSES = ("blue", "green", "red")
COMMON = [
    *("data.workers=0", "seed=3", "engine.threads=1", "engine.device=cpu"),
    *("tracking.every=1", "tracking.console=false", "saving.minutes=null", "evaluation.crop_fraction=1.0"),
]
TINY_FINETUNE = [
    *COMMON,
    *("data.size=16", "epochs=6", "optim.batch=8", "optim.base_lr=0.02", "optim.layer_decay=0.8"),
    *("data.holdout=0.25", "model.drop_path=0.2", "augment.randaugment=true"),
]
TINY_VIT = ["model.name=vit_tiny", "model.patch_size=2", "model.width=16", "model.depth=2", "model.heads=2"]
TINY_CONVNET = [
    "model.name=timm/convnext_atto",
    "model.arguments={patch_size: 1, depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}",
]


def write_classes(root: Path, train: int = 12, test: int = 6) -> Path:
    """`<root>/{train,test}/<class>/*.png`: noise, brightest in the channel of the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 150, (20, 18, 3), dtype=np.uint8)
                pixels[:, :, 2 - number] += 100
                Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return root


def finetune_here(images: Path, run: Path, *changes: str, only_evaluate: bool = False, said=lambda _line: None) -> Path:
    config = load_config(None, [*TINY_FINETUNE, f"data={images}", f"run={run}", *changes], FinetuneConfig)
    assert finetune(config, say=said, only_evaluate=only_evaluate) == 0
    return run


def probe_here(images: Path, run: Path, *changes: str, said=lambda _line: None, knn: bool = False) -> Path:
    config = load_config(None, [*COMMON, f"data={images}", f"run={run}", *changes], ProbeConfig)
    assert (neighbours if knn else probe)(config, say=said) == 0
    return run
