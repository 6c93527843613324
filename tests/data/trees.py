"""Small trees of images whose colour tells which is which."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mae_et.data.sources import Source


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, 255 - number % 256, 7)


def write_images(root: Path, *paths: str, first: int = 0) -> None:
    """Write a PNG of one colour at each path; the colour tells which."""
    for number, path in enumerate(paths, first):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), colour(number)).save(root / path, "PNG")


def contents(source: Source) -> list[tuple[int, int]]:
    """The number behind the colour of each image, and its label."""
    return [(int(source.image(i)[0, 0, 0]), source.label(i)) for i in range(len(source))]
