"""Puts right what died: ends expired sessions and gives what they held back to the queue.

Jobs whose own render had started become suspects and cost a failure; the rest go back free.
And ends what nobody wants any more: jobs of cancelled batches, and of those that have expired.
"""

from __future__ import annotations

import logging

from farm.config import Settings
from farm.errors import WorkerLost
from farm.store import batches, jobs, sessions
from farm.store.db import Database
from farm.verdict import give_back, settle_failure

log = logging.getLogger(__name__)
MOST_STEPS = 20  # of 5,000 jobs each, that one look cancels of a batch
HALF_SUBMITTED_S = 86_400.0  # a batch whose submitter is silent for a day is removed


def reconcile(db: Database, settings: Settings, *, lenient: bool = False) -> int:
    """Release what expired or ended sessions hold; the number of jobs moved.

    `lenient`: let expired ones be, since nobody could beat, and their workers may live.
    Safe to run from several places at once: each move is guarded by session and claim.
    """
    with db.read() as connection:
        silent = [] if lenient else sessions.expired(connection)
        ended = sessions.orphaned(connection)
    lost = sum(_release(db, session_id, settings, expired=True) for session_id in silent)
    if not lenient:
        _free_the_needy(db)
    return lost + sum(_release(db, session_id, settings, expired=False) for session_id in ended)


def end_stopped(db: Database) -> int:
    """Cancel queued jobs of expired batches, and all of those cancelled whole; how many moved.

    In bounded steps; what is left is for the next look. Nothing of them is claimed meanwhile.
    """
    with db.read() as connection:
        found = batches.stopping(connection)
    return sum(_end(db, batch_id, unwanted) for batch_id, unwanted in found)


def _end(db: Database, batch_id: str, unwanted: bool) -> int:
    moved = 0
    for _ in range(MOST_STEPS):
        with db.write() as connection:
            if unwanted:
                n, asked = jobs.request_cancel(connection, batch_id)
            else:
                n, asked = jobs.expire(connection, batch_id), 0
        moved += n
        if not n and not asked:
            break
    if moved and not unwanted:
        log.warning("batch %s has expired; %d jobs of it were cancelled", batch_id, moved)
    return moved


def _free_the_needy(db: Database) -> None:
    """Jobs that no worker has memory enough for are tried anew, rather than wait for ever."""
    with db.read() as connection:
        needs = jobs.memory_needs(connection)
        unmet = [need for need in needs if not sessions.is_exceeded(connection, *need)]
    for lane, memory in unmet:
        with db.write() as connection:
            n = jobs.free_of_need(connection, lane, memory)
        log.warning("%d jobs of %s need more memory than any worker has", n, lane.model)


def remove_abandoned(db: Database) -> None:
    """Remove batches that were never submitted whole; one that was begun ends as it is."""
    with db.write() as connection:
        for batch in batches.abandoned(connection, HALF_SUBMITTED_S):
            log.warning("batch %s was never submitted whole", batch.id)
            if batch.ready:
                batches.release(connection, batch.id, batch.total)
                jobs.close_if_finished(connection, batch.id)
            else:
                batches.remove(connection, batch.id)


def _release(db: Database, session_id: str, settings: Settings, *, expired: bool) -> int:
    moved = 0
    with db.write() as connection:
        if expired and not sessions.close_lost(connection, session_id):
            return 0
        holding = jobs.held_by(connection, session_id)
        jobs.lock(connection, [held for held, _ in holding])
        for held, started in holding:
            if started:
                moved += settle_failure(connection, held, WorkerLost(), settings)
            else:
                moved += give_back(connection, held, "its worker was lost before the render began")
    if expired:
        log.warning("session %s expired; %d jobs went back", session_id, moved)
    return moved
