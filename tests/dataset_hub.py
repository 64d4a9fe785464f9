"""A hub that takes datasets, in memory: what huggingface_hub and `datasets` ask of the real one.

Large files come by Git LFS's basic transfer, small ones inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub import LocalServer, git

TOKEN = "hf_of_the_tests"
LARGE = (".tar", ".parquet", ".png", ".gz", ".jsonl")  # as its .gitattributes say
REPO = "me/shapes"
_API = f"/api/datasets/{REPO}"
_FILES = re.compile(rf"/(?:api/)?datasets/{REPO}/resolve/[^/]+/(.+)")


@dataclass
class Commit:
    """One that was taken: its message, and the keys that it put and deleted."""

    message: str
    put: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


class DatasetHub(LocalServer):
    """One repository, me/shapes, private or not; None: it is not there. `sent`: uploads, by hash.

    `refuse`: the status that requests of a method and path are answered with instead.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.commits: list[Commit] = []
        self.sent: list[str] = []
        self.private: bool | None = None
        self.refuse: dict[tuple[str, str], int] = {}
        self.elsewhere = 0  # commits of somebody else
        self.lock = Lock()
        super().__init__(_Handler)

    @property
    def head(self) -> str:
        told = f"{len(self.commits)} {self.elsewhere}"
        return hashlib.sha1(told.encode()).hexdigest()

    def row(self, key: str) -> dict[str, Any]:
        """As a listing tells of a file."""
        data = self.files[key]
        row: dict[str, Any] = {"type": "file", "path": key, "size": len(data), "oid": git(data)}
        if key.endswith(LARGE):
            oid = hashlib.sha256(data).hexdigest()
            row["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
        return row

    def take(self, lines: list[dict[str, Any]]) -> Commit:
        """Carry a commit out."""
        commit = Commit(lines[0]["value"]["summary"])
        for line in lines[1:]:
            value, key = line["value"], line["value"]["path"]
            if line["key"] == "file":
                self.files[key] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[key] = self.stored[value["oid"]]
            else:
                del self.files[key]
            (commit.deleted if line["key"] == "deletedFile" else commit.put).append(key)
        self.commits.append(commit)
        return commit


class _Handler(BaseHTTPRequestHandler):
    server: DatasetHub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            status = self.server.refuse.get((self.command, path))
            if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status = 401 if not path.startswith("/store/") else None
            if status is not None:
                self._json({"error": "not for you"}, status)
            elif self.command in ("GET", "HEAD"):
                self._read(path)
            else:
                self._write(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read(self, path: str) -> None:
        hub = self.server
        if (found := _FILES.fullmatch(path)) and found[1] in hub.files:
            self._file(found[1])
        elif hub.private is None:
            self._json({"error": "no such repository"}, 404)
        elif path.startswith(f"{_API}/tree/"):
            self._tree(path.removeprefix(f"{_API}/tree/").partition("/")[2])
        elif path == _API or path.startswith(f"{_API}/revision/"):
            files = [{"rfilename": key} for key in hub.files]
            self._json({"id": REPO, "sha": hub.head, "siblings": files, "private": hub.private})
        else:
            self._json({"error": "no such thing"}, 404)

    def _tree(self, folder: str) -> None:
        """What lies below a folder, all of it or only the next level."""
        hub, start = self.server, f"{folder}/" if folder else ""
        files = [key for key in hub.files if key.startswith(start)]
        folders = {one.as_posix() for key in files for one in PurePosixPath(key).parents}
        rows = [hub.row(key) for key in files]
        rows += [
            {"type": "directory", "path": one, "oid": git(b""), "size": 0}
            for one in sorted(folders - {"."})
            if one.startswith(start)
        ]
        if "recursive=true" not in self.path.lower():
            rows = [row for row in rows if "/" not in row["path"].removeprefix(start)]
        if files or not folder:
            self._json(rows)
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _file(self, key: str) -> None:
        hub = self.server
        row = hub.row(key)
        tag = row.get("lfs", row)["oid"]
        about = {"ETag": f'"{tag}"', "X-Repo-Commit": hub.head, "Accept-Ranges": "bytes"}
        data, status = hub.files[key], 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            about["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, about)

    def _write(self, path: str, body: bytes) -> None:
        hub = self.server
        if path.startswith("/store/"):
            oid = path.removeprefix("/store/")
            assert hashlib.sha256(body).hexdigest() == oid
            hub.stored[oid] = body
            hub.sent.append(oid)
            self._send(200, b"", {})
        elif path == f"{_API}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            if lines[0]["value"]["parentCommit"] != hub.head:
                self._json({"error": "the parent is not the head"}, 412)
                return
            hub.take(lines)
            url = f"{hub.url}/datasets/{REPO}/commit/{hub.head}"
            self._json({"commitUrl": url, "commitOid": hub.head})
        else:
            self._ask(path, json.loads(body) if body.startswith(b"{") else {})

    def _ask(self, path: str, asked: dict[str, Any]) -> None:
        hub = self.server
        if path == "/api/repos/create":
            assert (asked["organization"], asked["name"]) == tuple(REPO.split("/"))
            assert asked["type"] == "dataset"
            there = hub.private is not None
            if not there:
                hub.private = asked.get("visibility") == "private"
                hub.files[".gitattributes"] = b"*.tar filter=lfs\n"
            self._json({"url": f"{hub.url}/datasets/{REPO}"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == f"{_API}/preupload/main":
            self._json({"files": [self._mode(one["path"]) for one in asked["files"]]})
        elif path == f"/datasets/{REPO}.git/info/lfs/objects/batch":
            self._json({"transfer": "basic", "objects": [self._where(o) for o in asked["objects"]]})
        elif path.startswith(f"{_API}/paths-info/"):
            self._json([hub.row(key) for key in asked["paths"] if key in hub.files])
        else:
            self._json({"error": "no such thing"}, 404)

    def _mode(self, key: str) -> dict[str, Any]:
        there = self.server.files.get(key)
        oid = None if there is None else git(there)
        mode = "lfs" if key.endswith(LARGE) else "regular"
        return {"path": key, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _where(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.stored:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.server.url}/store/{asked['oid']}"}}}

    def _json(self, told: Any, status: int = 200) -> None:
        self._send(status, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
