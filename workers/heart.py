"""The worker's session: its heartbeat, and the wishes for what it holds."""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

from farm import logs
from farm.catalog import Lane
from farm.errors import DatabaseUnavailable
from farm.store import sessions
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.sessions import Beat

log = logging.getLogger(__name__)
JOIN_S = 5.0
LOOK_S = 1.0  # how often a busy worker looks for cancelled jobs


class Heart:
    """Beats every quarter of the session's time to live from a thread of its own."""

    def __init__(
        self,
        db: Database,
        lane: Lane,
        ttl_s: float,
        *,
        device: str,
        memory: int | None,
        info: Callable[[], dict[str, Any]],
        told: Callable[[], Beat],
        on_cancel: Callable[[set[JobRef]], None],
        on_lost: Callable[[], None],
        tend: Callable[[], None] = lambda: None,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self._db, self._lane, self._ttl = db, lane, ttl_s
        self._device, self._memory, self._info = device, memory, info
        self._known_info: dict[str, Any] = {}
        self._told, self._on_cancel, self._on_lost = told, on_cancel, on_lost
        self._tend, self._watch = tend, watch
        self._rests = False  # as the last beat told
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._trouble = ""
        self.session_id = ""

    def start(self) -> None:
        """Open the session, waiting for the database as long as it takes, and beat from now on."""
        wait = 0.5
        while True:
            try:
                self._open()
                break
            except DatabaseUnavailable as error:
                log.warning("%s; trying again", error.message)
                wait = min(wait * 2, 10.0)
                if self._stop.wait(wait * random.uniform(0.5, 1.5)):
                    return
        self._thread.start()

    def _open(self) -> None:
        info = self._info()
        with self._db.write() as connection:
            self.session_id = sessions.open_session(
                connection,
                self._lane,
                self._ttl,
                host=socket.gethostname(),
                pid=os.getpid(),
                device=self._device,
                memory=self._memory,
                info=info,
            )
        self._known_info = info
        logs.always(worker=self.session_id)
        log.info("session %s serves %s", self.session_id, self._lane.queue)

    def _run(self) -> None:
        every = min(self._ttl / 4, LOOK_S)
        beat_every, since = max(1, round(self._ttl / 4 / every)), 0
        while not self._stop.wait(every):
            since += 1
            try:
                self._watch()
                told = self._told()
                rests = told.state == "resting"
                if since >= beat_every or rests != self._rests:  # others may take its work
                    self._beat(told)
                    self._rests = rests
                    self._tend()
                    since = 0  # only now: a beat that failed is tried again at once
                if told.state != "idle":
                    self._look()
                self._trouble = ""
            except DatabaseUnavailable as error:
                if not self._trouble:
                    log.warning("no heartbeat: %s", error.message)
                self._trouble = error.code
            except Exception:
                log.exception("the heartbeat stumbled")

    def _beat(self, told: Beat) -> None:
        info = self._info()
        news = info if info != self._known_info else None
        with self._db.write() as connection:
            alive = sessions.beat(connection, self.session_id, self._ttl, told, news)
        self._known_info = info
        if not alive:
            log.warning("session %s was lost; what it held is given to others", self.session_id)
            self._on_lost()
            self._open()

    def _look(self) -> None:
        with self._db.read() as connection:
            wanted = sessions.cancels(connection, self.session_id)
        self._on_cancel(wanted)

    def stop(self) -> None:
        """Stop beating, tell what is new and end the session."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        if self.session_id:
            try:
                with self._db.write() as connection:
                    sessions.beat(
                        connection, self.session_id, self._ttl, self._told(), self._info()
                    )
                    sessions.close(connection, self.session_id)
            except DatabaseUnavailable as error:
                log.warning("the session ends by its expiry: %s", error.message)
