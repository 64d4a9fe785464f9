"""Dispatchers under a simulated clock: real Runners and real SQL, with processes that are none."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select, update

from farm.config import Settings
from farm.schedules import policy, runner
from farm.schedules.runner import Runner
from farm.store import batches, schema
from farm.store import schedules as store
from farm.store.db import Database
from farm.store.schedules import Run, Schedule, Terms
from farm.store.tables import batches as batches_table
from farm.store.tables import schedules as schedules_table

TTL_S = 3600.0
MADRID = "Europe/Madrid"


def moment(text: str, tz: str = MADRID) -> float:
    """Seconds since 1970 of a local time."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz)).timestamp()


class Child:
    """A dataset run that takes its time and can be stopped at any moment."""

    def __init__(self, stage: Stage, name: str, argv: tuple[str, str], log: Path) -> None:
        self._stage, self.name, self.argv, self.log = stage, name, argv, log
        self.log_start = 0
        self.process: Any = None
        self._ends = 0.0

    def start(self, env: dict[str, str]) -> None:
        assert not [one for one in self._stage.alive() if one.argv[0] == self.argv[0]], (
            "two at once"
        )
        self.process = SimpleNamespace(returncode=None, wait=lambda: None)
        self._ends = self._stage.at + self._stage.left.setdefault(self.argv, 3600.0)
        self.log = self._stage.folder / f"{len(self._stage.children)}.log"
        self.log.write_text(json.dumps({"batch": self._stage.batch(self.argv)}) + "\n")
        self._stage.children.append(self)

    @property
    def alive(self) -> bool:
        if self.process.returncode is None and self._stage.at >= self._ends:
            self._end(0)
            self._stage.finished[self.argv] += self._stage.left[self.argv] > 0
            self._stage.left[self.argv] = 0.0
        return self.process.returncode is None

    def signal(self, signum: signal.Signals) -> None:
        if self.alive:
            self._stage.left[self.argv] = self._ends - self._stage.at
            self._end(130 if signum == signal.SIGTERM else -signum)

    def _end(self, code: int) -> None:
        self.process.returncode = code

    def obituary(self) -> str:
        return f"{self.name} ended"

    def last_words(self) -> str:
        return ""


@dataclass
class Stage:
    """A clock that a test moves, and what happens at it. `left`: seconds of work of a run."""

    url: str
    folder: Path
    at: float
    db: Database
    settings: Settings
    runners: list[Runner] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)
    left: dict[tuple[str, ...], float] = field(default_factory=dict)
    finished: Counter[tuple[str, ...]] = field(default_factory=Counter)
    made: dict[tuple[str, ...], str] = field(default_factory=dict)
    dbs: list[Database] = field(default_factory=list)
    begun: int = 0  # dispatchers
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    @classmethod
    def begin(cls, url: str, folder: Path, at: float, monkeypatch: pytest.MonkeyPatch) -> Stage:
        settings = Settings(home=folder, session_ttl_s=TTL_S)
        stage = cls(url, folder, at, Database(url), settings)
        schema.upgrade(stage.db)
        monkeypatch.setattr(runner, "clock", lambda connection: stage.at)
        time = SimpleNamespace(monotonic=lambda: stage.at, sleep=lambda s: None)
        monkeypatch.setattr(runner, "time", time)
        monkeypatch.setattr(runner, "Child", lambda *args: Child(stage, *args))
        return stage

    def close(self) -> None:
        self.pool.shutdown()
        for db in (self.db, *self.dbs):
            db.close()

    # ---- dispatchers

    def dispatcher(self) -> Runner:
        """One more of them, with connections of its own."""
        used = {id(one._db) for one in self.runners}
        free = [db for db in self.dbs if id(db) not in used]
        if not free:
            free = [Database(self.url)]
            self.dbs += free
        self.begun += 1
        made = Runner(
            free[0],
            self.settings,
            f"dispatcher {self.begun}",
            _do,
            lambda schedule, label: (schedule.name, label),
        )
        self.runners.append(made)
        return made

    def kill(self, one: Runner) -> None:
        """It and its children are gone; nothing is recorded."""
        for held in one._held:
            held.child.signal(signal.SIGKILL)
        self.runners.remove(one)

    def look(self) -> None:
        """All dispatchers look at once; each of them believes that it leads."""
        for done in [self.pool.submit(one.look, True) for one in self.runners]:
            done.result()

    def alive(self) -> list[Child]:
        return [one for one in self.children if one.alive]

    def batch(self, argv: tuple[str, ...]) -> str:
        """The batch of a run: the same however often it is started."""
        if argv not in self.made:
            with self.db.write() as connection:
                self.made[argv] = batches.create(connection, {}, name="", owner="", priority=0)
        return self.made[argv]

    # ---- schedules

    def add(self, name: str = "nightly", cron: str = "0 2 * * *", **terms: Any) -> Schedule:
        with self.db.write() as connection:
            new = Terms(name, "/nightly.toml", cron, terms.pop("tz", MADRID), **terms)
            return policy.add(connection, new, self.at)

    def now(self, name: str = "nightly") -> Schedule:
        with self.db.read() as connection:
            return store.find(connection, name)

    def runs(self, name: str = "nightly", limit: int = 1000) -> list[Run]:
        """Oldest first."""
        with self.db.read() as connection:
            found = store.history(connection, store.find(connection, name).id, limit)
        return found[::-1]

    def states(self, name: str = "nightly") -> list[str]:
        return [run.state for run in self.runs(name)]

    def do(self, change: Any, name: str = "nightly") -> Any:
        """What a person does."""
        with self.db.write() as connection:
            return change(connection, store.find(connection, name), self.at)

    def was_added_at(self, at: float, name: str = "nightly") -> None:
        """So long ago nobody had looked yet."""
        one = self.now(name)
        due = policy.next_due(one.cron, one.tz, at)
        with self.db.write() as connection:
            connection.execute(update(schedules_table).values(next_due=due))

    def paused(self, batch_id: str) -> bool:
        with self.db.read() as connection:
            mine = select(batches_table.c.paused).where(batches_table.c.id == batch_id)
            return bool(connection.scalars(mine).one())

    # ---- time

    def sleep_until(self, at: float, look: bool = True) -> None:
        self.at = at
        if look:
            self.look()

    def nights(self, until: float, rng: random.Random) -> None:
        """Live on until then, dispatchers being killed, stopped and replaced on the way."""
        while self.at < until:
            with self.db.read() as connection:
                every = store.listing(connection)
            moments = [one.next_due for one in every]
            moments += [policy.closes(one.until, one.tz, self.at) for one in every if one.until]
            step = rng.uniform(600, TTL_S * 0.8) if self.alive() else 8 * 3600
            self.at = min(self.at + step, *(at + rng.choice((0.0, 0.4)) for at in moments))
            if rng.random() < 0.2:
                one = rng.choice(self.runners)
                if rng.random() < 0.5:
                    self.kill(one)
                else:
                    one.stop()
                    self.runners.remove(one)
                self.dispatcher()
            self.look()


def _do(duty: str, do: Any) -> bool:
    do()
    return True
