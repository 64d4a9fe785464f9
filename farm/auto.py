"""A worker that chooses its lane: it watches what waits, and loads another model where that pays.

The rule is `farm.pinning`. The worker of the lane is a process of its own, which is ended (it
finishes what it renders) before another is started: the device holds one model at a time.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from farm.catalog import Lane
from farm.children import WorkerFlags, child_environment, spawn, worker_command
from farm.config import Settings
from farm.errors import EnvironmentFault
from farm.pinning import Demand, Rule, pick
from farm.store.db import Database
from farm.store.demand import demands

log = logging.getLogger(__name__)
LOOK_S = 2.0
SHUN_S = 60.0  # a lane whose worker failed is left alone, twice as long each time
MOST_SHUN_S = 3600.0
END_S = 15.0  # beyond the grace that the worker itself takes


class AutoWorker:
    """Serves one of `lanes` at a time. `run` returns after `stop` is set, or raises nothing."""

    def __init__(
        self,
        settings: Settings,
        lanes: Sequence[Lane],
        flags: WorkerFlags,
        *,
        say: Callable[[str], None] = log.info,
        rule: Rule | None = None,
    ) -> None:
        self._settings, self._lanes, self._flags = settings, list(lanes), flags
        self._say, self._rule = say, rule or Rule()
        self._env = child_environment(settings)
        self._process: subprocess.Popen[bytes] | None = None
        self._lane: Lane | None = None
        self._since = 0.0
        self._failures: dict[Lane, int] = {}
        self._shunned: dict[Lane, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Choose, serve, look again, until `stop`; an outage of the database changes nothing."""
        db = Database(self._settings.database)
        try:
            while not stop.is_set():
                self._look(db)
                stop.wait(LOOK_S)
        finally:
            self._end()
            db.close()

    def _look(self, db: Database) -> None:
        if self._process and self._process.poll() is not None:
            self._died(self._process.returncode)
        try:
            found = self._demands(db)
        except EnvironmentFault as error:
            log.warning("%s; the lane stays as it is", error.message)
            return
        chosen = pick(found, self._lane, time.monotonic() - self._since, self._rule)
        if chosen and chosen != self._lane:
            self._end()
            self._begin(chosen)

    def _demands(self, db: Database) -> list[Demand]:
        at = time.monotonic()
        lanes = [lane for lane in self._lanes if self._shunned.get(lane, 0.0) <= at]
        but = (socket.gethostname(), self._process.pid) if self._process else None
        with db.read() as connection:
            return demands(connection, lanes, but=but)

    def _begin(self, lane: Lane) -> None:
        self._say(f"serving {lane.model} on {lane.engine}")
        self._lane, self._since = lane, time.monotonic()
        self._process = spawn(worker_command(lane, self._flags), None, env=self._env)

    def _died(self, status: int) -> None:
        """The lane's worker could not go on: others first."""
        assert self._lane
        n = self._failures[self._lane] = self._failures.get(self._lane, 0) + 1
        shun = min(SHUN_S * 2.0 ** (n - 1), MOST_SHUN_S)
        self._shunned[self._lane] = time.monotonic() + shun
        self._say(
            f"the worker of {self._lane.model} on {self._lane.engine} ended with status {status}; "
            f"it is left alone for {shun:g} s"
        )
        self._process = self._lane = None

    def _end(self) -> None:
        """Let the present worker finish what it renders."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._settings.shutdown_grace_s + END_S)
        except subprocess.TimeoutExpired:
            log.warning("the worker of process %d does not end; it is killed", process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
