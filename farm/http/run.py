"""`farm serve`: uvicorn around the app, stopped without cutting anyone off."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from farm.errors import InvalidConfig
from farm.http.access import is_loopback
from farm.http.app import make_app
from farm.service import Farm
from farm.store import tokens

GRACE_S = 10
HEAD_S = 15.0  # for the head of a request


def is_open(farm: Farm, host: str) -> bool:
    """Whether no token is asked for: on loopback, while there is none.

    Raises InvalidConfig where others could reach a farm that has no token.
    """
    with farm.db.read() as connection:
        guarded = tokens.is_any(connection)
    if not guarded and not is_loopback(host):
        raise InvalidConfig(
            f"{host} can be reached from elsewhere, and there is no token yet; "
            "make one: farm token create NAME --scope submit --scope read"
        )
    return not guarded


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that gives a client HEAD_S seconds for the head of a request; uvicorn's waits for
    ever, so that a few thousand silent clients keep out everyone (slowloris)."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        else:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Server(uvicorn.Server):
    """Tells those who wait for a change that it stops, so that they end at once."""

    def __init__(self, farm: Farm, host: str, port: int) -> None:
        app = make_app(farm, open=is_open(farm, host))
        self.here = app.state.here
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            server_header=False,
            http=PatientProtocol,
            ws="none",
            limit_concurrency=_connections(),
            timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)

    def stop(self) -> None:
        """Finish what is being answered, then end `run`."""
        self.here.stopping = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal waits for nobody. (uvicorn's own would die of the signal in the end.)"""
        self.force_exit = self.should_exit
        self.stop()


def _connections() -> int:
    """How many clients at once leave descriptors for the database, the store and the disk."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if most == resource.RLIM_INFINITY else max(16, most - 256)


def bind(host: str, port: int) -> socket.socket:
    """A place to listen on, taken before anything is said. Raises InvalidConfig."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family, kind, protocol, _, address = found
        with contextlib.ExitStack() as unless_bound:
            # named TCP, or asyncio leaves Nagle's algorithm on, which costs 40 ms an answer
            place = unless_bound.enter_context(socket.socket(family, kind, protocol))
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        raise InvalidConfig(f"cannot listen on {host} port {port}: {error.strerror}") from None
    except UnicodeError:
        raise InvalidConfig(f"{host[:60]!r} can be no host's name") from None
    return place


def serve(farm: Farm, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises InvalidConfig; see `is_open` and `bind`."""
    server = Server(farm, host, port)
    with bind(host, port) as place:
        shown = f"[{host}]" if ":" in host else host
        asks = "only this machine, no token asked" if server.here.open else "tokens are asked for"
        say(f"serving http://{shown}:{place.getsockname()[1]}/v1 ({asks}); Ctrl-C stops it")
        server.run(sockets=[place])
