"""The image zoo: every kind of file that a folder of images from the world may hold, and what is to become of it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image


class Animal(NamedTuple):
    """A file of the zoo.

    Attributes:
        pixels: uint8 [H, W, 3] that it should decode to; None of one that is to be refused.
        tolerance: levels by which a lossy format may differ.
        reason: what the refusal says.
    """

    pixels: np.ndarray | None
    tolerance: int = 0
    reason: str = ""


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth coloured picture without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * y / height, 255 * x / width, 255 * (x + 2 * y) / (width + 2 * height)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(values: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a kilobyte whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def damaged(data: bytes) -> bytes:
    """A PNG with a byte of its pixels flipped, which its check sum tells."""
    place = data.index(b"IDAT") + 20
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def write_zoo(folder: Path) -> dict[str, Animal]:
    """Fill a new folder; returns what is to become of each file, by its path below the folder.

    `vanish` is still to be called, once the folder has been listed.
    """
    folder.mkdir(parents=True)
    colours, rotated = picture(), Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    ramp = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    rgba = np.concatenate([colours, np.full((24, 32, 1), 51, np.uint8)], axis=2)
    luma = colours[..., 0]
    bits = luma > 100
    palette = Image.fromarray(colours).quantize(100)
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(250, 0, 0), (0, 250, 0)]]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 10}
    red = np.full((8, 8, 3), [250, 0, 0], np.uint8)
    photo, drawing = encoded(colours, "JPEG", quality=95), encoded(colours, "PNG")
    files: dict[str, tuple[bytes, Animal]] = {
        "truncated.jpg": (photo[:-100], Animal(None, reason="truncated")),
        "truncated.png": (drawing[: len(drawing) // 2], Animal(None, reason="truncated")),
        "corrupt.png": (damaged(drawing), Animal(None, reason="damaged")),
        "rubbish.jpg": (photo[:3] + bytes(range(256)), Animal(None, reason="not an image|damaged")),
        "empty.jpg": (b"", Animal(None, reason="empty")),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", Animal(None, reason="HTML page")),
        "bomb.png": (bomb(13_000, 13_000), Animal(None, reason="too many pixels")),
        "great-bomb.png": (bomb(60_000, 60_000), Animal(None, reason="too many pixels")),
        # JPEG at quality 95 changes a smooth picture by a few levels.
        "cmyk.jpg": (encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=95), Animal(colours, 8)),
        "palette.png": (encoded(palette, "PNG"), Animal(np.asarray(palette.convert("RGB")))),
        # 20 % of the colour on white; PIL composites in integers.
        "alpha.png": (encoded(rgba, "PNG"), Animal(np.rint(0.2 * colours + 0.8 * 255).astype(np.uint8), 1)),
        "grey-alpha.png": (
            encoded(np.stack([luma, np.full_like(luma, 51)], -1), "PNG"),
            Animal(grey(np.rint(0.2 * luma + 0.8 * 255)), 1),
        ),
        "one-bit.png": (encoded(bits, "PNG"), Animal(grey(bits * 255))),
        "sixteen-bit.png": (encoded(ramp, "PNG"), Animal(grey(np.rint(ramp / 257)))),
        "float.tiff": (encoded((luma / 255).astype(np.float32), "TIFF"), Animal(grey(luma))),
        "rotated.jpg": (encoded(colours, "JPEG", quality=95, exif=rotated), Animal(np.rot90(colours, -1), 8)),
        "pixel.png": (encoded(colours[9:10, 9:10], "PNG"), Animal(colours[9:10, 9:10])),
        "long.png": (encoded(picture(1, 20_000), "PNG"), Animal(picture(1, 20_000))),
        "high.png": (encoded(picture(20_000, 1), "PNG"), Animal(picture(20_000, 1))),
        "moving.gif": (encoded(frames[0], "GIF", **moving), Animal(red)),
        "moving.webp": (encoded(frames[0], "WEBP", lossless=True, **moving), Animal(red)),
        "folder.jpg/inside.png": (drawing, Animal(colours)),
        "café ☃.png": (drawing, Animal(colours)),
        os.fsdecode(b"na\xefve.png"): (drawing, Animal(colours)),  # Latin-1, no UTF-8
        os.fsdecode(b"na\xefve-broken.png"): (drawing[:50], Animal(None, reason=r"na\\xefve-broken|na.ve-broken")),
        "gone.png": (drawing, Animal(None, reason="cannot be read: No such file")),
        # Root reads what nobody may read.
        "locked.png": (drawing, Animal(colours if os.geteuid() == 0 else None, reason="cannot be read: Permission")),
    }
    for name, (data, _) in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "locked.png").chmod(0)
    (folder / "broken-link.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "link-to-folder.jpg").symlink_to(folder / "folder.jpg")
    links = {
        "broken-link.jpg": Animal(None, reason="cannot be read: No such file"),
        "link-to-folder.jpg": Animal(None, reason="cannot be read: Is a directory"),
    }
    return {name: animal for name, (_, animal) in files.items()} | links


def vanish(folder: Path) -> None:
    """Remove the file that is to be gone after it was listed."""
    (folder / "gone.png").unlink()


def refused(animals: dict[str, Animal]) -> set[str]:
    return {name for name, animal in animals.items() if animal.pixels is None}


class Memory:
    """A source of constant 4 x 4 images in memory; `failing` raises for those that it is asked to."""

    name, channels, classes = "memory", 1, ("even", "odd")

    def __init__(self, count: int, failing: Callable[[int], Exception | None] = lambda _: None):
        self.count, self.failing = count, failing
        self.labels = np.arange(count, dtype=np.int32) % 2

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> torch.Tensor:
        error = self.failing(i)
        if error is not None:
            raise error
        return torch.full((1, 4, 4), i % 256, dtype=torch.uint8)

    def label(self, i: int) -> int:
        return i % 2

    def describe(self, i: int) -> str:
        return f"memory #{i}"
