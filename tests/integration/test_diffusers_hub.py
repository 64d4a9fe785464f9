"""A model named by its hub id, fetched from a small imitation of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from farm.catalog import Weights
from farm.errors import ModelNotLoaded
from tests.models import tiny
from workers.child import Child
from workers.engine import EngineConfig, EngineInfo

COMMIT = "c0ffee" * 6 + "c0ff"
REFS = ("main", "v1", COMMIT)


class Hub(ThreadingHTTPServer):
    """Serves one model, me/tiny, at one commit. `fetched`: names of the files sent so far."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    def names(self) -> list[str]:
        files = (f for f in self.folder.rglob("*") if f.is_file())
        return sorted(f.relative_to(self.folder).as_posix() for f in files)

    def about(self) -> object:
        return {
            "id": "me/tiny",
            "sha": COMMIT,
            "siblings": [{"rfilename": n} for n in self.names()],
        }

    def tree(self) -> object:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name in self.names()
            for data in [(self.folder / name).read_bytes()]
        ]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/me/tiny/tree/"):
            self._send(json.dumps(self.server.tree()).encode())
        elif path in ("/api/models/me/tiny", *(f"/api/models/me/tiny/revision/{r}" for r in REFS)):
            self._send(json.dumps(self.server.about()).encode())
        elif path.startswith(prefix := f"/me/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(prefix)
            if name in self.server.names():
                self._send((self.server.folder / name).read_bytes())
                self.server.fetched += [name] if self.command == "GET" else []
            else:
                self._send(b"", 404, "EntryNotFound")
        else:
            self._send(b"{}", 404, "RevisionNotFound" if "revision" in path else "RepoNotFound")

    do_HEAD = do_GET

    def _send(self, body: bytes, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tiny("sd15"))
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load(log: Path, repo: str = "me/tiny", revision: str | None = None) -> EngineInfo:
    weights = Weights(repo=repo, revision=revision)
    child = Child(EngineConfig("diffusers", "tiny", weights, threads=1), log=log)
    try:
        return child.start()
    finally:
        child.close()


def test_a_hub_id_is_fetched_once_and_loads_again_without_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = load(tmp_path / "log", revision="v1")
    assert sorted(hub.fetched) == hub.names()
    hub.fetched.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert load(tmp_path / "log", revision="v1") == info
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [("me/other", None, "repo me/other: "), ("me/tiny", "v9", "repo me/tiny@v9: ")],
)
def test_an_unknown_repo_or_revision_is_told(
    hub: Hub, tmp_path: Path, repo: str, revision: str | None, told: str
) -> None:
    with pytest.raises(ModelNotLoaded) as caught:
        load(tmp_path / "log", repo, revision)
    assert caught.value.message.startswith(told)
    assert hub.fetched == []
