"""A W&B server on loopback, whole or broken."""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandbServer:
    """The part of W&B's server that runs and saved views talk to, on 127.0.0.1; remembers what it was sent.

    `runs` maps a run id to {"rows": history rows, "summary": its summary, "upserts": variables of each UpsertBucket,
    "alerts": variables of each alert}; `uploads` lists the names of uploaded files; `artifacts` maps the name of an
    artifact to what was said of it; `views` has the variables of each saved workspace or report; `requests` counts
    what arrived. What it may do wrong, from any moment on: `delay` seconds
    before each answer, answer with the HTTP `status`, or with the bytes of `rubbish`.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.status = 200
        self.rubbish: bytes | None = None
        self.requests = 0
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: list[str] = []
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: list[dict[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def reply(self, answer: Any) -> None:
                fake.requests += 1
                time.sleep(fake.delay)
                body = json.dumps(answer).encode() if fake.rubbish is None else fake.rubbish
                self.send_response(fake.status)
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
            def process_request(self, request: Any, client_address: Any) -> None:
                fake._connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                # The client's helper process drops its idle connections when it ends.
                if not isinstance(sys.exc_info()[1], OSError):
                    super().handle_error(request, client_address)

        self._connections: list[socket.socket] = []
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Die: answer nothing more, neither on new connections nor on those that are open."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def take_rows(self, run_id: str, message: dict[str, Any]) -> None:
        files = message.get("files") or {}
        history, summary = files.get("wandb-history.jsonl"), files.get("wandb-summary.json")
        if summary:
            self.runs[run_id]["summary"] = json.loads(summary["content"][-1])
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
            run = self.runs.setdefault(run_id, {"rows": [], "summary": {}, "upserts": [], "alerts": []})
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
        if operation == "NotifyScriptableRunAlert":
            self.runs[variables["runName"]]["alerts"].append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if operation.lower().startswith("upsertview"):
            self.views.append(variables)
            view = {"id": f"view{len(self.views)}", "name": variables["name"], "type": variables["type"]}
            view.update({"displayName": variables["displayName"], "description": "", "spec": variables["spec"]})
            project = {"id": "cHJvamVjdA==", "name": variables["projectName"], "entityName": variables["entityName"]}
            return {"upsertView": {"view": {**view, "project": project}, "inserted": True}}
        if operation == "GetProjects":  # those of the views so far
            names = {view["projectName"] for view in self.views}
            common = {"__typename": "Project", "entityName": "me", "createdAt": "2026-01-01T00:00:00", "user": None}
            nodes = [{"id": "cHJvamVjdA==", "name": name, "isBenchmark": False, **common} for name in names]
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}
        if operation == "ProjectInternalId":
            return {"project": {"id": "cHJvamVjdA==", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        return self._answer_artifact(operation, variables, base)

    def _answer_artifact(self, operation: str, variables: dict[str, Any], base: str) -> dict[str, Any]:
        if operation == "ArtifactType":  # no such artifact yet
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            said = variables["input"]
            self.artifacts[said["artifactCollectionName"]] = {**said, "committed": False}
            sequence = {"latestArtifact": None}
            artifact = {"id": said["artifactCollectionName"], "state": "PENDING", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            name = operation[0].lower() + operation[1:]
            file = {"id": "ZmlsZQ==", "uploadUrl": f"{base}/upload/manifest", "uploadHeaders": []}
            return {name: {"artifactManifest": {"id": "bWFuaWZlc3Q=", "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": f"stored/{file['name']}",
                    "uploadUrl": f"{base}/upload/artifact/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
                for file in variables["input"]["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if operation == "CommitArtifact":
            name = variables["artifactID"]
            self.artifacts[name]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": name, "digest": self.artifacts[name]["digest"]}}}
        return {}

    @staticmethod
    def _resume_status(run_id: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "cnVu",
            "name": run_id,
            "displayName": "fake-run",
            "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": 0,
            "historyLineCount": len(run["rows"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run["rows"][-1:]]),
            "eventsTail": "[]",
            "config": run["upserts"][-1].get("config") or "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
