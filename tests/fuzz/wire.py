"""Bytes that are hardly HTTP, to the served API: 4xx, or it hangs up or waits, and serves on."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from urllib.parse import quote_from_bytes

from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.http_kit import serving

GOOD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
STARTS = (
    b"GET /healthz HTTP/1.1", b"GET /healthz HTTP/1.0", b"GET /healthz HTTP/9.9", b"GET /healthz",
    b"PRI * HTTP/2.0", b"GET  /healthz  HTTP/1.1", b"get /healthz HTTP/1.1",
    b"GET http://evil.example/healthz HTTP/1.1", b"CONNECT evil.example:443 HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"POST /v1/batches HTTP/1.1", b"\x16\x03\x01\x02\x00",
    b"GET /%ff%00/../.. HTTP/1.1", b"GET /" + b"a" * 70_000 + b" HTTP/1.1",
    b"GET /\xff\xfe HTTP/1.1", b"",
)  # fmt: skip
LINES = (
    b"Host: localhost", b"Host: localhost", b"Host: a\r\nHost: b", b"Content-Length: 5",
    b"Content-Length: -5", b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 99999999999999999999999", b"Content-Length: 0x5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: xchunked", b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Expect: 100-continue", b"Upgrade: h2c", b"Connection: Upgrade\r\nUpgrade: websocket",
    b"Content-Type: application/json", b"X: " + b"y" * 70_000, b" folded: line", b"no colon",
    b": no name", b"Bad Name: x", b"X: a\x00b", b"X: \xff", b"Accept: */*" * 900,
)  # fmt: skip
BODIES = (
    b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n",
    b"5;x=\r\nhel", b"0\r\nX: y\r\n\r\n", b'{"prompts": ["a"]}', b"\x00" * 5_000,
    b"GET /healthz HTTP/1.1\r\n\r\n" * 50,
)  # fmt: skip


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    with serving(data, "redis+socket:///nowhere?virtual_host=0", http_rate=0) as kit:
        port = int(kit.url.rpartition(":")[2])

        def judge(case: Case) -> str:
            sent = drawn(case.rng)
            case.told = repr(sent[:3_000])
            answer = ask(port, sent, 0.1)
            status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
            if answer and not status:
                raise Finding(f"{answer[:300]!r} is no answer")
            if status and status[1][:1] == b"5" and status[1] not in (b"501", b"505"):
                raise Finding(f"{answer[:600]!r}")
            if not ask(port, GOOD, 4).startswith(b"HTTP/1.1 200 "):
                raise Finding("it does not serve any more")
            return status[1].decode() if status else "no answer yet"

        yield judge


def drawn(rng: Random) -> bytes:
    """A request line, lines and a body, seldom as they should be."""
    if rng.randrange(12) == 0:
        return rng.randbytes(rng.randrange(3_000))
    lines = [rng.choice(STARTS), *(rng.choice(LINES) for _ in range(rng.randrange(5)))]
    end = rng.choice((b"\r\n", b"\r\n", b"\n", b"\r"))
    made = end.join([*lines, b"", rng.choice(BODIES)])
    kind = rng.randrange(8)
    if kind == 0:
        made = quote_from_bytes(made).encode()
    return words.broken(rng, made) if kind in (1, 2) else made


def ask(port: int, sent: bytes, patience_s: float) -> bytes:
    """What comes back on a connection of its own, until nothing does for `patience_s` seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=4) as link:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(sent)
        link.settimeout(patience_s)
        got = b""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while len(got) < 1_000_000 and (block := link.recv(65_536)):
                got += block
        return got
