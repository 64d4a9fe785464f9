"""Carries runs out: one child process each, `farm dataset run`, held by a lease.

The dispatcher that leads begins runs; whoever began one sees it through. A child dies with its
dispatcher, and whoever takes over starts the same command again: a dataset run goes on where it
was. What the child prints on standard output as JSON, an object a line, is heard: `batch` is the
batch that a closed window pauses, the last object the run's summary.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sqlalchemy import Connection

from farm.children import Child
from farm.config import Settings
from farm.schedules import policy
from farm.schedules.times import label
from farm.store import schedules as store
from farm.store.db import Database
from farm.store.schedules import Run, Schedule
from farm.store.tables import clock

log = logging.getLogger(__name__)
STOP_S = 4.0  # that a child has to end when its dispatcher stops
_MOST_HEARD = 1 << 18  # bytes of one line
_MOST_TOLD = 4000  # characters of a reason
_BATCH = re.compile(r"[0-9a-z]{16}")
Command = Callable[[Schedule, str], Sequence[str]]
Attempt = Callable[[str, Callable[[], object]], bool]


def dataset_command(schedule: Schedule, label: str) -> list[str]:
    """The command line of a run."""
    argv = [sys.executable, "-m", "farm", "dataset", "run", schedule.recipe, "--label", label]
    if schedule.priority is not None:
        argv += ["--priority", str(schedule.priority)]
    return [*argv, "--json", "--notify"]


@dataclass
class _Held:
    """A run of ours and its process. Times of time.monotonic()."""

    schedule: Schedule
    run: Run
    child: Child
    renewed: float
    told: float | None = None  # when it was asked to stop
    closed: bool = False  # for its window closed
    summary: dict[str, Any] = field(default_factory=dict)
    _read: int = 0

    @property
    def name(self) -> str:
        return f"run {label(self.run.due_at, self.schedule.tz)} of {self.schedule.name}"

    def ask_to_stop(self) -> None:
        if self.told is None:
            self.told = time.monotonic()
            self.child.signal(signal.SIGTERM)

    def kill(self) -> None:
        self.told = self.told or time.monotonic()
        self.child.signal(signal.SIGKILL)

    def listen(self) -> None:
        """Take over what the child said since the last time."""
        with self.child.log.open("rb") as file:
            file.seek(self.child.log_start + self._read)
            for line in iter(partial(file.readline, _MOST_HEARD), b""):
                if not line.endswith(b"\n") and len(line) < _MOST_HEARD:
                    return  # the rest of it is to come
                self._read += len(line)
                self._hear(line)

    def _hear(self, line: bytes) -> None:
        try:
            said = json.loads(line, parse_constant=str) if line.startswith(b"{") else None
        except (ValueError, RecursionError):
            return
        if isinstance(said, dict):
            self.summary = said
            if _BATCH.fullmatch(str(said.get("batch"))):
                self.run = replace(self.run, batch_id=said["batch"])

    def verdict(self) -> tuple[str, str]:
        """What became of a run whose process is over: a state, and why."""
        process = self.child.process
        code = process.returncode if process else None
        if code == 0:
            return "succeeded", ""
        if self.told is not None:
            return "pending", "given back by its dispatcher"
        error = self.summary.get("error")
        if isinstance(error, dict):
            return "failed", _storable(str(error.get("message", "")))
        if code == 1 and self.summary:
            return "failed", _shortfall(self.summary)
        return "failed", _storable(f"{self.child.obituary()}\n{self.child.last_words()}")


def _shortfall(summary: Mapping[str, Any]) -> str:
    """What a run that came to its end fell short of."""
    counts = summary.get("counts")
    found = counts if isinstance(counts, dict) else {}
    short = [f"{n} {state}" for state, n in found.items() if n and state != "accepted"]
    why = f"; why: farm status {summary['batch']}" if "batch" in summary else ""
    return _storable(f"rows: {', '.join(short) or 'none accepted'}{why}")


def _storable(text: str) -> str:
    """The end of a stranger's text, as any database takes it."""
    return text.replace("\0", "").encode(errors="replace").decode()[-_MOST_TOLD:]


class Runner:
    """The runs that this dispatcher carries out.

    `attempt`: does a duty, and says its fault once. `command`: the command line of a run, by its
    schedule and label.
    """

    def __init__(
        self,
        db: Database,
        settings: Settings,
        holder: str,
        attempt: Attempt,
        command: Command = dataset_command,
    ) -> None:
        self._db, self._settings, self._holder = db, settings, holder
        self._attempt, self._command = attempt, command
        self._held: list[_Held] = []

    @property
    def _ttl_s(self) -> float:
        return self._settings.session_ttl_s

    def look(self, leads: bool) -> None:
        """See to the runs of ours; if this dispatcher leads, record what is due and begin it."""
        for held in self._held:
            if time.monotonic() - held.renewed > self._ttl_s:
                held.kill()  # the database was away: another one may have begun it
        for held in list(self._held):
            self._attempt(held.name, partial(self._tend, held))
        if leads:
            self._attempt("schedules", self._begin)

    def stop(self) -> None:
        """End the children; what they did not finish may be carried on by anyone at once."""
        for held in self._held:
            held.ask_to_stop()
        until = time.monotonic() + STOP_S
        while any(held.child.alive for held in self._held) and time.monotonic() < until:
            time.sleep(0.02)
        for held in list(self._held):
            held.kill()
            if held.child.process:
                held.child.process.wait()
            self._attempt(held.name, partial(self._tend, held))

    # ---- what is due

    def _begin(self) -> None:
        with self._db.read() as connection:
            at = clock(connection)
            due = store.due(connection, at)
        for schedule in due:
            self._attempt(f"schedule {schedule.name}", partial(self._record, schedule, at))
        with self._db.read() as connection:
            every = {one.id: one for one in store.listing(connection)}
            runs = store.open_runs(connection)
        for schedule_id in {run.schedule_id for run in runs} & every.keys():
            seen = every[schedule_id]
            mine = [run for run in runs if run.schedule_id == schedule_id]
            self._attempt(f"start of {seen.name}", partial(self._start, seen, mine, at))

    def _record(self, schedule: Schedule, at: float) -> None:
        with self._db.write() as connection:
            policy.record_due(connection, schedule, at)

    def _start(self, seen: Schedule, runs: list[Run], at: float) -> None:
        if policy.choose(seen, runs, at) is None:
            return
        with self._db.write() as connection:
            taken = policy.claim(connection, seen.id, self._holder, at, self._ttl_s)
        if taken is None:
            return
        schedule, run = taken
        name = f"schedule-{schedule.name}"
        home = self._settings.home.resolve()
        logs = home / "logs"
        argv = self._command(schedule, label(run.due_at, schedule.tz))
        held = _Held(schedule, run, Child(name, argv, logs / f"{name}.log"), time.monotonic())
        try:
            logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            held.child.start(os.environ | {"FARM_HOME": str(home)})
        except OSError as error:
            with self._db.write() as connection:
                why = f"its process does not start: {error}"
                store.release(connection, run, self._holder, "failed", at, why)
            return
        self._held.append(held)
        log.info("%s begins", held.name)

    # ---- what is under way

    def _tend(self, held: _Held) -> None:
        alive = held.child.alive  # before it is listened to: what it said last is heard too
        held.listen()
        with self._db.write() as connection:
            at = clock(connection)
            if alive:
                self._keep(connection, held, at)
                return
            self._settle(connection, held, at)
        self._held.remove(held)

    def _keep(self, connection: Connection, held: _Held, at: float) -> None:
        run, schedule = held.run, store.lock(connection, held.run.schedule_id)
        renewed = store.renew(connection, run, self._holder, at, self._ttl_s, run.batch_id)
        if schedule is None or not renewed:
            held.kill()  # removed, or another one's
            return
        held.renewed = time.monotonic()
        if not policy.may_go_on(schedule, run, at):
            held.ask_to_stop()  # its batch is paused once it is over, or by whoever finds it
            held.closed = True
        if held.told and time.monotonic() - held.told > self._settings.shutdown_grace_s:
            held.kill()

    def _settle(self, connection: Connection, held: _Held, at: float) -> None:
        state, why = held.verdict()
        schedule = store.lock(connection, held.run.schedule_id)
        if state == "pending" and held.closed and schedule:
            policy.hold_back(connection, schedule, held.run, self._holder, at)
            log.info("%s waits for its window", held.name)
            return
        store.release(connection, held.run, self._holder, state, at, why, held.summary)
        log.info("%s %s", held.name, "is given back" if state == "pending" else state)
