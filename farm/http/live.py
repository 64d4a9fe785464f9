"""Waiting for a change without a thread or a connection held: looks that all who wait share."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from farm.errors import FarmError

EVERY_S = 0.25
PING_S = 15.0
_VOLATILE = ("rate", "eta_s")  # move with the clock alone
K = TypeVar("K")


class State(Protocol):
    """A batch or a job as it stands."""

    def as_dict(self) -> dict[str, Any]: ...


S = TypeVar("S", bound=State)


def tag(state: State) -> str:
    """The ETag of a state: another one when anything but its rate has changed (RFC 9110, weak)."""
    told = {k: v for k, v in state.as_dict().items() if k not in _VOLATILE}
    text = json.dumps(told, sort_keys=True, default=str)
    return f'W/"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def matches(given: str | None, etag: str) -> bool:
    """Whether an If-None-Match header names the tag; compared weakly, as RFC 9110 wants."""
    if not given:
        return False
    known = {part.strip().removeprefix("W/") for part in given.split(",")}
    return etag.removeprefix("W/") in known or "*" in known


class Looks(Generic[K, S]):
    """Looks at things by name. Those who wait for one thing share one look each EVERY_S seconds."""

    def __init__(self, look: Callable[[K], S]) -> None:
        self._look = look
        self._next: dict[K, asyncio.Task[S]] = {}

    async def now(self, name: K) -> S:
        """The state at this moment; raises what the look raises."""
        return await run_in_threadpool(self._look, name)

    async def soon(self, name: K) -> S:
        """The state at the next shared look."""
        if name not in self._next:
            self._next[name] = asyncio.create_task(self._after_a_while(name))
            self._next[name].add_done_callback(lambda task: self._forget(name, task))
        return await asyncio.shield(self._next[name])

    async def _after_a_while(self, name: K) -> S:
        await asyncio.sleep(EVERY_S)
        return await self.now(name)

    def _forget(self, name: K, task: asyncio.Task[S]) -> None:
        del self._next[name]
        if not task.cancelled():
            task.exception()  # whoever waited has gone


async def poll(
    request: Request,
    now: S,
    soon: Callable[[], Awaitable[S]],
    ready: Callable[[S], bool],
    wait_s: float,
    stopping: Callable[[], bool],
) -> S:
    """The first state that is `ready`, or the last one seen within `wait_s` seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    while not ready(now) and loop.time() < until and not stopping():
        if await request.is_disconnected():
            break
        now = await soon()
    return now


async def events(
    now: S,
    soon: Callable[[], Awaitable[S]],
    show: Callable[[S], str],
    last: str | None,
    stopping: Callable[[], bool],
) -> AsyncIterator[bytes]:
    """Server-sent events: `status` at each change, then `done`; comments keep the line open.

    `last`: the tag that the client saw last, which is not told again.
    """
    quiet_s = 0.0
    try:
        while not stopping():
            etag = tag(now)
            if etag != last:
                yield format_sse_event(event="status", id=etag, data_str=show(now), retry=2000)
                last, quiet_s = etag, 0.0
            if getattr(now, "done", False):
                yield format_sse_event(event="done", id=etag, data_str=show(now))
                return
            if quiet_s >= PING_S:
                yield format_sse_event(comment="still here")
                quiet_s = 0.0
            now = await soon()
            quiet_s += EVERY_S
    except FarmError as error:
        told = json.dumps({"code": error.code})
        yield format_sse_event(event="problem", data_str=told)
