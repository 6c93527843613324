"""Every byte of a store against its checksums."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable

from mae_et.config import ConfigError
from mae_et.data.decode import DEFAULT_MAX_PIXELS
from mae_et.data.packed import PackedSource, Shard, open_packed, packed_splits


def verify(store: str, say: Callable[[str], None]) -> int:
    """Check the SHA-256 of every shard, its directory against the index, and the CRC-32 of every image.

    Returns:
        0 if all is well, else 1; what is damaged has been said, shard by shard and image by image.

    Raises:
        ConfigError: there is no store, its index is damaged, or a shard is not there.
    """
    try:
        sources = [open_packed(store, split, 3, DEFAULT_MAX_PIXELS) for split in packed_splits(store) or ("train",)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    damaged = 0
    for source in sources:
        for number, shard in enumerate(source.manifest.shards):
            faults = list(_faults(source, number, shard))
            damaged += bool(faults)
            for fault in faults:
                say(f"{source.files.path(shard.name)}: {fault}")
        images, shards = len(source), len(source.manifest.shards)
        say(f"{source.files.root}: {images:,} images in {shards:,} shards were read")
    say(f"{damaged:,} damaged shards: copy them again" if damaged else "all checksums are right")
    return 1 if damaged else 0


def _faults(source: PackedSource, number: int, shard: Shard) -> list[str]:
    rows = source.rows(number)
    faults = []
    digest = hashlib.sha256()
    with source.files.open(shard.name) as file:
        for name, offset, length, crc in rows:  # each image is read once, in the order in which they lie there
            digest.update(file.read(offset - file.tell()))
            data = file.read(length)
            digest.update(data)
            if zlib.crc32(data) != crc:
                faults.append(f"{name} is damaged (CRC-32)")
        digest.update(file.read())
        if digest.hexdigest() != shard.sha256:
            faults.append("its SHA-256 is not the one in the manifest")
        try:
            with zipfile.ZipFile(file) as archive:
                listed = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
        except zipfile.BadZipFile as error:
            return [*faults, f"its directory is damaged ({error})"]
    same = listed == [(name, length, crc) for name, _, length, crc in rows]
    return faults if same else [*faults, "its directory is not the one in the index"]
