"""Corrupted images: a fuzzer over every format that is read, and a data set with damaged files in it."""

from __future__ import annotations

import io
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mae_et.data.decode import ImageError, decode_image
from tests.torture.runs import PLAIN, chance_of, history, shared, start, weights

IMAGES = 25  # of a trial
SECONDS = 5.0  # for one image; photos of this size take about a millisecond
MEMORY = 1 << 30  # bytes above what the process has; 4 million pixels of RGBA in 64-bit floats are 128 MB
MAX_PIXELS = 4_000_000


def photo(chance: random.Random) -> Image.Image:
    """Something with edges, noise and smooth parts, in a random mode and size."""
    generator = np.random.default_rng(chance.randrange(2**32))
    height, width = (chance.randrange(1, 90) for _ in range(2))
    coarse = generator.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height))
    return image.convert(chance.choice(("RGB", "RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16")))


MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "P", "1", "LA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "RGB"),
    "TIFF": ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"),
    "BMP": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L", "1"),
    "JPEG2000": ("RGB", "L", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}


def encoded(chance: random.Random) -> tuple[str, bytes]:
    """A whole image file, and its format."""
    kind = chance.choice([name for name in MODES if name in Image.SAVE])
    image = photo(chance)
    if image.mode not in MODES[kind]:
        image = image.convert("RGB")
    options: dict[str, object] = {}
    if kind == "JPEG":
        options = {"progressive": chance.random() < 0.5, "quality": chance.randrange(5, 100)}
        if chance.random() < 0.5:
            exif = Image.Exif()
            exif[0x0112] = chance.randrange(10)  # an orientation, some of them impossible
            options["exif"] = exif
    if kind in ("GIF", "WEBP", "PNG", "TIFF") and image.mode in ("RGB", "P", "L") and chance.random() < 0.3:
        options = {"save_all": True, "append_images": [image.rotate(90)]}
    if kind == "TIFF" and "save_all" not in options and image.mode != "I;16":
        options = {"compression": chance.choice((None, "tiff_lzw", "tiff_adobe_deflate", "packbits"))}
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return kind, stream.getvalue()


def corrupted(chance: random.Random) -> tuple[str, bytes]:
    """A damaged image file, and what was done to it."""
    kind, data = encoded(chance)
    raw = bytearray(data)
    how = chance.choice(("flips", "cut", "splice", "zeros", "swap", "header", "grow", "repeat"))
    at, length = chance.randrange(len(raw)), chance.randrange(1, 65)
    if how == "flips":
        for _ in range(chance.choice((1, 2, 8, 64))):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del raw[at:]
    elif how == "splice":  # the beginning of one file, and the rest of another
        other_kind, other = encoded(chance)
        kind, raw = f"{kind}+{other_kind}", raw[:at] + bytearray(other[min(at, len(other)) :])
    elif how == "zeros":
        raw[at : at + length] = bytes(len(raw[at : at + length]))
    elif how == "swap":
        to = chance.randrange(len(raw))
        one, two = raw[at : at + length], raw[to : to + length]
        raw[at : at + length], raw[to : to + length] = two, one
    elif how == "header":  # where sizes, counts and offsets are
        for _ in range(chance.randrange(1, 5)):
            raw[chance.randrange(min(len(raw), 64))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif how == "grow":
        raw[at:at] = chance.randbytes(length)
    else:
        raw[at:at] = raw[at : at + length] * chance.randrange(1, 50)
    return f"{kind} {how}", bytes(raw)


def decode_all(seed: int, folder: Path) -> None:
    """In a child: corrupt and decode; leaves the file that ended it, and prints what was wrong."""
    chance, decoded, refused = chance_of("images", seed), 0, 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in range(IMAGES):
        how, data = corrupted(chance)
        (folder / "last").write_bytes(data)
        channels, began = chance.choice((1, 3)), time.process_time()
        try:
            pixels = decode_image(data, "the.file", channels, MAX_PIXELS)
            assert pixels.dtype == torch.uint8, pixels.dtype
            assert pixels.ndim == 3, pixels.shape
            assert pixels.shape[0] == channels, pixels.shape
            assert 0 < pixels.numel() <= channels * MAX_PIXELS, pixels.shape
            decoded += 1
        except ImageError as error:
            assert "the.file" in str(error), f"does not name the file: {error}"
            assert "\n" not in str(error), f"more than a line: {error}"
            refused += 1
        seconds = time.process_time() - began
        assert seconds < SECONDS, f"image {number} ({how}) took {seconds:.1f} s"
    print(f"decoded {decoded} refused {refused}")


def fuzzed_images(folder: Path, seed: int) -> None:
    """A photo with flipped, missing, doubled, swapped, zeroed bytes, or the header of another"""
    started = start(lambda: decode_all(seed, folder), folder / "logs")
    code = started.wait(60 + SECONDS * IMAGES)
    assert code == 0, f"exit code {code}, at {folder / 'last'}: {started.said()}"
    assert "decoded" in started.out, started.said()


def damaged_data_set(folder: Path, seed: int) -> None:
    """A data set in which some images are damaged, over `kill -9`"""
    chance, photos = chance_of("damaged_data_set", seed), folder / "photos"
    photos.mkdir()
    bad = set()
    names = sorted(path.name for path in (shared(folder) / "photos").iterdir())
    for name in names:
        data = (shared(folder) / "photos" / name).read_bytes()
        if chance.random() < 0.15:
            data = chance.choice((b"", data[: len(data) // 2], b"<html>not found</html>", chance.randbytes(99)))
            bad.add(name)
        (photos / name).write_bytes(data)
    if not bad:
        (photos / names[0]).write_bytes(b"")
        bad.add(names[0])

    def run(name: str, *changes: str) -> Path:
        started = PLAIN.start(folder, folder / name, f"data.root={photos}", "data.max_bad=0.5", *changes)
        if name == "killed":
            time.sleep(chance.uniform(0.1, 1.0))
            if started.poll() is None:
                started.send(9)
                started.wait()
                started = PLAIN.start(folder, folder / name, f"data.root={photos}", "data.max_bad=0.5", *changes)
        assert started.wait() == 0, started.said()
        return folder / name

    whole = run("whole")
    killed = run("killed", "saving.steps=2", f"data.workers={seed % 3}")
    assert history(killed) == history(whole), "damaged images are replaced by others in another run"
    assert weights(killed) == weights(whole)
    for one in (whole, killed):
        rows = [json.loads(line) for line in (one / "bad_images.jsonl").read_text().splitlines()]
        assert {Path(row["path"]).name for row in rows} == bad, f"listed {rows}, damaged {sorted(bad)}"


def too_many_damaged(folder: Path, seed: int) -> None:
    """More damaged images than `data.max_bad` allows"""
    chance, photos = chance_of("too_many_damaged", seed), folder / "photos"
    photos.mkdir()
    for path in sorted((shared(folder) / "photos").iterdir()):
        (photos / path.name).write_bytes(b"<html>" if chance.random() < 0.5 else path.read_bytes())
    started = PLAIN.start(folder, folder / "run", f"data.root={photos}", f"data.workers={seed % 2}", "data.max_bad=0.1")
    assert started.wait() == 1, started.said()
    assert "data.max_bad" in started.err, started.said()
    assert "Traceback" not in started.err, started.said()


TRIALS: dict[str, Callable[[Path, int], None]] = {
    "fuzzed_images": fuzzed_images,
    "damaged_data_set": damaged_data_set,
    "too_many_damaged": too_many_damaged,
}
