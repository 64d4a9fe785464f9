"""Writes what happened to jobs, in groups, from one thread; the engine never waits for SQL."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection

from farm import logs
from farm.config import Settings
from farm.errors import DatabaseUnavailable, FarmError, JobCancelled, RenderFailed
from farm.store import jobs
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from farm.verdict import give_back, settle_failure
from workers.breaker import Breaker

log = logging.getLogger(__name__)
GROUP = 512  # so many ends are written at once ...
WAIT_S = 0.25  # ... or what there is after so long
MAX_BACKOFF_S = 5.0


@dataclass
class _Group:
    started: list[Claim] = field(default_factory=list)
    progress: dict[Claim, float] = field(default_factory=dict)
    pictures: list[tuple[Claim, Picture]] = field(default_factory=list)
    failures: list[tuple[Claim, FarmError]] = field(default_factory=list)
    back: list[tuple[Claim, str]] = field(default_factory=list)

    def ended(self) -> list[Claim]:
        return [claim for claim, _ in (*self.pictures, *self.failures, *self.back)]

    def claims(self) -> list[Claim]:
        return [*self.begun(), *self.progress, *self.ended()]

    def begun(self) -> list[Claim]:
        """Those whose start is to be noted: the record of a picture notes its own."""
        done = {(claim.ref, claim.claim_no) for claim, _ in self.pictures}
        return [claim for claim in self.started if (claim.ref, claim.claim_no) not in done]

    def ends(self) -> int:
        return len(self.pictures) + len(self.failures) + len(self.back)

    def __len__(self) -> int:
        return len(self.started) + len(self.progress) + self.ends()


class Recorder:
    """Collects records from any thread.

    `settled` is called with the claims whose end is recorded, or whose claim was lost; `lost` with
    each picture of a lost claim. `outstanding` tells how many claims have not ended: when the last
    of them does, it is written at once. `breaker` hears of every picture and every failure.
    """

    def __init__(
        self,
        db: Database,
        settings: Settings,
        lost: Callable[[Claim, Picture], None],
        settled: Callable[[list[Claim]], None] = lambda claims: None,
        outstanding: Callable[[], int] = lambda: GROUP,
        breaker: Breaker | None = None,
    ) -> None:
        self._db, self._settings, self._lost, self._settled = db, settings, lost, settled
        self._outstanding, self._breaker = outstanding, breaker or Breaker()
        self._changed = threading.Condition()
        self._group = _Group()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def started(self, claims: list[Claim]) -> None:
        self._add(lambda group: group.started.extend(claims))

    def progress(self, claims: list[Claim], fraction: float) -> None:
        self._add(lambda group: group.progress.update(dict.fromkeys(claims, fraction)))

    def pictures(self, stored: list[tuple[Claim, Picture]]) -> None:
        if stored:
            self._breaker.succeeded()
        self._add(lambda group: group.pictures.extend(stored))

    def failure(self, claim: Claim, error: FarmError) -> None:
        self._breaker.failed(claim.ref, error)
        self._add(lambda group: group.failures.append((claim, error)))

    def back(self, claim: Claim, why: str) -> None:
        self._add(lambda group: group.back.append((claim, why)))

    def _add(self, add: Callable[[_Group], None]) -> None:
        with self._changed:
            idle = not len(self._group)
            add(self._group)
            if idle or self._full():
                self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Record what is left and end; False if the database was away for all of `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._group) or self._closing)
                self._changed.wait_for(self._full, WAIT_S)
                if self._closing and not len(self._group):
                    return
                group, self._group = self._group, _Group()
            self._write(group)

    def _full(self) -> bool:
        ended = self._group.ends()
        last = ended > 0 and ended >= self._outstanding()
        return last or ended >= GROUP or self._closing

    def _write(self, group: _Group) -> None:
        try:
            self._record(group)
        except Exception:
            log.exception("a group of %d records was refused; writing them singly", len(group))
            self._write_singly(group)

    def _record(self, group: _Group) -> None:
        """Commit, then tell who must know; raises only where nothing was committed."""
        recorded = self._commit(group)
        try:
            for claim, picture in group.pictures:
                if claim.ref not in recorded:
                    self._lost(claim, picture)
            self._settled(group.ended())
            _tell(group, recorded)
        except Exception:
            log.exception("after a record")

    def _commit(self, group: _Group) -> set[JobRef]:
        """One transaction, tried until the database is there; any other error is raised.

        The jobs whose picture or failure was recorded: the claims of the others were lost.
        """
        wait = 0.1
        while True:
            try:
                with self._db.write() as connection:
                    return self._apply(connection, group)
            except DatabaseUnavailable as error:
                if wait == MAX_BACKOFF_S:
                    log.warning("%s; %d records wait for it", error.message, len(group))
                wait = min(wait * 2, MAX_BACKOFF_S)
                time.sleep(wait * random.uniform(0.5, 1.5))

    def _apply(self, connection: Connection, group: _Group) -> set[JobRef]:
        jobs.lock(connection, group.claims())
        jobs.mark_started(connection, group.begun())
        jobs.record_progress(connection, group.progress.items())
        recorded = jobs.succeed(connection, group.pictures)
        for claim, error in group.failures:
            if settle_failure(connection, claim, error, self._settings):
                recorded.add(claim.ref)
        for claim, why in group.back:
            give_back(connection, claim, why)
        return recorded

    def _write_singly(self, group: _Group) -> None:
        """No record is lost to its neighbour's fault, and no job stays held by a live session."""
        singles = [_Group(pictures=[one]) for one in group.pictures]
        singles += [_Group(failures=[one]) for one in group.failures]
        singles += [_Group(back=[one]) for one in group.back]
        for single in singles:
            (claim,) = single.claims()
            try:
                self._record(single)
            except Exception as error:
                log.exception("a job could not be recorded", extra=logs.about(claim))
                what = RenderFailed(f"could not be recorded: {type(error).__name__}")
                with suppress(Exception):  # else the runner's sweep gives it back
                    self._record(_Group(failures=[(claim, what)]))
                self._settled([claim])


def _tell(group: _Group, recorded: set[JobRef]) -> None:
    for claim, error in group.failures:
        if claim.ref in recorded:
            level = logging.INFO if isinstance(error, JobCancelled) else logging.WARNING
            log.log(level, "%s: %s", error.code, error.message, extra=logs.about(claim))
    if log.isEnabledFor(logging.DEBUG):
        for claim, picture in group.pictures:
            log.debug("stored %s", picture.object_key, extra=logs.about(claim))
