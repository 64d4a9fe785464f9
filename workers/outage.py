"""What the keeper knows of a blob store that is away, and what its threads have in their hands."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field
from typing import Any

from farm.store.jobs import Claim, Picture
from workers.spool import Entry

log = logging.getLogger(__name__)
PAUSE_S, MAX_PAUSE_S = 0.2, 5.0  # between two tries of a store that is away
STUCK_S = 5.0  # a put that takes longer hangs


@dataclass(eq=False)
class Finished:
    """A picture on its way: in memory as pixels, or as a file in the spool."""

    claim: Claim
    pixels: Any = None
    render_s: float = 0.0
    entry: Entry | None = None
    room: int = 0  # bytes that it is counted with while it is in memory


@dataclass
class Hand:
    """What one thread has in its hands."""

    group: list[Finished] = field(default_factory=list)
    stored: list[tuple[Claim, Picture]] = field(default_factory=list)
    putting_since: float | None = None  # monotonic
    looks: bool = False  # whether the store is back

    @property
    def is_stuck(self) -> bool:
        began = self.putting_since
        return began is not None and time.monotonic() - began > STUCK_S


@dataclass
class Outage:
    """`store`: why it takes nothing, `spool`: why that holds no more; empty: it does.

    `refused`: the store takes nothing from this worker, though perhaps from others.
    """

    store: str = ""
    refused: bool = False
    spool: str = ""
    _pause: float = PAUSE_S
    _next_try: float = 0.0  # monotonic

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.store, self.spool))) if self.store else ""

    def notice(self, why: str, *, refused: bool = False) -> None:
        """The store is away: it is tried again after a pause that doubles."""
        if not self.store:
            log.warning("%s; holding pictures until it is back", why)
            self._pause, self._next_try = PAUSE_S, 0.0
        self.store, self.refused = why, refused
        if (now := time.monotonic()) >= self._next_try:
            self._next_try = now + self._pause * random.uniform(0.5, 1.5)
            self._pause = min(self._pause * 2, MAX_PAUSE_S)

    def notice_spool(self, why: str) -> None:
        """The spool holds no more."""
        if not self.spool:
            log.warning("%s; the engine waits", why)
        self.spool = why

    def end(self, held: int) -> None:
        """The store has taken a picture, while others were held."""
        log.info("the blob store is back; %d pictures were held", held)
        self.store, self.spool, self.refused = "", "", False

    def wait_s(self) -> float:
        """Seconds until the next try."""
        return self._next_try - time.monotonic()
