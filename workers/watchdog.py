"""Work goes on where no token comes: Redis is away, or Celery's consumer has fallen silent.

After a broken connection a consumer may sit on one that nothing comes from, for ever and without a
word (https://github.com/celery/celery/issues/8091, .../10205). So an idle worker looks for work
itself; and when tokens lie on the lane's queue that its consumer does not take, the consumer is
restarted, and if that does not help the process: it becomes a new one in its place (exec), for a
worker that a person started has nobody who would start it again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from farm.broker import Broker
from farm.catalog import Lane
from farm.errors import BrokerUnavailable, DatabaseUnavailable
from farm.store import figures
from farm.store.db import Database

log = logging.getLogger(__name__)
LOOK_S = 5.0  # between two looks of an idle worker
DEAF_S = 20.0  # tokens that an idle worker leaves lying for so long are not heard
MOST_RESTARTS = 2  # of the consumer, then of the process


class Watchdog:
    """`work` renders what the lane has; `consumer` is Celery's, None before it is there.

    `again` replaces the process and does not return.
    """

    def __init__(
        self,
        lane: Lane,
        db: Database,
        broker: Broker,
        *,
        work: Callable[[], None],
        consumer: Callable[[], Any],
        again: Callable[[], None],
    ) -> None:
        self._lane, self._db, self._broker = lane, db, broker
        self._work, self._consumer, self._again = work, consumer, again
        self._working = threading.Lock()
        self._stop = threading.Event()
        self._idle_since = time.monotonic()
        self._deaf_since: float | None = None
        self._restarts = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Begin no more work; returns at once."""
        self._stop.set()

    def join(self) -> None:
        """Return when no work is under way, and none begins."""
        self.stop()
        self._working.acquire()

    def token(self) -> None:
        """The consumer has heard a token: work."""
        self._deaf_since, self._restarts = None, 0
        with self._working:
            self._do_work()

    def _do_work(self) -> None:
        try:
            self._work()
        finally:
            self._idle_since = time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S * random.uniform(0.8, 1.2)):
            try:
                self._look()
            except Exception:
                log.exception("the watchdog stumbled")

    def _look(self) -> None:
        if time.monotonic() - self._idle_since < LOOK_S:
            return
        if not self._working.acquire(blocking=False):
            self._deaf_since = None
            return
        try:
            if not self._stop.is_set() and self._has_work():
                log.debug("%s may have work and no token came for it", self._lane.queue)
                self._do_work()
        finally:
            self._working.release()
        if not self._stop.is_set():
            self._listen()

    def _has_work(self) -> bool:
        try:
            with self._db.read() as connection:
                waiting = figures.waiting(connection)
        except DatabaseUnavailable:
            return False
        mine = ("", self._lane.engine)
        return any(w.model == self._lane.model and w.engine in mine for w in waiting)

    def _listen(self) -> None:
        """Whether the consumer takes what lies on the queue."""
        try:
            tokens = self._broker.length(self._lane)
        except BrokerUnavailable:
            tokens = 0
        now = time.monotonic()
        if not tokens:
            self._deaf_since = None
        elif self._deaf_since is None:
            self._deaf_since = now
        elif now - self._deaf_since > DEAF_S:
            self._deaf_since = None
            self._mend(tokens)

    def _mend(self, tokens: int) -> None:
        self._restarts += 1
        consumer = self._consumer()
        if self._restarts <= MOST_RESTARTS and consumer is not None and consumer.hub is not None:
            log.warning("%d tokens and nobody hears them: the consumer is restarted", tokens)
            consumer.hub.call_soon(_break_connection)
        else:
            log.error("%d tokens and nobody hears them: the worker starts anew", tokens)
            with self._working:
                if self._restarts and not self._stop.is_set():  # no token was heard meanwhile
                    self._again()


def _break_connection() -> None:
    """In the consumer's own thread: what it takes for a lost connection makes it connect anew."""
    raise ConnectionResetError("it has fallen silent")
