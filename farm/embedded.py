"""A whole farm on one machine: broker, dispatcher and workers as supervised children.

    with EmbeddedFarm(load_settings(home="farm-data"), [Lane("shapes", "diffusers")]):
        ...                                  # jobs are rendered

One thread does all the starting, watching and stopping. What dies is started again, after a wait
that doubles; a worker that dies five times, each time within a minute, is given up. On Linux the
children die with this process even if it is killed; elsewhere the next start ends the old broker.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from farm import local_broker
from farm.catalog import Lane
from farm.children import Child, WorkerFlags, child_environment, worker_command
from farm.config import Settings
from farm.engines import check_engine
from farm.errors import EnvironmentFault, FarmError, ModelNotLoaded
from farm.service import Farm

log = logging.getLogger(__name__)
POLL_S = 0.1
START_S = 30.0
STOP_S = 10.0
MAX_DEATHS = 5
RESTART_S = 5.0
SHORT_LIFE_S = 60.0


@dataclass
class _Group:
    """The children in the order in which they start; they stop in the reverse one."""

    broker: Child | None = None
    dispatcher: Child | None = None
    workers: list[Child] = field(default_factory=list)

    def all(self) -> list[Child]:
        return [c for c in (self.broker, self.dispatcher, *self.workers) if c is not None]


class EmbeddedFarm:
    """Starts and supervises a farm's processes; a context manager.

    `workers`: one process for each lane named, all with the same `flags`. `say` gets a line for
    each thing that happens.
    """

    def __init__(
        self,
        settings: Settings,
        workers: Sequence[Lane] = (),
        *,
        flags: WorkerFlags | None = None,
        say: Callable[[str], None] = log.info,
    ) -> None:
        self.settings = settings
        self.home = settings.home.resolve()
        self.failure: FarmError | None = None
        self._lanes, self._flags = list(workers), flags or WorkerFlags()
        self._say = say
        self._group = _Group()
        self._env: dict[str, str] = {}
        self._halt, self._kill = threading.Event(), threading.Event()
        self._ready, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: IO[str] | None = None
        self._farm: Farm | None = None

    # ---- from outside

    def start(self) -> bool:
        """Bring all up, and wait until each worker has its model loaded; False: halted before.

        Raises FarmError when something cannot start, or another farm runs in this home; then
        everything is stopped again.
        """
        self._lock = lock_home(self.home)
        self._thread = threading.Thread(target=self._run, name="farm-up", daemon=True)
        self._thread.start()
        try:
            while not self._ready.wait(POLL_S) and not self._over.is_set():
                pass
        finally:
            if not self._ready.is_set():
                self.stop()
        if self.failure is not None:
            raise self.failure
        return self._ready.is_set()

    def run(self) -> None:
        """Wait until `halt` was called and all has stopped, or nothing is left to supervise."""
        while not self._over.wait(0.2):
            pass

    def halt(self) -> None:
        """Begin to stop; returns at once."""
        self._halt.set()

    def kill(self) -> None:
        """Stop without waiting for pictures; returns at once."""
        self._kill.set()
        self._halt.set()

    def stop(self) -> None:
        """Drain the workers, stop all; returns when nothing runs any more."""
        self.halt()
        if self._thread is not None:
            self._thread.join()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def pids(self) -> dict[str, int]:
        """Process ids of what runs now, by name."""
        return {c.name: c.process.pid for c in self._group.all() if c.process and c.alive}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # ---- the supervising thread

    def _run(self) -> None:
        try:
            self._bring_up()
            if not self._halt.is_set():
                self._ready.set()
                self._supervise()
        except FarmError as error:
            self.failure = error
        except Exception as error:
            self.failure = FarmError(f"supervising failed: {type(error).__name__}: {error}")
        finally:
            try:
                self._bring_down()
            finally:
                self._over.set()

    def _bring_up(self) -> None:
        (self.home / "logs").mkdir(exist_ok=True)
        self._farm = Farm(self.settings)
        self._farm.check_schema()
        self._env = child_environment(self.settings)
        if not self.settings.broker_url:
            self._start_broker()
        dispatcher = [sys.executable, "-m", "farm", "dispatcher"]
        self._group.dispatcher = self._child("dispatcher", dispatcher)
        self._group.dispatcher.start(self._env)
        before = {worker.id for worker in self._farm.workers()}
        for place, lane in enumerate(self._lanes, start=1):
            check_engine(lane.engine)
            name = f"worker-{place}-{lane.model}-{lane.engine}"
            worker = self._child(name, worker_command(lane, self._flags), lane)
            worker.start(self._env)
            self._group.workers.append(worker)
        self._await_workers(before)

    def _child(self, name: str, argv: Sequence[str | Path], lane: Lane | None = None) -> Child:
        return Child(name, argv, self.home / "logs" / f"{name}.log", lane)

    def _start_broker(self) -> None:
        path, data = self.settings.broker_socket, self.home / "broker"
        argv = local_broker.command_line(path, data)
        data.mkdir(mode=0o700, exist_ok=True)
        local_broker.own_directory(path.parent)
        local_broker.end_stale(path)
        self._group.broker = broker = self._child("broker", argv)
        broker.start(self._env)
        until = time.monotonic() + START_S
        while not local_broker.answers(path):
            if not broker.alive or time.monotonic() > until:
                why = broker.obituary() if not broker.alive else "the broker does not answer"
                raise EnvironmentFault(f"{why}; see {broker.log}:\n{broker.last_words()}")
            if self._halt.wait(0.02):
                return

    def _await_workers(self, before: set[str]) -> None:
        """Until each worker has a live session of its own: its model is loaded then."""
        assert self._farm
        until = time.monotonic() + self.settings.load_timeout_s
        waiting = list(self._group.workers)
        for worker in waiting:
            self._say(f"{worker.name}: loading the model")
        while waiting and not self._halt.wait(POLL_S):
            live = {w.pid for w in self._farm.workers() if w.id not in before}
            for worker in [w for w in waiting if w.process and w.process.pid in live]:
                self._say(f"{worker.name}: ready")
                waiting.remove(worker)
            dead = next((w for w in waiting if not w.alive), None)
            if dead or (waiting and time.monotonic() > until):
                raise _not_loaded(dead or waiting[0])

    def _supervise(self) -> None:
        while not self._halt.wait(POLL_S):
            for child in self._group.all():
                if not child.alive and not child.given_up:
                    self._tend(child)
            workers = self._group.workers
            if workers and all(worker.given_up for worker in workers):
                raise ModelNotLoaded(f"no worker is left; see the logs in {self.home / 'logs'}")

    def _tend(self, child: Child) -> None:
        """A child is dead: note it once, start it again when its wait is over."""
        now = time.monotonic()
        if child.process is not None:
            child.deaths = child.deaths + 1 if now - child.born < SHORT_LIFE_S else 1
            if child.lane is not None and child.deaths >= MAX_DEATHS:
                child.given_up = True
                self._say(f"{child.obituary()}, for the {child.deaths}th time; given up")
                self._say(child.last_words())
                return
            delay = min(0.5 * 2.0 ** (child.deaths - 1), 30.0)
            self._say(f"{child.obituary()}; starting it again in {delay:g} s (log: {child.log})")
            child.process, child.next_start = None, now + delay
        elif now >= child.next_start:
            try:
                if child is self._group.broker:
                    local_broker.end_stale(self.settings.broker_socket)
                child.start(self._env)
            except (OSError, EnvironmentFault) as error:
                child.next_start = now + RESTART_S
                self._say(f"{child.name} does not start: {error}; trying again")

    def _bring_down(self) -> None:
        """Workers first, so that they can give back what they hold; the broker last."""
        group = self._group
        self._end(group.workers, self.settings.shutdown_grace_s + STOP_S)
        self._end([group.dispatcher] if group.dispatcher else [], STOP_S)
        self._end([group.broker] if group.broker else [], STOP_S)
        if group.broker is not None:
            self.settings.broker_socket.unlink(missing_ok=True)
        if self._farm is not None:
            self._farm.close()

    def _end(self, children: Sequence[Child], grace_s: float) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        until = time.monotonic() + grace_s
        while any(child.alive for child in children):
            if self._kill.is_set() or time.monotonic() > until:
                for child in children:
                    child.signal(signal.SIGKILL)
                for child in children:
                    if child.process is not None:
                        child.process.wait()
                return
            self._kill.wait(0.05)


def lock_home(home: Path) -> IO[str]:
    """Make `home` ours as long as the returned file is open.

    Raises EnvironmentFault, naming the process, when another `farm up` has it.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (home / "up.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise EnvironmentFault(
            f"a farm is up in {home} already (process {owner}); stop it first, or give this one "
            "another --home"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()
    return file


def _not_loaded(worker: Child) -> ModelNotLoaded:
    why = f"{worker.name} is not ready in time" if worker.alive else worker.obituary()
    return ModelNotLoaded(f"{why}; the end of {worker.log}:\n{worker.last_words()}")
