"""One shard: its images, encoded and put into a ZIP file, and the record of it that the index is made from."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mae_et.data.decode import ImageError
from mae_et.data.packed import Files
from mae_et.data.sources import Source
from mae_et.engine.bad_images import printable
from mae_et.packing.members import Namer, packed_bytes
from mae_et.packing.settings import Settings
from mae_et.packing.target import WORK, Target

# The first moment that ZIP files know: the same images give the same bytes.
_WHEN = (1980, 1, 1, 0, 0, 0)
_REPORT_EVERY = 32  # images

Report = Callable[[int, list[tuple[str, str]]], None]
"""Told of so many further images, and of those among them that could not be read, with what is wrong."""


class Job(NamedTuple):
    """What all shards of a split have in common.

    Attributes:
        source: the images.
        namer: their names in the store.
        settings: what is done to them.
        max_pixels: larger ones count as unreadable.
        target: where shards go.
        folder: where half-written ones lie.
    """

    source: Source
    namer: Namer
    settings: Settings
    max_pixels: int
    target: Target
    folder: Path

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.source) // self.settings.shard_images)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05d}.zip"


def record_name(number: int) -> str:
    """Return the file name of a shard's record, in the folder `target.WORK`."""
    return f"{number:05d}.json"


def pack_shard(job: Job, number: int, report: Report) -> None:
    """Write a shard and its record; the shard's own name comes last, and says that both are whole.

    Raises:
        OSError: images cannot be read for other reasons than their own, or the shard cannot be written.
    """
    half = job.folder / f"{shard_name(number)}.half"
    record = _write(job, number, half, report)
    record |= {"bytes": half.stat().st_size, "sha256": Files(job.folder).sha256(half.name)}
    job.target.write(job.folder, f"{WORK}/{record_name(number)}", json.dumps(record).encode())
    job.target.publish(half, shard_name(number))


def _write(job: Job, number: int, half: Path, report: Report) -> dict[str, Any]:
    """Write the images of a shard; return what is known of each."""
    first = number * job.settings.shard_images
    images = range(first, min(first + job.settings.shard_images, len(job.source)))
    record: dict[str, Any] = {"names": [], "labels": [], "offsets": [], "lengths": [], "crcs": [], "bad": []}
    before, done, bad = 0, 0, []
    with zipfile.ZipFile(half, "w", zipfile.ZIP_STORED) as archive:
        for i in images:
            try:
                data, was = packed_bytes(job.source, i, job.settings, job.max_pixels)
            except ImageError as error:
                name = printable(job.source.describe(i))
                bad.append((name, printable(str(error)).removeprefix(f"{name}: ")))
            else:
                before += was
                member = zipfile.ZipInfo(job.namer(i), _WHEN)
                member.create_system, member.external_attr = 3, 0o100644 << 16  # Unix, an ordinary file
                archive.writestr(member, data)
                record["names"].append(member.filename)
                record["labels"].append(job.source.label(i))
                record["offsets"].append(member.header_offset + len(member.FileHeader()))
                record["lengths"].append(len(data))
                record["crcs"].append(zlib.crc32(data))
            done += 1
            if done == _REPORT_EVERY or i == images[-1]:
                report(done, bad)
                record["bad"] += bad
                done, bad = 0, []
    return record | {"bytes_before": before}
