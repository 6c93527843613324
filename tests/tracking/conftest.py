"""What the tracking tests need of W&B: a reader of its log files, an isolated environment, a server on loopback."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tracking.wandb_server import FakeWandbServer

WANDB_PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR")


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds all that W&B would otherwise write to or read from the user's home; no key is known."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    for name in WANDB_PLACES:
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    # The library and its helper process read the environment once; each test needs its own.
    wandb.teardown()
    yield home
    wandb.teardown()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "panel.png"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    return path


def wandb_records(path: Path) -> list[Any]:
    """Read the protobuf records of a .wandb file: LevelDB's log format behind a 7-byte header.

    Format: blocks of 32 KiB; each chunk has checksum, length and type (1 whole, 2 first, 3 middle, 4 last).
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    # Offline, finish() returns before the helper process has written the file's end; its own end waits for that.
    wandb.teardown()
    content = path.read_bytes()
    assert content[:4] == b":W&B", "not a .wandb file"
    records, pending, position = [], b"", 7
    while position + 7 <= len(content):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        chunk = content[position + 7 : position + 7 + length]
        if len(chunk) < length or kind == 0:
            break
        assert zlib.crc32(bytes([kind]) + chunk) == checksum, f"bad checksum at byte {position}"
        position += 7 + length
        pending = chunk if kind in (1, 2) else pending + chunk
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(pending)
            records.append(record)
    return records


def history_rows(records: list[Any]) -> list[dict[str, Any]]:
    """The rows passed to run.log, without W&B's own columns (_step, _runtime, ...)."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                # A picture is a mapping, written one entry at a time: nested_key is ("pictures/panel", "path").
                first, *rest = [item.key] if item.key else item.nested_key
                if rest:
                    row.setdefault(first, {})["/".join(rest)] = json.loads(item.value_json)
                elif not first.startswith("_"):
                    row[first] = json.loads(item.value_json)
            rows.append(row)
    return rows


@pytest.fixture
def read_wandb():
    """(records of a .wandb file, history rows of records)."""
    return wandb_records, history_rows


@pytest.fixture
def wandb_server(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandbServer]:
    """A W&B server on loopback that the environment names, with a key that it accepts."""
    server = FakeWandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield server
    server.close()
