"""Puts right what died: ends expired sessions and gives what they held back to the queue.

Jobs whose own render had started become suspects and cost a failure; the rest go back free.
"""

from __future__ import annotations

import logging

from farm.config import Settings
from farm.errors import WorkerLost
from farm.store import jobs, sessions
from farm.store.db import Database
from farm.verdict import give_back, settle_failure

log = logging.getLogger(__name__)


def reconcile(db: Database, settings: Settings) -> int:
    """Release what expired or ended sessions hold; the number of jobs moved.

    Safe to run from several places at once: each move is guarded by session and claim.
    """
    with db.read() as connection:
        dead = sessions.expired(connection) + sessions.orphaned(connection)
    return sum(_release(db, session_id, settings) for session_id in dead)


def _release(db: Database, session_id: str, settings: Settings) -> int:
    moved = 0
    with db.write() as connection:
        lost = sessions.close(connection, session_id, lost=True)
        holding = jobs.held_by(connection, session_id)
        jobs.lock(connection, [held for held, _ in holding])
        for held, started in holding:
            if started:
                moved += settle_failure(connection, held, WorkerLost(), settings)
            else:
                moved += give_back(connection, held, "its worker was lost before the render began")
    if lost:
        log.warning("session %s expired; %d jobs went back", session_id, moved)
    return moved
