"""What the tracking tests need of W&B: a reader of its log files, an isolated environment, a server on loopback."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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


class FakeWandbServer:
    """The part of W&B's server that a run without artifacts talks to, on 127.0.0.1; remembers what it was sent.

    `runs` maps a run id to {"rows": history rows, "upserts": variables of each UpsertBucket}; `uploads` lists the
    names of uploaded files.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def reply(self, answer: Any) -> None:
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def body(self) -> bytes:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

            def do_GET(self) -> None:
                self.reply({})

            def do_PUT(self) -> None:
                self.body()
                fake.uploads.append(self.path.removeprefix("/upload/"))
                self.reply({})

            def do_POST(self) -> None:
                content = self.body()
                if self.path.endswith("/file_stream"):
                    fake.take_rows(self.path.split("/")[-2], json.loads(content))
                    self.reply({"limits": {}})
                elif self.path.rstrip("/").endswith("graphql"):
                    request = json.loads(content)
                    self.reply({"data": fake.answer(request, f"http://{self.headers['Host']}")})
                else:
                    self.reply({})

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                # The client's helper process drops its idle connections when it ends.
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_rows(self, run_id: str, message: dict[str, Any]) -> None:
        history = (message.get("files") or {}).get("wandb-history.jsonl")
        if history:
            rows = self.runs[run_id]["rows"]
            del rows[history["offset"] :]
            rows.extend(json.loads(line) for line in history["content"])

    def answer(self, request: dict[str, Any], base: str) -> dict[str, Any]:
        """Answer one GraphQL request; what a run can do without gets an empty answer."""
        variables = request.get("variables") or {}
        found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        operation = request.get("operationName") or (found[1] if found else "")
        project = {"id": "cHJvamVjdA==", "name": variables.get("project"), "entity": {"id": "ZQ==", "name": "me"}}
        run_id = str(variables.get("name"))
        if operation == "UpsertBucket":
            inserted = run_id not in self.runs
            run = self.runs.setdefault(run_id, {"rows": [], "upserts": []})
            run["upserts"].append({name: value for name, value in variables.items() if value is not None})
            bucket = {
                "id": "cnVu",
                "name": run_id,
                "displayName": variables.get("displayName") or "fake-run",
                "description": None,
                "config": variables.get("config") or "{}",
                "sweepName": None,
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "RunResumeStatus":
            run = self.runs.get(run_id)
            return {"model": {**project, "bucket": None if run is None else self._resume_status(run_id, run)}}
        if operation in ("Viewer", "ViewerQuery"):
            viewer = {"id": "dXNlcg==", "entity": "me", "username": "me", "email": "me@localhost", "flags": "{}"}
            return {"viewer": {**viewer, "admin": False, "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{base}/upload/{name}"} for name in variables.get("files", [])]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return {}

    @staticmethod
    def _resume_status(run_id: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "cnVu",
            "name": run_id,
            "displayName": "fake-run",
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(run["rows"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run["rows"][-1:]]),
            "eventsTail": "[]",
            "config": run["upserts"][-1].get("config") or "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }


@pytest.fixture
def wandb_server(wandb_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandbServer]:
    """A W&B server on loopback that the environment names, with a key that it accepts."""
    server = FakeWandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield server
    server.close()
