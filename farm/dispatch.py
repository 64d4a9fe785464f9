"""Who works on what: rings the lanes, and chooses the jobs of a claim.

Policy stands here and in store/turns, over small tables: first the batch (priority, then a fair
share across owners, then across an owner's batches), then its next rows of one compatibility key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from farm.catalog import Lane
from farm.store import jobs, owners, sessions, turns
from farm.store.db import Database
from farm.store.jobs import Claim

if TYPE_CHECKING:  # Celery takes a quarter of a second to import; only who rings pays it
    from farm.broker import Broker


def claim_bundle(db: Database, session_id: str, lane: Lane, limit: int) -> list[Claim]:
    """The lane's next bundle, at most `limit` jobs of one key, in one short transaction.

    Running jobs decide, and they end: so no owner, nor a batch of his, waits for ever among equals.
    """
    with db.write() as connection:
        claimant = sessions.claimant(connection, session_id)
        if claimant is None:
            return []
        may = claimant.may_take()
        for batch in turns.candidates(connection, lane, may):
            most = limit
            if batch.max_running is not None:
                room = owners.room_to_run(connection, batch.owner, batch.max_running)
                most = min(limit, room)
            if most < 1:
                continue
            place = (connection, batch.id, batch.params, session_id, lane, most)
            bundle = jobs.claim(*place, batch.asked_engine, may)
            if bundle:
                turns.take(connection, batch.owner, lane.model)
                return bundle
    return []


def bundle_size(seconds_per_picture: float | None, seconds: float, most: int) -> int:
    """Jobs that this worker renders in about `seconds`, by its own measured speed; 1 at first."""
    if not seconds_per_picture:
        return 1
    return max(1, min(most, int(seconds / seconds_per_picture)))


def ring(db: Database, broker: Broker, models: Iterable[str] | None, per_worker: int) -> int:
    """Top the queues of these models' lanes (None: all) up to `per_worker` tokens a live worker.

    A lane without work or without workers gets none. Returns the tokens sent. Raises
    BrokerUnavailable or DatabaseUnavailable; ringing again later mends everything.
    """
    missing = missing_tokens(db, broker, models, per_worker)
    for lane, n in missing.items():
        broker.publish(lane, n)
    return sum(missing.values())


def missing_tokens(
    db: Database, broker: Broker, models: Iterable[str] | None, per_worker: int
) -> dict[Lane, int]:
    """How many tokens each of these lanes lacks, as `ring` counts them."""
    with db.read() as connection:
        waiting = turns.backlog(connection)
        workers = sessions.live_lanes(connection)
    found = {}
    for lane, n in workers.items():
        mine = waiting.get((lane.model, ""), 0) + waiting.get((lane.model, lane.engine), 0)
        if not mine or (models is not None and lane.model not in models):
            continue
        missing = min(n * per_worker, mine) - broker.length(lane)
        if missing > 0:
            found[lane] = missing
    return found
