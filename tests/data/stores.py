"""Small folders of photos, and stores packed from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mae_et.__main__ import main


def write_photo(path: Path, width: int, height: int, seed: int = 0, **how: object) -> None:
    """Write a smooth picture: each channel a wave of a few periods, another one for each seed."""
    draws = np.random.default_rng(seed)
    x, y = np.linspace(0, 1, width)[None], np.linspace(0, 1, height)[:, None]
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in draws.uniform(0, 3, (3, 3))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8)).save(path, **how)  # pyright: ignore[reportArgumentType]


def write_photos(root: Path, per_class: int = 5, size: tuple[int, int] = (60, 40)) -> Path:
    """Write `train/{ant,bee}/0.jpg` ... and one photo of a bee in val."""
    for number, label in enumerate(("ant", "bee")):
        for i in range(per_class):
            write_photo(root / "train" / label / f"{i}.jpg", *size, seed=10 * number + i, quality=95)
    write_photo(root / "val" / "bee" / "v.jpg", *size, seed=99, quality=95)
    return root


def pack(store: str | Path, root: Path, *options: str) -> int:
    """The exit code of a packing in this process, four images a shard."""
    return main(["pack", str(store), f"data={root}", "--workers", "0", "--shard-images", "4", *options])


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
