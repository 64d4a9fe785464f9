"""How much one client may ask: requests a second, and long ones at once. All in memory.

A client is a token; without one, an address.
"""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import Request

from farm.http.problems import Refusal

CODE = "ERR_RATE_LIMIT"
BURST_S = 5.0  # the requests of so many seconds may come at once
MOST_CLIENTS = 10_000  # that are remembered; the one that has been silent longest goes
UPLOADS = 8  # bodies of one client at once; each may lie on the disk meanwhile


class Pace:
    """A token bucket for each client: `rate` requests a second, 0 for any number."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._most = max(1.0, rate * BURST_S)
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # and as of when

    def take(self, client: str) -> None:
        """Count one request. Raises Refusal (429) when it comes too soon."""
        if not self._rate:
            return
        with self._lock:
            now = self._clock()
            left, then = self._left.pop(client, (self._most, now))
            left = min(self._most, left + (now - then) * self._rate)
            self._left[client] = (left - 1 if left >= 1 else left, now)
            if len(self._left) > MOST_CLIENTS:
                self._left.popitem(last=False)
        if left < 1:
            raise too_many(f"more than {self._rate:g} requests a second", (1 - left) / self._rate)


class Slots:
    """How many long requests each client has at once. For one thread, that of the event loop."""

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._held: Counter[str] = Counter()

    def check(self, client: str) -> None:
        """Raises Refusal (429) when the client has no slot left."""
        if self._held[client] >= self._most:
            raise too_many(f"more than {self._most} {self._what} at once", 5)

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """One of the client's slots."""
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]


def too_many(what: str, wait_s: float) -> Refusal:
    """What a client is told that asks too much."""
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return Refusal(429, CODE, f"{what} of one client; try again later", headers)


def address_of(request: Request) -> str:
    """Where a request comes from; of IPv6 the /64, which is what one client is given."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 6:
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return host
