"""A TCP proxy that breaks what passes through it: resets, lost answers, silence, slowness.

    with Proxy(server.socket_path) as proxy:    # or ("127.0.0.1", 5432)
        client = connect("127.0.0.1", proxy.port)
        proxy.reset()                           # every connection gets an RST
        proxy.cut(UP, 1500)                     # some connection, 1,500 bytes upwards from now
        with proxy.silent(): ...                # nothing passes, nothing is closed
        with proxy.slow(20_000): ...            # bytes a second on each connection

It runs in a thread of its own; methods may be called from any thread.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeVar

T = TypeVar("T")
Way = Literal["up", "down"]
UP: Way = "up"  # what clients send
DOWN: Way = "down"  # what the server answers
CHUNK = 16 * 1024
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s; closing sends an RST
ANSWER_S = 10.0
_BROKEN = (OSError, asyncio.IncompleteReadError)


@dataclass(eq=False)
class _Link:
    """One connection through the proxy, and the bytes of each way since a cut was ordered."""

    ends: list[asyncio.StreamWriter]
    passed: dict[Way, int] = field(default_factory=lambda: {UP: 0, DOWN: 0})

    def reset(self) -> None:
        for end in self.ends:
            sock: socket.socket = end.get_extra_info("socket")
            if sock.family == socket.AF_INET:
                with suppress(OSError):  # closed already
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            end.transport.abort()


class Proxy:
    """127.0.0.1:`port` -> `target`, the path of a unix socket or (host, port); may be down."""

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self._target = target
        self._links: set[_Link] = set()
        self._rate: float | None = None
        self._cut: tuple[Way, int] | None = None
        self._was_cut = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port = int(self._server.sockets[0].getsockname()[1])

    # ---- faults

    def reset(self) -> int:
        """Cut every connection with an RST; how many there were."""
        return self._call(self._reset_all)

    def cut(self, way: Way, after: int) -> threading.Event:
        """Reset the first connection that passes `after` more bytes one way; set when it has.

        The byte at which it is cut does not arrive, and what came before it does.
        """
        return self._call(lambda: self._order_cut(way, after))

    def mend(self) -> None:
        """Forget a cut that was ordered and has not come."""
        self._call(lambda: setattr(self, "_cut", None))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing passes and nothing is closed; what was sent meanwhile arrives afterwards."""
        self._call(self._open.clear)
        try:
            yield
        finally:
            self._call(self._open.set)

    @contextmanager
    def slow(self, bytes_s: float) -> Iterator[None]:
        """Each connection passes so many bytes a second each way."""
        self._call(lambda: setattr(self, "_rate", bytes_s))
        try:
            yield
        finally:
            self._call(lambda: setattr(self, "_rate", None))

    # ---- within the loop

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=CHUNK)

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        link = _Link([answers])
        self._links.add(link)
        try:
            server, requests = await self._connect()
            link.ends.append(requests)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link, UP, client, requests))
                both.create_task(self._pump(link, DOWN, server, answers))
        except* _BROKEN:
            pass
        finally:
            self._links.discard(link)
            link.reset()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await self._open.wait()
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(str(self._target), limit=CHUNK)
        return await asyncio.open_connection(*self._target, limit=CHUNK)

    async def _pump(
        self, link: _Link, way: Way, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        while data := await source.read(CHUNK):
            await self._open.wait()
            if self._rate:
                await asyncio.sleep(len(data) / self._rate)
            data, cut = self._share(link, way, data)
            sink.write(data)
            await sink.drain()
            if cut:
                link.reset()
                self._was_cut.set()
        await self._open.wait()
        sink.write_eof()

    def _share(self, link: _Link, way: Way, data: bytes) -> tuple[bytes, bool]:
        """What of `data` passes, and whether the connection is cut behind it."""
        before = link.passed[way]
        link.passed[way] += len(data)
        if self._cut and self._cut[0] == way and link.passed[way] > self._cut[1]:
            data, self._cut = data[: self._cut[1] - before], None
            return data, True
        return data, False

    def _reset_all(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    def _order_cut(self, way: Way, after: int) -> threading.Event:
        for link in self._links:
            link.passed[way] = 0
        self._cut, self._was_cut = (way, after), threading.Event()
        return self._was_cut

    # ---- life

    def _call(self, do: Callable[[], T]) -> T:
        async def within() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(within(), self._loop).result(ANSWER_S)

    def close(self) -> None:
        """Cut every connection and listen no more."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(ANSWER_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._open.set()
        self._reset_all()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
