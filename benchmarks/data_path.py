"""JPEG files to batches, images per second of one core, beside the released chain and timm's: `python
benchmarks/data_path.py`.

Rivals, alternating in one process with one thread, all with crops of 20 to 100 % of the area and a flip:

- `released`: what EfficientTrain++'s released code does for MAE, written from its description: PIL decodes, crops and
  resizes to 224 px (bicubic), flips, and resizes to B (Lanczos); then float, normalised; torch's collate.
- `timm`: `timm.data.ImageDataset` with `create_transform` at input size B as its loader with prefetcher sets it up
  (PIL, uint8 out, normalised on the device), and its `fast_collate`.
- `ours`: `FileSource` and `CropTransform` through `RequestDataset.__getitems__`, uint8 out.
- `ours, turbojpeg`, `ours, turbojpeg_scaled`: the same with `data.decoder`, where TurboJPEG 3 is installed.

Rates are of processor time, which other programs on the machine disturb less than the clock. With --loader: images per
second of the clock out of torch's DataLoader with one worker, `timm` and ours, into a process that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jpegs import describe, write_jpegs
from PIL import Image
from timm.data.dataset import ImageDataset
from timm.data.loader import fast_collate
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from mae_et.config import ConfigError
from mae_et.data.files import FileSource
from mae_et.data.loader import RequestDataset, build_loader
from mae_et.data.requests import SampleRequest
from mae_et.data.scaled import SCALED, TURBOJPEG, RegionDataset
from mae_et.data.transforms import CropTransform

SIZES = (96, 160, 224)
FINAL = 224
SCALE = (0.2, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Rival = Callable[[list[int]], object]  # image numbers to a batch


def released_chain(paths: list[Path], size: int) -> Rival:
    """Batches by the released chain."""
    chain = [
        transforms.RandomResizedCrop(FINAL, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
    ]
    if size != FINAL:
        chain.append(transforms.Resize((size, size), interpolation=transforms.InterpolationMode.LANCZOS))
    transform = transforms.Compose([*chain, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def sample(i: int) -> tuple[object, int]:
        with paths[i].open("rb") as file:
            return transform(Image.open(file).convert("RGB")), 0

    return lambda numbers: default_collate([sample(i) for i in numbers])


def timm_dataset(folder: Path, size: int) -> ImageDataset:
    """timm's dataset as its own training script makes it, without augmentation but crop and flip."""
    transform = create_transform(
        size, is_training=True, use_prefetcher=True, scale=SCALE, hflip=0.5, color_jitter=0.0, interpolation="bicubic"
    )
    return ImageDataset(str(folder), transform=transform)


def our_dataset(paths: list[Path], decoder: str) -> RequestDataset:
    """Our dataset, with one of the decoders."""
    source = FileSource("jpegs", paths[0].parent, [path.name for path in paths])
    transform = CropTransform((FINAL, FINAL), scale=SCALE)
    if decoder == "torchvision":
        return RequestDataset(source, transform)
    return RegionDataset(source, transform, scaled=decoder == SCALED)


def requests(numbers: list[int], size: int) -> list[SampleRequest]:
    """What the sampler asks for; every call asks for other crops."""
    return [SampleRequest(i, (size, size), 0.0, next(_SEEDS)) for i in numbers]


_SEEDS = iter(range(1, 1 << 40, 7919))


def rivals(paths: list[Path], size: int) -> dict[str, Rival]:
    """Every way to make a batch at one size."""
    timm = timm_dataset(paths[0].parent, size)
    ways: dict[str, Rival] = {
        "released": released_chain(paths, size),
        "timm": lambda numbers: fast_collate([timm[i] for i in numbers]),
    }
    for name, decoder in (("ours", "torchvision"), *((f"ours, {name}", name) for name in (TURBOJPEG, SCALED))):
        try:
            dataset = our_dataset(paths, decoder)
        except ConfigError as error:
            print(f"without {name}: {error}")
            continue
        ways[name] = lambda numbers, dataset=dataset: dataset.__getitems__(requests(numbers, size))
    return ways


def core_rates(paths: list[Path], batch: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median images per second of processor time, by rival and size; every round makes a batch with each in turn."""
    ways = {size: rivals(paths, size) for size in SIZES}
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in ways[SIZES[0]]}
    for turn in range(rounds + 1):
        numbers = [(turn * batch + i) % len(paths) for i in range(batch)]
        for size in SIZES:
            for name, way in ways[size].items():
                started = time.process_time()
                way(numbers)
                if turn:  # the first warms up
                    seconds[name][size].append(time.process_time() - started)
    return {name: {size: batch / statistics.median(taken[size]) for size in SIZES} for name, taken in seconds.items()}


def timm_batches(paths: list[Path], size: int, batch: int) -> Iterator[object]:
    """Batches without end of one of timm's workers."""
    loader = DataLoader(
        timm_dataset(paths[0].parent, size),
        batch,
        sampler=[i % len(paths) for i in range(1000 * batch)],
        num_workers=1,
        collate_fn=fast_collate,
        worker_init_fn=lambda _: torch.set_num_threads(1),
        prefetch_factor=4,
    )
    yield from loader


def our_batches(paths: list[Path], size: int, batch: int, decoder: str) -> Iterator[object]:
    """Batches without end of one of our workers."""
    asked = (requests([(turn * batch + i) % len(paths) for i in range(batch)], size) for turn in range(1000))
    yield from build_loader(our_dataset(paths, decoder), asked, 1, False)  # pyright: ignore[reportArgumentType]


def loader_rates(paths: list[Path], batch: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median images per second of the clock out of one worker; the workers run one after another, twice each."""
    makers: dict[str, Callable[[int], Iterator[object]]] = {"timm": lambda size: timm_batches(paths, size, batch)}
    for name, decoder in (("ours", "torchvision"), *((f"ours, {name}", name) for name in (TURBOJPEG, SCALED))):
        try:
            our_dataset(paths, decoder)
        except ConfigError:
            continue
        makers[name] = lambda size, decoder=decoder: our_batches(paths, size, batch, decoder)
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in makers}
    for _ in range(2):
        for size in SIZES:
            for name, make in makers.items():
                batches = make(size)
                for _ in range(5):  # what was prefetched while the worker started
                    next(batches)
                for _ in range(rounds):
                    started = time.perf_counter()
                    next(batches)
                    seconds[name][size].append(time.perf_counter() - started)
                del batches  # ends the worker
    return {name: {size: batch / statistics.median(taken[size]) for size in SIZES} for name, taken in seconds.items()}


def table(rates: Mapping[str, Mapping[int, float]], first: str) -> str:
    """A Markdown table of images/s, and of ratios to one rival."""
    lines = [f"| images/s (times `{first}`) | {' | '.join(map(str, SIZES))} |", "|---|" + "---|" * len(SIZES)]
    for name, row in rates.items():
        cells = [f"{row[size]:,.0f} ({row[size] / rates[first][size]:.2f}x)" for size in SIZES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the JPEGs are or shall be; default: a temporary folder")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--loader", action="store_true", help="out of a DataLoader's worker")
    parser.add_argument("--json", type=Path, help="write the rates here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        paths = write_jpegs(options.folder or Path(temporary), options.images)
        about = describe(paths)
        loads = [os.getloadavg()[0]]
        measured = loader_rates if options.loader else core_rates
        rates = measured(paths, options.batch, options.rounds)
        loads.append(os.getloadavg()[0])
    first = next(iter(rates))
    print(f"{about}; load {loads[0]:.1f} to {loads[1]:.1f}\n\n{table(rates, first)}")
    if options.json is not None:
        options.json.write_text(json.dumps({"images": about, "loads": loads, "rates": rates}, indent=1))


if __name__ == "__main__":
    main()
