"""Images a second and core from an array in memory to the batch in the training process, ours beside two plain ones.

`python benchmarks/small_images.py`. Each rival has one worker, on the same core as the training process, which does
nothing but receive. Random resized crop (scale 0.5 to 1) and flip, batches of 64:

- ours: the sampler of a plan, seeds and all; uint8 comes out, and the device normalises.
- torchvision: `ToImage`, `RandomResizedCrop` (bicubic, antialiased), flip, floats, `Normalize`, as its guide has it.
- timm: PIL pictures, its `create_transform` and `fast_collate`, which stay uint8 until the device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mae_et.curriculum import Curriculum
from mae_et.curriculum.plan import Plan
from mae_et.data.archives import ArraySource
from mae_et.data.loader import RequestDataset, batches_of, build_loader
from mae_et.data.sampler import PlanSampler
from mae_et.data.transforms import CropTransform

IMAGES, SCALE = 50_000, (0.5, 1.0)

# What the batches come from, and the sides of the curriculum's three stages in 2-px patches.
SETS = {"grey, 28 px (Fashion-MNIST)": (28, 1), "RGB, 32 px (CIFAR)": (32, 3)}

Loading = Callable[[], AbstractContextManager[Iterator[Any]]]


class Pictures(Dataset[tuple[Any, int]]):
    """As torchvision's sets of arrays: a picture from an array, then the transform."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], Any]):
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        pixels = self.pixels[i]
        return self.transform(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)), 0


@contextmanager
def plain(pixels: np.ndarray, transform: Callable[[Image.Image], Any], batch: int, collate: Any) -> Iterator[Any]:
    """Batches of torch's loader over pictures."""
    yield iter(DataLoader(Pictures(pixels, transform), batch, shuffle=True, num_workers=1, collate_fn=collate))


def ours(source: ArraySource, plan: Plan, stage: int, final: int) -> AbstractContextManager[Iterator[Any]]:
    """Batches of a plan's stage."""
    dataset = RequestDataset(source, CropTransform((final, final), scale=SCALE), replace=True)
    return batches_of(build_loader(dataset, PlanSampler(plan, 0, plan.boundaries[stage]), 1, pin_memory=False))


def rate(loading: Loading, batch: int, seconds: float) -> float:
    """Images a second, from the time on when what the worker made ahead is consumed."""
    with loading() as batches:
        for _ in range(8):
            next(batches)
        count, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            next(batches)
            count += batch
    return count / passed


def compare(name: str, side: int, channels: int, batch: int, rounds: int, seconds: float) -> None:
    """Print medians for each stage's B."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, channels), dtype=np.uint8)
    source = ArraySource(pixels, np.zeros(IMAGES, np.int64), "random")
    plan = Curriculum.preset("efficienttrain_pp", side, 2).plan(
        epochs=300, images=IMAGES, batch=batch, patch_size=2, mask_ratio=0.75
    )
    statistic = [0.5] * channels
    for stage, planned in enumerate(plan.stages):
        size = planned.bandwidth[0]
        by_torchvision = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomResizedCrop(size, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(statistic, statistic),
            ]
        )
        by_timm = create_transform(
            (channels, size, size),
            is_training=True,
            use_prefetcher=True,
            scale=SCALE,
            color_jitter=None,
            interpolation="bicubic",
        )
        rivals: dict[str, Loading] = {
            "ours": partial(ours, source, plan, stage, side),
            "torchvision": partial(plain, pixels, by_torchvision, batch, None),
            "timm": partial(plain, pixels, by_timm, batch, fast_collate),
        }
        rates: dict[str, list[float]] = {rival: [] for rival in rivals}
        for _ in range(rounds):
            for rival, loading in rivals.items():
                rates[rival].append(rate(loading, batch, seconds))
        middle = {rival: statistics.median(values) for rival, values in rates.items()}
        parts = [f"{rival} {value:,.0f} ({middle['ours'] / value:.1f}x)" for rival, value in middle.items()]
        print(f"{name}, B={size}: images/s and core: {', '.join(parts)}", flush=True)


def main() -> None:
    """Measure on one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    for name, (side, channels) in SETS.items():
        compare(name, side, channels, options.batch, options.rounds, options.seconds)


if __name__ == "__main__":
    main()
