"""The dispatcher's loop: reconcile, then ring. Several may run: one leads, the others watch.

The lead is a lease of three ticks, so a leader that died is replaced within that time. Two leaders
at once are harmless: what one does twice changes nothing.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from farm.config import Settings
from farm.dispatch import ring
from farm.errors import DatabaseUnavailable, EnvironmentFault
from farm.reconcile import end_stopped, reconcile, remove_abandoned
from farm.store import leases
from farm.store.db import Database

if TYPE_CHECKING:
    from farm.broker import Broker

log = logging.getLogger(__name__)
MAX_WAIT_S = 10.0
LEAD = "dispatcher"
TICKS = 3.0  # that a leader may be silent


def run_dispatcher(db: Database, broker: Broker, settings: Settings, stop: threading.Event) -> None:
    """Tick every `settings.tick_s` seconds until `stop`; outages are said once and waited out."""
    _Dispatcher(db, broker, settings, stop).run()


class _Dispatcher:
    def __init__(
        self, db: Database, broker: Broker, settings: Settings, stop: threading.Event
    ) -> None:
        self._db, self._broker, self._settings, self._stop = db, broker, settings, stop
        self._trouble: dict[str, str] = {}  # by duty: what it said last
        self._lenient_until = 0.0
        self._looked_at = time.time()
        self._name = f"{socket.gethostname()[:32]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._leads = False

    def run(self) -> None:
        wait = self._settings.tick_s
        self._try("clean up", lambda: remove_abandoned(self._db))
        while not self._stop.is_set():
            self._notice_sleep()
            healthy = self._try("lead", self._lead) and (not self._leads or self._tick())
            wait = self._settings.tick_s if healthy else min(wait * 2, MAX_WAIT_S)
            self._stop.wait(wait)
        if self._leads:
            self._try("hand over", self._hand_over)

    def _tick(self) -> bool:
        duties = {
            "reconcile": self._reconcile,
            "end what is not wanted": lambda: end_stopped(self._db),
            "ring": self._ring,
        }
        return all([self._try(duty, do) for duty, do in duties.items()])  # noqa: C419 - each one is tried

    def _lead(self) -> None:
        """Take the lead if nobody has it, or keep it."""
        led, self._leads = self._leads, False  # should the database be away, nobody knows
        with self._db.write() as connection:
            ttl_s = TICKS * self._settings.tick_s
            self._leads = leases.take(connection, LEAD, self._name, ttl_s)
        if led != self._leads:
            log.info("this dispatcher %s", "leads" if self._leads else "watches; another one leads")

    def _hand_over(self) -> None:
        with self._db.write() as connection:
            leases.give_up(connection, LEAD, self._name)

    def _reconcile(self) -> None:
        """After an outage of the database every worker gets time to beat once more."""
        lenient = time.monotonic() < self._lenient_until
        reconcile(self._db, self._settings, lenient=lenient)

    def _notice_sleep(self) -> None:
        """After a machine slept, its workers too could not beat."""
        before, self._looked_at = self._looked_at, time.time()
        if self._looked_at - before > self._settings.session_ttl_s:
            self._lenient_until = time.monotonic() + self._settings.session_ttl_s

    def _ring(self) -> None:
        ring(self._db, self._broker, None, self._settings.tokens_per_worker)

    def _try(self, duty: str, do: Callable[[], object]) -> bool:
        try:
            do()
        except EnvironmentFault as error:
            if isinstance(error, DatabaseUnavailable):
                self._lenient_until = time.monotonic() + self._settings.session_ttl_s
            if self._trouble.get(duty) != error.code:
                log.warning("%s; trying again until it is back", error.message)
            self._trouble[duty] = error.code
            return False
        except Exception:
            log.exception("%s failed; trying again", duty)
            return False
        if self._trouble.pop(duty, None):
            log.info("%s: all is back", duty)
        return True
