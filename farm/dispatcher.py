"""The dispatcher's loop: reconcile, then ring. Several may run; what one does twice is harmless."""

from __future__ import annotations

import logging
import threading

from farm.broker import Broker
from farm.config import Settings
from farm.dispatch import ring
from farm.errors import EnvironmentFault
from farm.reconcile import reconcile
from farm.store.db import Database

log = logging.getLogger(__name__)
MAX_WAIT_S = 10.0


def run_dispatcher(db: Database, broker: Broker, settings: Settings, stop: threading.Event) -> None:
    """Tick every `settings.tick_s` seconds until `stop`; outages are said once and waited out."""
    trouble: str | None = None
    wait = settings.tick_s
    while not stop.is_set():
        try:
            reconcile(db, settings)
            ring(db, broker, None, settings.tokens_per_worker)
        except EnvironmentFault as error:
            if error.code != trouble:
                log.warning("%s; trying again until it is back", error.message)
            trouble, wait = error.code, min(wait * 2, MAX_WAIT_S)
        else:
            if trouble:
                log.info("all is back")
            trouble, wait = None, settings.tick_s
        stop.wait(wait)
