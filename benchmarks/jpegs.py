"""JPEGs of ImageNet's size, made from the photos that scikit-learn and scikit-image ship: `python benchmarks/jpegs.py`.

    python benchmarks/jpegs.py DIR --images 256

ImageNet itself is not to be had without an account. Its training files have about 110 KB on average, and most are 500
px long. Here each file is another crop of one of eight photos, scaled to a longer side of 500 px, and saved at whatever
quality brings it nearest to a size drawn from 50..130 KB with mean 114 KB. Three of four are 4:2:0, one is 4:4:4; that
share is an assumption. The same Pillow gives the same files.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

LONGER_SIDE = 500  # px
SMALLEST, LARGEST = 50_000, 130_000  # bytes that are aimed at
QUALITIES = range(60, 99)  # of libjpeg; a smooth photo may not reach its size at the last


def photos() -> list[Image.Image]:
    """The photos, RGB, 451 to 741 px wide; nothing is downloaded."""
    left, right, _ = data.stereo_motorcycle()
    arrays = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), left, right]
    return [Image.fromarray(np.asarray(array, np.uint8)) for array in arrays]


def pictures(images: int, seed: int = 0) -> Iterator[bytes]:
    """Yield JPEG files of ImageNet's size; each follows from its number and the seed."""
    originals = photos()
    for i in range(images):
        draws = np.random.default_rng((seed, i))
        picture = _crop(originals[i % len(originals)], draws)
        subsampling = "4:4:4" if draws.random() < 0.25 else "4:2:0"
        # The fourth root of a uniform number has mean 4/5: small files are rarer than large ones.
        size = SMALLEST + (LARGEST - SMALLEST) * draws.random() ** (1 / 4)
        yield _nearest(picture, size, subsampling)


def write_jpegs(folder: Path, images: int, seed: int = 0) -> list[Path]:
    """Write the files as 00000.jpg, 00001.jpg, ... into a folder, made if it is not there; files that are stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.jpg" for i in range(images)]
    if not all(path.is_file() for path in paths):
        for path, content in zip(paths, pictures(images, seed)):
            path.write_bytes(content)
    return paths


def describe(paths: list[Path]) -> str:
    """How many files there are, and their sizes in KB and px."""
    sizes = sorted(path.stat().st_size / 1000 for path in paths)
    shapes = []
    for path in paths:
        with Image.open(path) as image:
            shapes.append(image.size)
    width, height = (statistics.mean(sides) for sides in zip(*shapes))
    return (
        f"{len(paths)} JPEGs, {width:.0f} x {height:.0f} px on average, {statistics.mean(sizes):.0f} KB on average, "
        f"{sizes[0]:.0f} to {sizes[-1]:.0f} KB"
    )


def _crop(photo: Image.Image, draws: np.random.Generator) -> Image.Image:
    """A crop of most of the photo, its longer side `LONGER_SIDE` px, mirrored by chance; 5:4 on average."""
    width, height = round(photo.width * draws.uniform(0.75, 0.95)), round(photo.height * draws.uniform(0.9, 1))
    left, top = (int(draws.integers(0, full - kept + 1)) for full, kept in zip(photo.size, (width, height)))
    scale = LONGER_SIDE / max(width, height)
    size = (round(width * scale), round(height * scale))
    picture = photo.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.random() < 0.5 else picture


def _nearest(picture: Image.Image, size: float, subsampling: str) -> bytes:
    """The encoding whose length is nearest to `size` bytes; lengths grow with the quality."""
    low, high = QUALITIES[0], QUALITIES[-1]
    tried: dict[int, bytes] = {}
    while low <= high:
        quality = (low + high) // 2
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=subsampling)
        tried[quality] = file.getvalue()
        low, high = (quality + 1, high) if len(tried[quality]) < size else (low, quality - 1)
    return min(tried.values(), key=lambda content: abs(len(content) - size))


def main() -> None:
    """Write the files and describe them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(describe(write_jpegs(options.folder, options.images, options.seed)))


if __name__ == "__main__":
    main()
