"""The dispatcher's loop: reconcile, then ring. Several may run: one leads, the others watch.

The lead is a lease of three ticks, so a leader that died is replaced within that time. Two leaders
at once are harmless: what one does twice changes nothing.

What takes long stands beside the loop: every minute what is cheap, every hour the counters of the
batches that are at work, every day those of all and the objects that no job names. When it was
done last stands in SQL, so that neither a restart nor a second dispatcher does it sooner.

Schedules have a thread of their own too: what is due is begun, and what runs is seen to.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from farm.blobs import BlobStore
from farm.config import Settings
from farm.dispatch import ring
from farm.errors import DatabaseUnavailable, EnvironmentFault, FarmError, Invalid
from farm.reconcile import (
    end_stopped,
    mend_counters,
    reconcile,
    remove_abandoned,
    remove_objects,
)
from farm.retention import sweep
from farm.schedules.runner import Command, Runner, dataset_command
from farm.store import audit, leases
from farm.store.db import Database

if TYPE_CHECKING:
    from farm.broker import Broker

log = logging.getLogger(__name__)
MAX_WAIT_S = 10.0
TICKS = 3.0  # that a leader may be silent
UPKEEP_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0
JOIN_S = 5.0


def run_dispatcher(
    db: Database,
    broker: Broker,
    settings: Settings,
    stop: threading.Event,
    blobs: Callable[[], BlobStore] | None = None,
    command: Command = dataset_command,
) -> None:
    """Tick every `settings.tick_s` seconds until `stop`; outages are said once and waited out.

    Without `blobs` the farm is not kept up beside it: no counting, no objects, no schedules.
    `command`: what a run of a schedule starts.
    """
    dispatcher = _Dispatcher(db, broker, settings, stop)
    if blobs is None:
        dispatcher.run()
        return
    upkeep = _Upkeep(db, blobs, stop, lambda: dispatcher.leads)
    runner = Runner(db, settings, dispatcher.name, _Duties().attempt, command)

    def keep_schedules() -> None:
        while not stop.wait(settings.tick_s):
            runner.look(dispatcher.leads)
        runner.stop()

    beside = [
        threading.Thread(target=work, name=name, daemon=True)
        for name, work in (("schedules", keep_schedules), ("upkeep", upkeep.run))
    ]
    for thread in beside:
        thread.start()
    dispatcher.run()
    for thread in beside:
        thread.join(JOIN_S)  # what it is in the middle of, the next one does again


class _Duties:
    """Things to do again and again; each fault is said once, until it is over."""

    def __init__(self, on_fault: Callable[[FarmError], None] = lambda fault: None) -> None:
        self._trouble: dict[str, str] = {}  # by duty: what it said last
        self._on_fault = on_fault

    def attempt(self, duty: str, do: Callable[[], object]) -> bool:
        """Whether it was done."""
        try:
            do()
        except (EnvironmentFault, Invalid) as error:
            self._on_fault(error)
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


class _Dispatcher:
    def __init__(
        self, db: Database, broker: Broker, settings: Settings, stop: threading.Event
    ) -> None:
        self._db, self._broker, self._settings, self._stop = db, broker, settings, stop
        self._try = _Duties(self._note_fault).attempt
        self._lenient_until = 0.0
        self._looked_at = time.time()
        self.name = leases.holder_name()
        self.leads = False

    def run(self) -> None:
        wait = self._settings.tick_s
        self._try("clean up", lambda: remove_abandoned(self._db))
        while not self._stop.is_set():
            self._notice_sleep()
            healthy = self._try("lead", self._lead) and (not self.leads or self._tick())
            wait = self._settings.tick_s if healthy else min(wait * 2, MAX_WAIT_S)
            self._stop.wait(wait if healthy else wait * random.uniform(0.5, 1.0))
        if self.leads:
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
        led, self.leads = self.leads, False  # should the database be away, nobody knows
        with self._db.write() as connection:
            ttl_s = TICKS * self._settings.tick_s
            self.leads = leases.take(connection, leases.DISPATCHER, self.name, ttl_s)
        if led != self.leads:
            log.info("this dispatcher %s", "leads" if self.leads else "watches; another one leads")

    def _hand_over(self) -> None:
        with self._db.write() as connection:
            leases.give_up(connection, leases.DISPATCHER, self.name)

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

    def _note_fault(self, fault: FarmError) -> None:
        if isinstance(fault, DatabaseUnavailable):
            self._lenient_until = time.monotonic() + self._settings.session_ttl_s


class _Upkeep:
    """What takes long, beside the ticks of the dispatcher that leads."""

    def __init__(
        self,
        db: Database,
        blobs: Callable[[], BlobStore],
        stop: threading.Event,
        leads: Callable[[], bool],
    ) -> None:
        self._db, self._blobs, self._stop, self._leads = db, blobs, stop, leads
        self._try = _Duties().attempt

    def run(self) -> None:
        while not self._stop.wait(UPKEEP_S):
            if self._leads():
                self.look()

    def look(self) -> None:
        """What is due now."""
        self._try("clean up", lambda: remove_abandoned(self._db))
        self._try("delete pruned objects", lambda: sweep(self._db, self._blobs()))
        self._each("count what is at work", HOUR_S, self._count_busy)
        self._each("count all", DAY_S, lambda: mend_counters(self._db, self._all()))
        self._each("look for objects", DAY_S, lambda: remove_objects(self._db, self._blobs()))

    def _count_busy(self) -> None:
        with self._db.read() as connection:
            chosen = audit.busy_batches(connection, 2 * HOUR_S)
        mend_counters(self._db, chosen)

    def _all(self) -> Iterator[str]:
        return takewhile(lambda _: not self._stop.is_set(), audit.every_batch(self._db))

    def _each(self, duty: str, every_s: float, do: Callable[[], None]) -> None:
        """Do it, unless somebody has done it less than `every_s` seconds ago."""
        self._try(duty, lambda: self._if_due(duty, every_s, do))

    def _if_due(self, duty: str, every_s: float, do: Callable[[], None]) -> None:
        mine = secrets.token_hex(8)
        with self._db.write() as connection:
            if not leases.take(connection, duty, mine, every_s):
                return
        done = False
        try:
            do()
            done = not self._stop.is_set()  # else perhaps not to its end
        finally:
            if not done:
                with self._db.write() as connection:
                    leases.give_up(connection, duty, mine)
