"""How a store is packed: what must be the same when an interrupted packing continues."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mae_et.config import ConfigError
from mae_et.data.files import FileSource, PathTable
from mae_et.data.packed import PackedSource
from mae_et.data.sources import Source


@dataclass(frozen=True)
class Settings:
    """What is done to images, and how they are laid out.

    Attributes:
        short_side: px, of the images at most; smaller ones are never enlarged.
        quality: of JPEG, as libjpeg counts it.
        subsampling: of its chroma, 4:4:4 (none) or 4:2:0.
        keep_bytes: files as they are; the three above say nothing then.
        shard_images: of one shard, counted before those that cannot be read are left out.

    Raises:
        ConfigError: a value out of range.
    """

    short_side: int
    quality: int
    subsampling: str
    keep_bytes: bool
    shard_images: int

    def __post_init__(self) -> None:
        ranges = {"short_side": (1, 65_500), "quality": (1, 100), "shard_images": (1, 10_000_000)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {getattr(self, name)} is out of range: it must be {low:,} to {high:,}")

    def record(self, kind: str, split: str, source: Source) -> dict[str, Any]:
        """Return all that decides what is in a store, for its manifest: the settings and which images."""
        encoding = {"short_side": self.short_side, "quality": self.quality, "subsampling": self.subsampling}
        return {
            **({} if self.keep_bytes else encoding),
            "keep_bytes": self.keep_bytes,
            "shard_images": self.shard_images,
            "source": kind,
            "split": split,
            "listed": len(source),
            "listing": listing(source),
        }


def listing(source: Source) -> str:
    """Return the SHA-256 of what a source lists: names where it has some, labels and classes."""
    digest = hashlib.sha256(json.dumps([source.name, len(source), source.classes]).encode())
    digest.update(source.labels.tobytes())
    names = listed_names(source)
    if names is not None:
        digest.update(names.text.tobytes())
        digest.update(names.ends.tobytes())
    return digest.hexdigest()


def listed_names(source: Source) -> PathTable | None:
    """Return the names that a source has for its images; None where they have numbers alone."""
    if isinstance(source, FileSource):
        return source.paths
    return source.names if isinstance(source, PackedSource) else None


def differences(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return what differs between two records, for people: "quality 90, now 80"."""
    keys = [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]
    return [
        "the names, labels or classes of the images"
        if key == "listing"
        else f"{key} {begun.get(key)}, now {wanted.get(key)}"
        for key in keys
    ]
