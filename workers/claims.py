"""The claims of this worker: makes them, knows them, and gives back what slipped between.

The answer to a claim's commit may be lost on the way: then the database holds jobs for this
session that the worker knows nothing of, and a session that lives would keep them for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from farm import dispatch, logs
from farm.catalog import Lane
from farm.errors import EnvironmentFault
from farm.store import jobs
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from farm.verdict import give_back

log = logging.getLogger(__name__)
SWEEP_S = 30.0
MOST_OPEN = 12_000  # claims whose end is not recorded, those of spooled pictures among them


class Claims:
    """`session` tells the present session's id. `next` is called by one thread at a time."""

    def __init__(self, db: Database, lane: Lane, session: Callable[[], str]) -> None:
        self._db, self._lane, self._session = db, lane, session
        self._claiming = threading.Lock()  # a claim and what is known of it change together
        self._lock = threading.Lock()
        self._known: set[tuple[JobRef, int]] = set()
        self._sweep_at = time.monotonic() + SWEEP_S

    def next(self, size: int) -> list[Claim]:
        """The next bundle of at most `size` jobs; empty when there is none or SQL is away.

        And when it takes claims, but no records of their ends: these are not to fill the memory.
        """
        if self.count() + size > MOST_OPEN:
            log.warning("%d jobs have not ended yet; no more are claimed", self.count())
            return []
        with self._claiming:
            try:
                bundle = dispatch.claim_bundle(self._db, self._session(), self._lane, size)
            except Exception as error:
                self._sweep_at = 0.0  # its commit may have come through
                if isinstance(error, EnvironmentFault):
                    log.warning("no claim: %s", error.message)
                else:
                    log.exception("no claim")
                return []
            with self._lock:
                self._known.update((claim.ref, claim.claim_no) for claim in bundle)
            return bundle

    def tend(self) -> None:
        """Give back strays, from time to time and soon after a claim that failed.

        To be called with each heartbeat: a lane that has nothing left to claim rings no more.
        Raises DatabaseUnavailable.
        """
        if time.monotonic() >= self._sweep_at and self._claiming.acquire(blocking=False):
            try:
                self._sweep(self._session())
            finally:
                self._claiming.release()

    def forget(self, claims: Iterable[Claim]) -> None:
        """The end of these is recorded. Safe from any thread."""
        with self._lock:
            self._known.difference_update((claim.ref, claim.claim_no) for claim in claims)

    def count(self) -> int:
        """How many of them have not ended."""
        return len(self._known)

    def _sweep(self, session_id: str) -> None:
        with self._db.write() as connection:
            held = [claim for claim, _ in jobs.held_by(connection, session_id)]
            with self._lock:
                strays = [c for c in held if (c.ref, c.claim_no) not in self._known]
            jobs.lock(connection, strays)
            for claim in strays:
                log.warning("a job is held but unknown here; it goes back", extra=logs.about(claim))
                give_back(connection, claim, "its claim was never answered")
        self._sweep_at = time.monotonic() + SWEEP_S
