"""A packed store beside the files that it was made from: `taskset -c 1 python benchmarks/packed.py`.

On JPEGs of ImageNet's size (see jpegs.py), with one thread:

- what packing takes, and the size of the store;
- images per second of processor time, from bytes on disk to a uint8 crop of B x B px (20 to 100 % of the area, as in
  pretraining), from files and from stores, alternating; and what of it is reading and its checksum;
- what the store's images differ by: relative L2 of the same crop boxes, in fractions of a px, cut from files and from
  stores by PIL's antialiased bicubic, after ImageNet's normalisation; and of their HOG targets.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jpegs import describe, write_jpegs
from PIL import Image

from mae_et.config.pretrain import DataConfig
from mae_et.data.packed import PackedSource
from mae_et.data.requests import SampleRequest
from mae_et.data.sources import Source, open_source
from mae_et.data.transforms import CropTransform, to_pil
from mae_et.ops.hog import hog_targets
from mae_et.packing.packing import pack
from mae_et.packing.settings import Settings

SIZES = (96, 160, 224)
STORES = {
    "256 px, q90, 4:4:4": Settings(256, 90, "4:4:4", False, 64),
    "256 px, q90, 4:2:0": Settings(256, 90, "4:2:0", False, 64),
    "256 px, q95, 4:2:0": Settings(256, 95, "4:2:0", False, 64),
    "320 px, q90, 4:4:4": Settings(320, 90, "4:4:4", False, 64),
    "bytes kept": Settings(256, 90, "4:4:4", True, 64),
}
CROP = CropTransform((224, 224), scale=(0.2, 1.0))
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def packed(folder: Path, images: Path, settings: Settings) -> tuple[PackedSource, float]:
    """Pack a folder in this process; returns the store and the seconds of processor time that it took."""
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        pack(str(folder), DataConfig(source="folder", root=str(images)), settings, 0)
    taken = time.process_time() - started
    source = open_source("packed", folder)
    assert isinstance(source, PackedSource)
    return source, taken


def rates(ways: Mapping[str, Callable[[int], object]], images: int, rounds: int) -> dict[str, float]:
    """Median images per second of processor time; every round takes the same images each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    batch = min(64, images)
    for turn in range(rounds + 1):
        numbers = [(turn * batch + i) % images for i in range(batch)]
        for name, way in ways.items():
            started = time.process_time()
            for i in numbers:
                way(i)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - started)
    return {name: batch / statistics.median(taken) for name, taken in seconds.items()}


def crop(source: Source, size: int) -> Callable[[int], object]:
    """Bytes to a crop, as a worker does it."""
    seeds = iter(range(1, 1 << 40, 7919))
    return lambda i: CROP(source.image(i), SampleRequest(i, (size, size), 0.0, next(seeds)))


def errors(original: Source, store: Source, images: int) -> dict[int, tuple[float, float]]:
    """Relative L2 by B: of normalised pixels, and of HOG targets."""
    sums = {size: np.zeros(4) for size in SIZES}
    for i in range(images):
        pictures = [to_pil(source.image(i)) for source in (original, store)]
        (top, left, height, width), _ = CROP.draw(pictures[0].height, pictures[0].width, 77 * i + 1)
        for size in SIZES:
            views = []
            for picture in pictures:
                x, y = picture.width / pictures[0].width, picture.height / pictures[0].height
                box = (left * x, top * y, (left + width) * x, (top + height) * y)
                views.append(np.array(picture.resize((size, size), Image.Resampling.BICUBIC, box=box)))
            for place, values in enumerate(
                ([(view / 255 - MEAN) / STD for view in views], [hog(view) for view in views])
            ):
                sums[size][2 * place] += ((values[0] - values[1]) ** 2).sum()
                sums[size][2 * place + 1] += (values[0] ** 2).sum()
    return {size: ((s[0] / s[1]) ** 0.5, (s[2] / s[3]) ** 0.5) for size, s in sums.items()}


def hog(view: np.ndarray) -> np.ndarray:
    """HOG targets of uint8 [H, W, 3]."""
    return hog_targets(torch.from_numpy(view).permute(2, 0, 1)[None]).double().numpy()


def main() -> None:
    """Make the images, pack them, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the JPEGs are or shall be; default: a temporary folder")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = options.folder or scratch / "jpegs"
        paths = write_jpegs(folder, options.images)
        print(describe(paths))
        files = open_source("folder", folder)
        size = sum(path.stat().st_size for path in paths)
        stores = {}
        for number, (name, settings) in enumerate(STORES.items()):
            stores[name], seconds = packed(scratch / str(number), folder, settings)
            bytes_now = sum(shard.bytes for shard in stores[name].manifest.shards)
            rate, share = len(paths) / seconds, bytes_now / size
            print(
                f"{name}: packed at {rate:,.0f} images/s, {bytes_now / len(paths) / 1000:.1f} KB an image ({share:.0%})"
            )

        sources: dict[str, Source] = {"files": files, **stores}
        print(f"\n| images/s (times files) | {' | '.join(map(str, SIZES))} |\n|---|---|---|---|")
        found = {
            size: rates({k: crop(v, size) for k, v in sources.items()}, len(paths), options.rounds) for size in SIZES
        }
        for name in sources:
            cells = [f"{found[size][name]:,.0f} ({found[size][name] / found[size]['files']:.2f}x)" for size in SIZES]
            print(f"| {name} | {' | '.join(cells)} |")

        store = stores[next(iter(STORES))]
        content = [store.read(i) for i in range(len(store))]
        parts = {"read and checked": store.read, "checksum": lambda i: zlib.crc32(content[i]), "decoded": store.image}
        microseconds = {name: 1e6 / rate for name, rate in rates(parts, len(paths), options.rounds).items()}
        print(f"\n{next(iter(STORES))}, us an image: " + ", ".join(f"{k} {v:.0f}" for k, v in microseconds.items()))

        print(f"\n| error, pixels (HOG) | {' | '.join(map(str, SIZES))} |\n|---|---|---|---|")
        for name, source in stores.items():
            found_errors = errors(files, source, len(paths))
            print(f"| {name} | {' | '.join(f'{p:.1%} ({h:.0%})' for p, h in found_errors.values())} |", flush=True)


if __name__ == "__main__":
    main()
