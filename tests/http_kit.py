"""A farm behind a real HTTP server in a thread, and a worker that needs no engine."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from PIL import Image

from farm.catalog import Lane
from farm.config import Settings
from farm.http.run import Server, bind
from farm.service import Farm
from farm.store import jobs, schema, tokens
from farm.store.jobs import Picture
from tests import servers
from tests.store_kit import Kit

SHAPES = Lane("shapes", "diffusers")


def png(shade: int) -> bytes:
    """A small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 40, 80)).save(file, "PNG")
    return file.getvalue()


class HttpKit:
    """`http` asks as someone on this machine; `farm` looks at the same farm from behind."""

    def __init__(self, farm: Farm, url: str, server: Server) -> None:
        self.farm, self.url, self.server = farm, url, server
        self.http = httpx.Client(base_url=url, timeout=30)

    def submit(self, *prompts: object, **about: object) -> str:
        answer = self.http.post("/v1/batches", json={"prompts": prompts or ["a"], **about})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def token(self, *scopes: str, owner: str = "", valid_s: float | None = None) -> str:
        with self.farm.db.write() as connection:
            return tokens.create(connection, "test", scopes, owner=owner, valid_s=valid_s)[1]

    def render(self, batch_id: str, limit: int = 100) -> int:
        """As a worker would: claim, store, record. How many."""
        store = Kit(self.farm.db)
        done = []
        for claim in store.claim(batch_id, store.session(lane=SHAPES), limit, SHAPES):
            data = png(claim.ref.idx)
            key = f"pictures/{batch_id}/{claim.ref.idx}.png"
            self.farm.blobs.put(key, data, "image/png")
            sha256 = hashlib.sha256(data).hexdigest()
            done.append((claim, Picture(key, sha256, len(data), 0.5, "f" * 64)))
        with self.farm.db.write() as connection:
            return len(jobs.succeed(connection, done))


@contextmanager
def serving(
    home: Path, broker_url: str, *, guarded: bool = False, **told: Any
) -> Iterator[HttpKit]:
    """A served farm; `guarded`: it has a token already, so it asks for them."""
    settings = Settings(home=home, broker_url=broker_url, **told)  # type: ignore[arg-type]
    with Farm(settings) as farm:
        schema.upgrade(farm.db)
        if guarded:
            with farm.db.write() as connection:
                tokens.create(connection, "first", ("admin",))
        with bind("127.0.0.1", 0) as place:
            server = Server(farm, "127.0.0.1", 0)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
            thread.start()
            servers.poll(lambda: server.started, "the HTTP server", 30)
            kit = HttpKit(farm, f"http://127.0.0.1:{place.getsockname()[1]}", server)
            try:
                yield kit
            finally:
                kit.http.close()
                server.stop()
                thread.join(30)
                assert not thread.is_alive()
