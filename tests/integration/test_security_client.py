"""FarmClient against a server that means harm."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from farm import client as client_room
from farm.client import FarmClient
from farm.errors import EnvironmentFault, QuotaExceeded
from farm.pictures import sha256

BATCH = "0f9k2m4x7q3w5t8b"
PICTURE = b"a picture"
JOB: dict[str, Any] = {
    "id": f"{BATCH}/0", "batch_id": BATCH, "idx": 0, "state": "succeeded", "failures": 0,
    "claim_no": 1, "engine": "fake", "progress": 1.0, "started_at": 1.0, "finished_at": 2.0,
    "object_key": "x", "sha256": sha256(PICTURE), "size_bytes": 9, "render_s": 1.0,
    "fingerprint": None, "error_code": None, "error": None,
    "spec": {"model": "m", "prompt": "a", "width": 64, "height": 64, "steps": 1,
             "guidance_scale": 1.0, "seed": 1, "format": "png"},
}  # fmt: skip


class Hostile(BaseHTTPRequestHandler):
    """Tells of one job, as `job` has it, and sends its picture as `picture` says."""

    job: dict[str, Any]
    picture: Any
    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        type(self).seen.append((self.path, self.headers["Authorization"]))
        if "/picture" in self.path or not self.path.startswith("/v1"):
            type(self).picture(self)
        else:
            self.answer(json.dumps({"jobs": [self.job], "next": None}).encode())

    def answer(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hostile(picture: Any = lambda it: it.answer(PICTURE), **job: Any) -> Iterator[tuple[Any, str]]:
    """Such a server: its handler, and its URL."""
    told = {"job": JOB | job, "picture": staticmethod(picture), "seen": []}
    handler: Any = type("Told", (Hostile,), told)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield handler, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_means_no_harm(tmp_path: Path) -> None:
    with hostile() as (_, url), FarmClient(url) as client:
        assert client.download(BATCH, tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{BATCH}-0000000.png", f"{BATCH}.jsonl"}


@pytest.mark.parametrize(
    "job",
    [
        {"batch_id": "../../x"}, {"batch_id": "../../x", "id": "../../x/0"}, {"batch_id": "/tmp/x"},
        {"batch_id": ""}, {"batch_id": ".."}, {"batch_id": "a\0b"}, {"batch_id": None},
        {"batch_id": "x" * 300}, {"idx": "../../x"}, {"idx": -1}, {"idx": True}, {"idx": 10**12},
        {"id": "/0"}, {"spec": JOB["spec"] | {"format": "png/../../x"}},
    ],
)  # fmt: skip
def test_names_of_a_server_lead_nowhere_else(job: dict[str, Any], tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    with (
        hostile(**job) as (_, url),
        FarmClient(url) as client,
        pytest.raises(EnvironmentFault, match="no farm has"),
    ):
        client.download(BATCH, inside)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_token_stays_with_the_farm(tmp_path: Path) -> None:
    """A picture is a redirect to the store, which must not see it."""
    with (
        hostile() as (store, elsewhere),
        hostile(lambda it: it.answer(b"", 307, Location=f"{elsewhere}/key")) as (farm, url),
        FarmClient(url, "farm_secret") as client,
    ):
        assert client.download(BATCH, tmp_path) == 1
    assert {token for _, token in farm.seen} == {"Bearer farm_secret"}
    assert store.seen == [("/key", None)]


def test_redirects_end_and_other_schemes_are_not_followed(tmp_path: Path) -> None:
    for place in ("/again", "file:///etc/passwd", "ftp://127.0.0.1/x"):
        answer = dict.fromkeys(("Location",), place)
        with (
            hostile(lambda it, answer=answer: it.answer(b"", 307, **answer)) as (farm, url),
            FarmClient(url) as client,
            pytest.raises(EnvironmentFault),
        ):
            client.download(BATCH, tmp_path)
        assert len(farm.seen) < 10


def limited(times: int, wait_s: int, told: dict[str, str]) -> Any:
    """Refuses so many times, then sends the picture."""
    left = iter(range(times))

    def picture(it: Any) -> None:
        if next(left, None) is None:
            it.answer(PICTURE)
        else:
            it.answer(json.dumps(told).encode(), 429, Retry_After=str(wait_s))

    return picture


LIMIT = {"code": "ERR_RATE_LIMIT", "detail": "more than 8 bodies at once", "errors": []}
QUOTA = {"code": "ERR_QUOTA_EXCEEDED", "detail": "may have 2 jobs queued", "errors": []}


def test_a_limit_that_passes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client_room.time, "sleep", slept.append)
    with hostile(limited(20, 5, LIMIT)) as (_, url), FarmClient(url) as client:
        assert client.download(BATCH, tmp_path) == 1
    assert len(slept) == 20
    assert all(0.5 < pause_s <= 5 for pause_s in slept)
    assert len(set(slept)) > 1, "many clients do not come back at once"


@pytest.mark.parametrize(
    ("patience_s", "wait_s", "told", "kind"),
    [
        (0.0, 1, LIMIT, EnvironmentFault),
        (60.0, 60, LIMIT, EnvironmentFault),
        (60.0, 60, QUOTA, QuotaExceeded),
    ],
)
def test_a_limit_that_does_not_pass_is_told(
    patience_s: float,
    wait_s: int,
    told: dict[str, Any],
    kind: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_room, "_PATIENCE_S", patience_s)
    with (
        hostile(limited(3, wait_s, told)) as (_, url),
        FarmClient(url) as client,
        pytest.raises(kind, match=told["detail"]),
    ):
        client.download(BATCH, tmp_path)


@pytest.mark.parametrize("headers", [{}, {"Content_Encoding": "gzip"}])
def test_an_answer_is_bounded(
    headers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_room, "MOST_BYTES", 100_000)
    with (
        hostile(lambda it: it.answer(bytes(10**6), **headers)) as (_, url),
        FarmClient(url) as client,
        pytest.raises(EnvironmentFault, match="more than 100,000 bytes"),
    ):
        client.download(BATCH, tmp_path)
    assert list(tmp_path.iterdir()) == []
