"""Tiny runs on boxes, masks and classes of pixels: colours tell the classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.config import DetectConfig, SegmentConfig, load_config
from mae_et.detecting import detect
from mae_et.segmenting import segment

CLASSES = ("blue", "red")
COLOURS = ((40, 60, 255), (255, 50, 40))
COMMON = [
    *("data.workers=0", "seed=3", "engine.threads=1", "engine.device=cpu", "data.size=32", "data.scale=[0.8,1.2]"),
    *("tracking.every=1", "tracking.console=false", "saving.minutes=null"),
    *("model.name=vit_tiny", "model.patch_size=4", "model.width=16", "model.depth=2", "model.heads=2"),
    *("model.channels=16", "optim.batch=4", "optim.lr=2e-3", "steps=8", "evaluation.every=0.5"),
]
TINY_DETECT = [*COMMON, "model.representation=16", "model.mask_channels=8", "model.samples=16", "evaluation.drawn=2"]
TINY_SEGMENT = [*COMMON, "model.head_channels=16", "evaluation.drawn=2", f"data.names=[wall,{','.join(CLASSES)}]"]


def write_objects(root: Path, train: int = 10, test: int = 4) -> Path:
    """One or two rectangles an image, in COCO's JSON with polygons, in index masks and in instance maps.

    `<root>/{train,test}.json`, `<root>/{train,test}/{images,masks,instances}/*.png`, and the images beside them once
    more, where COCO has them.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in ("images", "masks", "instances"):
            (root / split / name).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            height, width = (int(side) for side in generator.integers(28, 44, 2))
            pixels = generator.integers(90, 150, (height, width, 3), dtype=np.uint8)
            mask, instances = np.zeros((2, height, width), np.uint8)
            for number in range(1 + index % 2):
                left = int(generator.integers(0, 4)) + number * width // 2
                top, label = int(generator.integers(0, height // 2)), int(generator.integers(0, 2))
                right, bottom = left + width // 3, top + height // 3
                pixels[top:bottom, left:right] = COLOURS[label]
                mask[top:bottom, left:right] = label + 1
                instances[top:bottom, left:right] = number + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": (3, 7)[label],
                        "bbox": [left, top, right - left, bottom - top],
                        "area": (right - left) * (bottom - top),
                        "iscrowd": 0,
                        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                    }
                )
            name = f"{index:02}.png"
            for folder, array in (("images", pixels), ("masks", mask), ("instances", instances), ("", pixels)):
                Image.fromarray(array).save(root / split / folder / name)
            images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        categories = [{"id": number, "name": name} for number, name in zip((3, 7), CLASSES)]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (root / f"{split}.json").write_text(text)
    return root


def detect_here(images: Path, run: Path, *changes: str, only_evaluate: bool = False, said=lambda _line: None) -> Path:
    config = load_config(None, [*TINY_DETECT, f"data={images}", f"run={run}", *changes], DetectConfig)
    assert detect(config, say=said, only_evaluate=only_evaluate) == 0
    return run


def segment_here(images: Path, run: Path, *changes: str, only_evaluate: bool = False, said=lambda _line: None) -> Path:
    config = load_config(None, [*TINY_SEGMENT, f"data={images}", f"run={run}", *changes], SegmentConfig)
    assert segment(config, say=said, only_evaluate=only_evaluate) == 0
    return run
