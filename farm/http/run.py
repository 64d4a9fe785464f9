"""`farm serve`: uvicorn around the app, stopped without cutting anyone off."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from farm.errors import InvalidConfig
from farm.http.access import is_loopback
from farm.http.app import make_app
from farm.service import Farm
from farm.store import tokens

GRACE_S = 10


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
    return place


def serve(farm: Farm, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises InvalidConfig; see `is_open` and `bind`."""
    server = Server(farm, host, port)
    with bind(host, port) as place:
        shown = f"[{host}]" if ":" in host else host
        asks = "only this machine, no token asked" if server.here.open else "tokens are asked for"
        say(f"serving http://{shown}:{place.getsockname()[1]}/v1 ({asks}); Ctrl-C stops it")
        server.run(sockets=[place])
