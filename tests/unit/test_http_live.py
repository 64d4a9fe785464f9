"""Waiting and reading bodies without a server: looks are shared, slow and large senders refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import Request

from farm.errors import NotFound
from farm.http import bodies, live
from farm.http.live import Looks, matches, tag
from farm.http.problems import Refusal


@dataclass
class Seen:
    state: str
    rate: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def test_a_tag_changes_with_what_matters() -> None:
    assert tag(Seen("a", 1.0)) == tag(Seen("a", 2.0)) != tag(Seen("b"))
    assert tag(Seen("a")).startswith('W/"')


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, False), ("", False), ("*", True), ('"x"', True), ('W/"x"', True), ('"y", "x"', True),
     ('"xx"', False), ("x", False)],
)  # fmt: skip
def test_which_tags_match(given: str | None, found: bool) -> None:
    assert matches(given, 'W/"x"') is found


def test_those_who_wait_share_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.01)
    looked: list[str] = []
    lock = threading.Lock()

    def look(name: str) -> Seen:
        with lock:
            looked.append(name)
        return Seen(f"{name} {len(looked)}")

    async def run() -> None:
        looks = Looks(look)
        found = await asyncio.gather(*(looks.soon(name) for name in ["a", "b"] * 200))
        assert sorted(looked) == ["a", "b"]
        assert len({seen.state for seen in found}) == 2
        assert (await looks.soon("a")).state == "a 3"
        assert (await looks.now("a")).state == "a 4"

    asyncio.run(run())


def test_a_failed_look_fails_for_all_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY_S", 0.01)

    def look(name: str) -> Seen:
        raise NotFound()

    async def run() -> None:
        looks = Looks(look)
        found = await asyncio.gather(*(looks.soon("a") for _ in range(9)), return_exceptions=True)
        assert {type(error) for error in found} == {NotFound}
        one, other = (asyncio.create_task(looks.soon("a")) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()  # a client that goes takes the look from nobody
        with pytest.raises(NotFound):
            await other

    asyncio.run(run())


def sent(
    receive: Callable[[], Awaitable[dict[str, Any]]], *headers: tuple[bytes, bytes]
) -> Request:
    return Request({"type": "http", "headers": list(headers)}, receive)  # type: ignore[arg-type]


def test_a_client_that_stops_sending_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.05)

    async def silent() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(Refusal) as refused:
        asyncio.run(bodies.read(sent(silent), 10))
    assert refused.value.status_code == 408


@pytest.mark.parametrize("said", [b"11", b"9" * 5000, b"3", b"-1", b"x"])
def test_a_body_is_no_larger_than_it_may_be_whatever_it_says(said: bytes) -> None:
    async def chunk() -> dict[str, Any]:
        return {"type": "http.request", "body": b"123456", "more_body": True}

    with pytest.raises(Refusal) as refused:
        asyncio.run(bodies.read(sent(chunk, (b"content-length", said)), 10))
    assert refused.value.status_code == 413
