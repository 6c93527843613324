"""What a checkpoint's folder holds, written down with hashes, and compared with what is there."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_et.config.plain import JSON_LIMIT, parse_json, read_bytes

FORMAT_VERSION = 1
FILE_NAME = re.compile(r"state\.json|[A-Za-z0-9_]+\.safetensors")
MANIFEST = "manifest.json"
STATE = "state.json"
BLOCK = 1 << 22  # bytes per read and write: small enough that hashing finds them in the cache
_FORMAT = "mae_et checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, or not be trusted; the message names the file and what is wrong."""


def new_manifest(step: int, files: Mapping[str, Mapping[str, int | str]], package_version: str) -> bytes:
    """The content of a checkpoint's manifest.

    Args:
        step: optimizer steps done.
        files: name -> {"bytes", "sha256"}.
        package_version: of the writer.
    """
    manifest = {"format": _FORMAT, "format_version": FORMAT_VERSION, "package_version": package_version}
    return _encode({**manifest, "step": step, "files": files})


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with a checksum of itself, in the one spelling that `_read` accepts."""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1, sort_keys=True).encode() + b"\n"


def verify(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns the manifest.

    Raises:
        CheckpointError: a file is missing, truncated, altered or unreadable, or the manifest is not one that a save
            writes, whatever its checksum.
    """
    file = path / MANIFEST
    try:
        manifest = _read(file)
        for name, expected in manifest["files"].items():
            file = path / name
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device might never end
                raise CheckpointError(f"{file}: cannot be read: it is no file")
            if found.st_size != expected["bytes"]:
                what = "truncated" if found.st_size < expected["bytes"] else "too long"
                raise CheckpointError(f"{file}: {what}: {found.st_size:,} of {expected['bytes']:,} bytes")
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file}: altered since it was written (its SHA-256 differs)")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    return manifest


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = read_bytes(file, JSON_LIMIT)
        manifest = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{file}: not the manifest of a checkpoint of mae_et")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: unknown format version {manifest.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}; use the release that wrote it ({manifest.get('package_version')})"
        )
    manifest.pop("checksum", None)
    if _encode(manifest) != raw:
        raise CheckpointError(f"{file}: altered since it was written (its checksum differs)")
    if problem := _problem(manifest):
        raise CheckpointError(f"{file}: {problem}")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """Why no save wrote this: anybody can make a checksum that fits."""
    step, files = manifest.get("step"), manifest.get("files")
    if not _is_count(step):
        return f"its step is {step!r}, not a number of steps"
    if not isinstance(files, dict):
        return "lists no files"
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name):
            return f"names {name!r}, which no checkpoint holds"
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            return f"does not give the size and SHA-256 of {name}"
    return None if STATE in files else f"does not list {STATE}"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
