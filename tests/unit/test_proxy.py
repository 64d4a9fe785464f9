"""The proxy of the chaos suite does what the suite says it did."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from tests.proxy import DOWN, UP, Proxy


class Echo(NamedTuple):
    proxy: Proxy
    heard: list[bytes]  # what reached the server

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.proxy.port), timeout=5)


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server that answers with what it hears, behind a proxy."""
    heard: list[bytes] = []

    def serve(link: socket.socket) -> None:
        with link, suppress(OSError):
            while data := link.recv(65536):
                heard.append(data)
                link.sendall(data)

    def listen() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, daemon=True).start()
        with Proxy(("127.0.0.1", server.getsockname()[1])) as proxy:
            yield Echo(proxy, heard)
        server.shutdown(socket.SHUT_RDWR)


def test_it_passes_everything_and_the_end(echo: Echo) -> None:
    with echo.connect() as link:
        link.sendall(b"x" * 100_000)
        link.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: link.recv(65536), b""))
    assert answer == b"x" * 100_000


def test_a_reset_reaches_every_connection(echo: Echo) -> None:
    with echo.connect() as one, echo.connect() as two:
        for link in (one, two):
            link.sendall(b"there?")
            assert link.recv(6) == b"there?"
        assert echo.proxy.reset() == 2
        for link in (one, two):
            with pytest.raises(ConnectionResetError):
                link.recv(1)


def test_a_cut_lets_so_many_bytes_through_and_strikes_once(echo: Echo) -> None:
    with echo.connect() as link:
        cut = echo.proxy.cut(UP, 10)
        link.sendall(b"0123456789abcdef")
        assert cut.wait(5)
        with pytest.raises(ConnectionResetError):
            list(iter(lambda: link.recv(100), b""))
    with echo.connect() as again:
        again.sendall(b"again and again")
        assert again.recv(15) == b"again and again"
    # a reset may overtake what was sent before it, and what came first be heard last
    first, second = b"0123456789", b"again and again"
    assert b"".join(echo.heard) in (second, first + second, second + first)


def test_an_answer_is_lost_though_the_server_did_its_work(echo: Echo) -> None:
    with echo.connect() as link:
        cut = echo.proxy.cut(DOWN, 0)
        link.sendall(b"commit")
        assert cut.wait(5)
        with pytest.raises(ConnectionResetError):
            link.recv(1)
    assert echo.heard == [b"commit"]


def test_silence_holds_everything_and_loses_nothing(echo: Echo) -> None:
    with echo.connect() as link:
        link.sendall(b"a")
        assert link.recv(1) == b"a"
        link.settimeout(0.2)
        with echo.proxy.silent():
            link.sendall(b"b")
            with pytest.raises(TimeoutError):
                link.recv(1)
        link.settimeout(5)
        assert link.recv(1) == b"b"


def test_a_slow_line_takes_its_time(echo: Echo) -> None:
    with echo.connect() as link, echo.proxy.slow(10_000):
        began = time.monotonic()
        link.sendall(b"x" * 1000)
        left = 1000
        while left:
            left -= len(link.recv(left))
        assert time.monotonic() - began >= 0.2  # 0.1 s each way


def test_a_server_that_is_down_resets_its_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()[:2]
    with (
        Proxy(where) as proxy,
        pytest.raises(ConnectionResetError),  # it may come before the client has connected
        socket.create_connection(("127.0.0.1", proxy.port), 5) as link,
    ):
        link.recv(1)
