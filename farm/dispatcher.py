"""The dispatcher's loop: reconcile, then ring. Several may run; what one does twice is harmless."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from farm.config import Settings
from farm.dispatch import ring
from farm.errors import DatabaseUnavailable, EnvironmentFault
from farm.reconcile import reconcile, remove_abandoned
from farm.store.db import Database

if TYPE_CHECKING:
    from farm.broker import Broker

log = logging.getLogger(__name__)
MAX_WAIT_S = 10.0


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

    def run(self) -> None:
        wait = self._settings.tick_s
        self._try("clean up", lambda: remove_abandoned(self._db))
        while not self._stop.is_set():
            self._notice_sleep()
            healthy = [
                self._try("reconcile", self._reconcile),
                self._try("ring", self._ring),
            ]
            wait = self._settings.tick_s if all(healthy) else min(wait * 2, MAX_WAIT_S)
            self._stop.wait(wait)

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

    def _try(self, duty: str, do: Callable[[], None]) -> bool:
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
