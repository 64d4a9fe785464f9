"""A model hub of the tests' own: the API, redirects to where large files lie, and mischief."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
BIG = "unet/diffusion_pytorch_model.safetensors"
SECOND = "vae/diffusion_pytorch_model.safetensors"


@dataclass
class Asked:
    """One request as the server saw it."""

    path: str
    range: str | None
    if_range: str | None
    token: str | None


@dataclass
class Mischief:
    """What the server does wrong. `cut`: bytes of a file after which it hangs up, once each."""

    cut: int | None = None
    falls: bool = True  # and is down once it has hung up
    down: bool = False
    names: list[str] = field(default_factory=list)  # more file names in the listing
    flip: bool = False
    redirect: str | None = None  # where large files are said to lie
    no_range: bool = False


class LocalServer(ThreadingHTTPServer):
    """Serves on a free port, in threads, from its making until `stop`."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.thread = Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Hub(LocalServer):
    """One repository, me/tiny, at one commit. `asked`: every request so far."""

    def __init__(self, big: int = 3_000_000) -> None:
        noise = random.Random(1)
        self.files = {
            "README.md": b"a card",
            "model_index.json": b'{"unet": ["diffusers", "UNet2DConditionModel"]}',
            "unet/config.json": b"{}",
            BIG: noise.randbytes(big),
            SECOND: noise.randbytes(big // 4),
            "unet/diffusion_pytorch_model.bin": b"a pickle",
            "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
            "whole.safetensors": b"a checkpoint beside",
            ".gitattributes": b"",
        }
        self.asked: list[Asked] = []
        self.mischief = Mischief()
        super().__init__(_Handler)

    def ranges(self, name: str = BIG) -> list[str | None]:
        """The Range headers of the requests for a file's bytes."""
        return [a.range for a in self.asked if a.path == f"/lfs/{name}"]

    def about(self) -> dict[str, Any]:
        rows = [self._row(name, data) for name, data in self.files.items()]
        rows += [{"rfilename": name, "size": 1} for name in self.mischief.names]
        config = {"diffusers": {"_class_name": "StableDiffusionXLPipeline"}}
        card = {"license": "openrail++"}
        return {"sha": COMMIT, "siblings": rows, "cardData": card, "config": config}

    def _row(self, name: str, data: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git(data)}
        if is_large(name):
            row["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return row

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or that cut the connection, is no news."""

    def write_to(self, folder: Path) -> None:
        """The repository as a directory."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def git(data: bytes) -> str:
    """The hash that git knows a file by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, headers = self.server, self.headers
        path = unquote(urlsplit(self.path).path)
        token = headers.get("Authorization")
        hub.asked.append(Asked(path, headers.get("Range"), headers.get("If-Range"), token))
        if hub.mischief.down:
            self._send(503, b"down")
        elif path in (f"/api/models/me/tiny/revision/{r}" for r in ("main", "v1", COMMIT)):
            self._send(200, json.dumps(hub.about()).encode())
        elif path.startswith(prefix := f"/me/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(prefix)
            if is_large(name):
                base = hub.mischief.redirect or ""
                self._send(302, b"elsewhere", {"Location": f"{base}/lfs/{name}"})
            else:
                self._file(name)
        elif path.startswith("/lfs/"):
            self._file(path.removeprefix("/lfs/"))
        else:
            self._file(path.removeprefix("/"))

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        hub = self.server
        data = hub.files.get(name)
        if data is None:
            self._send(404, b"no such file")
            return
        if hub.mischief.flip and name == BIG:
            data = data[:-1] + bytes([data[-1] ^ 1])
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        asked, about = self.headers.get("Range"), {"ETag": tag}
        status, body = 200, data
        same = self.headers.get("If-Range") in (None, tag)
        if asked and same and not hub.mischief.no_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            about["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, body = 206, data[start:]
        cut = hub.mischief.cut if name == BIG else None
        if cut is not None and hub.mischief.falls:
            hub.mischief.down = True
        self._send(status, body, about, cut)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body[:cut])
            except OSError:  # the client went away
                self.close_connection = True
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
