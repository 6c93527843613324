"""Photos to look at: a folder of them, one, or a list; and names for what is found on each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path, PurePosixPath

from mae_et.data.decode import DEFAULT_MAX_PIXELS
from mae_et.data.files import IMAGE_EXTENSIONS, FileSource
from mae_et.data.folders import walk_images
from mae_et.data.index import Watch
from mae_et.data.lists import open_list


def open_photos(place: Path, channels: int = 3, max_pixels: int = DEFAULT_MAX_PIXELS) -> FileSource:
    """Open the images below a folder, wherever they lie; one image; or those of a list.

    Args:
        place: a folder, an image file, or a text file (.txt) with a path a line, relative to it.
        channels: 3 for RGB, 1 for luma.
        max_pixels: larger images raise ImageError when they are read.

    Raises:
        ValueError: there is nothing there, or no image.
    """
    if place.is_dir():
        # Not `open_source`: folders called train and val, or empty ones, mean nothing here.
        paths = (prefix + name for prefix, name in walk_images(place, IMAGE_EXTENSIONS, Watch()))
        source = FileSource("photos", place, paths, channels=channels, max_pixels=max_pixels)
        if not len(source):
            raise ValueError(f"no photos in {place}: nothing below it ends in {', '.join(IMAGE_EXTENSIONS)}")
        return source
    if not place.exists():
        raise ValueError(f"{place} does not exist; give a folder of photos, one photo, or a list of photos (.txt)")
    if place.suffix.lower() == ".txt":
        return open_list(place, "train", channels, max_pixels)
    return FileSource("photos", place.parent, [place.name], channels=channels, max_pixels=max_pixels)


def result_names(paths: Iterable[str]) -> Iterator[str]:
    """Yield a name for the results of each photo, none of them twice and none outside of their folder.

    Args:
        paths: of a source; `../b/1.jpg` and `/b/1.jpg` of a list become `b/1`. Where `b/1.jpg` and `b/1.png` are both
            there, the second becomes `b/1.png`.
    """
    taken: set[str] = set()
    for path in paths:
        parts = PurePosixPath(path.lstrip("/")).parts
        whole = PurePosixPath(*(part for part in parts if part != ".."))
        plain = whole.with_suffix("") if whole.name else whole
        names = chain((str(plain), str(whole)), (f"{whole}-{number}" for number in count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield name
