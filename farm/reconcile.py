"""Puts right what died or drifted: gives back what nobody holds, and mends what does not agree.

The dispatcher does the cheap part on every tick and the rest now and then; `farm reconcile` does
all of it at once. Any number may run beside each other and beside a farm at work: each repair is
guarded, and one that another has done changes nothing. What touches a job is a row in `job_events`.

Jobs whose own render had started become suspects and cost a failure; the rest go back free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from farm import retention
from farm.blobs import BlobStore
from farm.config import Settings
from farm.dispatch import missing_tokens, ring
from farm.errors import EnvironmentFault, WorkerLost
from farm.store import audit, batches, counters, jobs, sessions
from farm.store.db import Database
from farm.verdict import give_back, settle_failure

if TYPE_CHECKING:
    from farm.broker import Broker

log = logging.getLogger(__name__)
STEP = 5_000  # jobs that one transaction moves
MOST_STEPS = 20  # that one look takes of a batch
HALF_SUBMITTED_S = 86_400.0  # a batch whose submitter is silent for a day is removed


@dataclass(frozen=True)
class Repair:
    """One thing put right: what kind, of which session, batch or lane, and how many jobs (or
    counters, objects, tokens) it changed."""

    kind: str
    about: str
    n: int
    text: str


@dataclass
class Report:
    """What was put right or, in a dry run, would be; `troubles`: what could not be looked at."""

    dry_run: bool = False
    repairs: list[Repair] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def add(self, kind: str, about: str, n: int, text: str) -> None:
        self.repairs.append(Repair(kind, about, n, text))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Log(Report):
    """Of a repair that nobody asked for: it is told in the log."""

    def add(self, kind: str, about: str, n: int, text: str) -> None:
        super().add(kind, about, n, text)
        log.warning("%s", text)


def mend_all(
    db: Database,
    blobs: Callable[[], BlobStore],
    broker: Callable[[], Broker],
    settings: Settings,
    *,
    dry_run: bool = False,
) -> Report:
    """Every repair there is, now. One that needs what is away is a trouble, and the rest goes on.

    Reads each job's row once, and the list of the stored pictures.
    """
    report = Report(dry_run)
    parts: list[Callable[[], object]] = [
        lambda: reconcile(db, settings, report=report),
        lambda: end_stopped(db, report),
        lambda: remove_abandoned(db, report),
        lambda: mend_counters(db, audit.every_batch(db), report),
        lambda: remove_objects(db, blobs(), report),
        lambda: _ring(db, broker(), settings, report),
    ]
    for part in parts:
        try:
            part()
        except EnvironmentFault as fault:
            report.troubles.append(fault.message)
    return report


def reconcile(
    db: Database, settings: Settings, *, lenient: bool = False, report: Report | None = None
) -> int:
    """Release what sessions hold that expired, ended or are gone; the number of jobs moved.

    `lenient`: let expired ones be, since nobody could beat, and their workers may live.
    """
    report = report or Log()
    with db.read() as connection:
        silent = [] if lenient else sessions.expired(connection)
        ended = sessions.orphaned(connection)
    lost = sum(_release(db, session_id, settings, report, expired=True) for session_id in silent)
    if not lenient:
        _free_the_needy(db, report)
    left = (_release(db, session_id, settings, report, expired=False) for session_id in ended)
    return lost + sum(left)


def _release(
    db: Database, session_id: str, settings: Settings, report: Report, *, expired: bool
) -> int:
    moved = 0
    if report.dry_run:
        with db.read() as connection:
            moved = len(jobs.held_by(connection, session_id))
    else:
        with db.write() as connection:
            if expired and not sessions.close_lost(connection, session_id):
                return 0
            holding = jobs.held_by(connection, session_id)
            jobs.lock(connection, [held for held, _ in holding])
            for held, started in holding:
                if started:
                    moved += settle_failure(connection, held, WorkerLost(), settings)
                else:
                    why = "its worker was lost before the render began"
                    moved += give_back(connection, held, why)
    if expired:
        report.add(
            "session",
            session_id,
            moved,
            f"session {session_id} expired; jobs of it go back: {moved}",
        )
    elif moved:
        report.add(
            "claims",
            session_id,
            moved,
            f"session {session_id} is no more; jobs of it go back: {moved}",
        )
    return moved


def _free_the_needy(db: Database, report: Report) -> None:
    """Jobs that no worker has memory enough for are tried anew, rather than wait for ever."""
    with db.read() as connection:
        needs = jobs.memory_needs(connection)
        unmet = [
            need for need in needs if not sessions.is_exceeded(connection, need.lane, need.memory)
        ]
    for need in unmet:
        n = need.jobs if report.dry_run else _free(db, need)
        if n:
            name = ":".join(filter(None, need.lane))
            report.add(
                "need",
                name,
                n,
                f"no worker has the memory that jobs of {name} need, any may try: {n}",
            )


def _free(db: Database, need: jobs.Need) -> int:
    freed = 0
    for _ in range(MOST_STEPS):
        with db.write() as connection:
            n = jobs.free_of_need(connection, need.lane, need.memory, STEP)
        freed += n
        if n < STEP:
            break
    return freed


def end_stopped(db: Database, report: Report | None = None) -> int:
    """Cancel queued jobs of expired batches, and all of those cancelled whole; how many moved.

    In bounded steps; what is left is for the next look. Nothing of them is claimed meanwhile.
    """
    report = report or Log()
    with db.read() as connection:
        found = batches.stopping(connection)
    return sum(_end(db, batch_id, unwanted, report) for batch_id, unwanted in found)


def _end(db: Database, batch_id: str, unwanted: bool, report: Report) -> int:
    if report.dry_run:
        with db.read() as connection:
            moved = batches.status(connection, batch_id).counts["queued"]
    else:
        moved = _cancel(db, batch_id, unwanted)
    if moved:
        why = "is cancelled" if unwanted else "has expired"
        report.add(
            "stopped", batch_id, moved, f"batch {batch_id} {why}; jobs of it cancelled: {moved}"
        )
    return moved


def _cancel(db: Database, batch_id: str, unwanted: bool) -> int:
    moved = 0
    for _ in range(MOST_STEPS):
        with db.write() as connection:
            if unwanted:
                n, asked = jobs.request_cancel(connection, batch_id, limit=STEP)
            else:
                n, asked = jobs.expire(connection, batch_id, limit=STEP), 0
        moved += n
        if not n and not asked:
            break
    return moved


def remove_abandoned(db: Database, report: Report | None = None) -> None:
    """Remove batches that were never submitted whole; one that was begun ends as it is."""
    report = report or Log()
    with db.read() if report.dry_run else db.write() as connection:
        for batch in batches.abandoned(connection, HALF_SUBMITTED_S):
            text = f"batch {batch.id} was never submitted whole"
            report.add("abandoned", batch.id, batch.total, text)
            if report.dry_run:
                continue
            if batch.ready:
                batches.release(connection, batch.id, batch.total)
                jobs.close_if_finished(connection, batch.id)
            else:
                batches.remove(connection, batch.id)


def mend_counters(db: Database, batch_ids: Iterable[str], report: Report | None = None) -> None:
    """Count the batches' jobs; counters and times of end that differ are put right.

    Counting locks nothing; a batch that differs is locked for the time of a second count.
    """
    report = report or Log()
    for batch_id in batch_ids:
        with db.read() as connection:
            drifts = counters.drift(connection, batch_id)
            ends = bool(counters.wrong_ends(connection, batch_id))
        if (drifts or ends) and not report.dry_run:
            with db.write() as connection:
                drifts, ends = counters.mend(connection, batch_id)
        for drift in drifts:
            report.add("counters", batch_id, 1, f"counters of batch {batch_id} put right: {drift}")
        if ends:
            report.add(
                "end", batch_id, 1, f"the time of end of batch {batch_id} did not fit its jobs"
            )


def remove_objects(db: Database, blobs: BlobStore, report: Report | None = None) -> None:
    """Delete objects whose rows are gone, and pictures of claims that are over."""
    report = report or Log()
    for what, told in (
        ("whose rows were pruned", retention.sweep(db, blobs, dry_run=report.dry_run)),
        ("that no job names", retention.prune_passed(db, blobs, dry_run=report.dry_run)),
    ):
        if told.objects:
            text = f"objects {what}: {told.objects} ({told.bytes} bytes)"
            report.add("objects", "pictures", told.objects, text)


def _ring(db: Database, broker: Broker, settings: Settings, report: Report) -> None:
    per_worker = settings.tokens_per_worker
    missing = missing_tokens(db, broker, None, per_worker)
    if missing and not report.dry_run:
        ring(db, broker, None, per_worker)
    for lane, n in missing.items():
        report.add("tokens", lane.queue, n, f"tokens that {lane.queue} lacked: {n}")
