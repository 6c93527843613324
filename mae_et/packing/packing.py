"""A packing from its beginning, or from where it was interrupted, to the manifest, which is written last."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import torch

from mae_et.config import ConfigError
from mae_et.config.pretrain import DataConfig
from mae_et.data.files import PathTable
from mae_et.data.packed import FORMAT, INDEX, MANIFEST, Files, PackedSource, read_manifest
from mae_et.data.sources import Source, available_splits, open_source
from mae_et.packing.members import Namer
from mae_et.packing.progress import Progress
from mae_et.packing.settings import Settings, differences
from mae_et.packing.shards import Job, record_name, shard_name
from mae_et.packing.target import WORK, Target
from mae_et.packing.workers import pack_shards

_SETTINGS = "settings.json"


class TooManyBadError(RuntimeError):
    """More images cannot be read than the user allows."""


def pack(store: str, data: DataConfig, settings: Settings, workers: int, splits: Sequence[str] | None = None) -> None:
    """Pack splits of a source, or finish what was begun; does nothing for those that are finished.

    Args:
        store: a folder's path or a URL; each split is a folder in it.
        data: source, root, download, max_pixels and max_bad are used.
        settings: what to do to images.
        workers: processes; 0 for this one alone.
        splits: None for all that the source has.

    Raises:
        ConfigError: no such images, or a store begun with other settings.
        TooManyBadError: more images than `data.max_bad` allows cannot be read.
        OSError: a disk is full, or images are out of reach.
    """
    try:
        wanted = splits or available_splits(data.source, data.root)
        sources = {  # all of them first: what is missing is said before hours of work
            split: open_source(data.source, data.root, split, data.download, 3, data.max_pixels) for split in wanted
        }
        for split, source in sources.items():
            _pack_split(Target(f"{store.rstrip('/')}/{split}"), split, source, data, settings, workers)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"data: {error}") from None


def _pack_split(target: Target, split: str, source: Source, data: DataConfig, settings: Settings, workers: int) -> None:
    record = settings.record(data.source, split, source) | {"max_pixels": data.max_pixels}
    if target.files.exists(MANIFEST):
        _check_same(target, read_manifest(target.files).settings, record)
        whole = PackedSource(split, target.files)
        print(f"{target.files.root}: {len(whole):,} images are packed already")
    else:
        namer = Namer(data.source, source, settings.keep_bytes)
        with target.taken() as folder:
            job = Job(source, namer, settings, data.max_pixels, target, folder)
            _pack_rest(job, record, workers, data.max_bad)
    target.finish()


def _pack_rest(job: Job, record: dict[str, Any], workers: int, max_bad: float) -> None:
    """Pack what is not finished of a split, then write its index and its manifest."""
    finished, bad = _begin(job, record)
    images, each = len(job.source), job.settings.shard_images
    progress = Progress(job.target.files.root, images, sum(min(each, images - each * number) for number in finished))

    def report(done: int, further: list[tuple[str, str]]) -> None:
        for name, error in further:
            progress.say(f"left out: {name}: {error}")
        bad.extend(further)
        if len(bad) > max_bad * len(job.source):
            raise TooManyBadError(_too_many(bad, len(job.source), max_bad))
        progress.add(done, len(bad))

    report(0, [])
    pack_shards(job, sorted(set(range(job.shards)) - set(finished)), workers, report)
    sizes = _write_index(job, record)
    progress.end()
    packed = f"{images - len(bad):,} images in {job.shards:,} shards, {sizes[1] / 1e6:,.1f} MB"
    share = f", {sizes[1] / sizes[0]:.1%} of the {sizes[0] / 1e6:,.1f} MB of the files" if sizes[0] else ""
    print(f"{job.target.files.root}: {packed}{share}; {progress.seconds:,.0f} s")
    if bad:
        print(f"{len(bad):,} images could not be read and were left out; {MANIFEST} lists them", file=sys.stderr)


def _begin(job: Job, record: dict[str, Any]) -> tuple[list[int], list[tuple[str, str]]]:
    """Return which shards are finished, and what was left out of them; note the settings where nothing was begun.

    Raises:
        ConfigError: there are shards of other settings, or of none that are known.
    """
    target = job.target
    sizes = target.sizes()
    if target.work.exists(_SETTINGS):
        _check_same(target, json.loads(target.work.read(_SETTINGS)), record)
    elif any(name.endswith(".zip") for name in sizes):
        raise ConfigError(f"{target.files.root} has shards, and no record of what they are: choose an empty folder")
    else:
        target.write(job.folder, f"{WORK}/{_SETTINGS}", json.dumps(record).encode())
    finished, bad = [], []
    for number in range(job.shards):
        if shard_name(number) in sizes and target.work.exists(record_name(number)):
            row = _record(job, number)
            if row["bytes"] == sizes[shard_name(number)]:
                finished.append(number)
                bad += [(name, error) for name, error in row["bad"]]
    return finished, bad


def _record(job: Job, number: int) -> dict[str, Any]:
    return json.loads(job.target.work.read(record_name(number)))


def _check_same(target: Target, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = differences(begun, wanted)
    if found:
        raise ConfigError(
            f"{target.files.root} was packed with other settings: {'; '.join(found)}. Set them as they were, or choose "
            "an empty folder"
        )


def _write_index(job: Job, record: dict[str, Any]) -> tuple[int, int]:
    """Put the records of all shards together: the index, then the manifest. Returns the bytes before and after."""
    shards: list[dict[str, Any]] = []
    bad: list[Any] = []
    parts: dict[str, list[np.ndarray]] = {column: [] for column in ("labels", "offsets", "lengths", "crcs")}
    before = 0

    def names() -> Iterator[str]:
        nonlocal before
        for number in range(job.shards):
            row = _record(job, number)
            for column, part in parts.items():
                part.append(np.array(row[column], INDEX[column]))
            before += row["bytes_before"]
            bad.extend(row["bad"])
            name, images = shard_name(number), len(row["names"])
            shards.append({"name": name, "images": images, "bytes": row["bytes"], "sha256": row["sha256"]})
            yield from row["names"]

    table = PathTable(names())
    columns = {
        "names": table.text,
        "ends": table.ends,
        **{column: np.concatenate(part) for column, part in parts.items()},
    }
    manifest = {
        "format": FORMAT,
        "images": len(table),
        "classes": job.source.classes,
        "settings": record,
        "made_by": {"torch": str(torch.__version__), "pillow": PIL.__version__},
        "shards": shards,
        "index": {column: _write_column(job, column, values) for column, values in columns.items()},
        "bad": bad,
    }
    job.target.write(job.folder, MANIFEST, json.dumps(manifest, indent=1).encode())
    return before, sum(shard["bytes"] for shard in shards)


def _write_column(job: Job, column: str, values: np.ndarray) -> str:
    """Write a column of the index, and return its SHA-256."""
    half = job.folder / f"{column}.half"
    with half.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    digest = Files(job.folder).sha256(half.name)
    job.target.publish(half, f"index/{column}.npy")
    return digest


def _too_many(bad: Sequence[Sequence[str]], images: int, max_bad: float) -> str:
    first = "; ".join(f"{name}: {error}" for name, error in bad[:3])
    more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
    return (
        f"{len(bad):,} of {images:,} images could not be read, more than data.max_bad={max_bad:g} allows: {first}"
        f"{more}. Mend them, or raise data.max_bad to leave them out; the same command then continues"
    )
