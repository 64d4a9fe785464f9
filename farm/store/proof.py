"""What a worker that doubts itself asks: what it should be able to render, and who else can."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, and_, func, select

from farm.catalog import Lane
from farm.spec import JobSpec
from farm.states import JobState
from farm.store.ids import JobRef
from farm.store.jobs import spec_of
from farm.store.tables import batches, counts, is_state, jobs

AMONG = 1024  # jobs of a batch that are looked at


def succeeded_among(connection: Connection, refs: Iterable[JobRef]) -> int:
    """How many of these jobs have succeeded."""
    places: dict[str, list[int]] = {}
    for batch_id, idx in refs:
        places.setdefault(batch_id, []).append(idx)
    found = 0
    for batch_id, idxs in places.items():
        mine = and_(jobs.c.batch_id == batch_id, jobs.c.idx.in_(idxs))
        query = select(func.count()).where(mine, is_state(JobState.SUCCEEDED))
        found += connection.scalar(query) or 0
    return found


def proven(connection: Connection, lane: Lane) -> JobSpec | None:
    """A job that the lane should be able to render, without input pictures, or None.

    The quickest among the first of the newest batch in which some of the model have succeeded.
    """
    newest = (
        select(batches.c.id, batches.c.params)
        .join(counts, counts.c.batch_id == batches.c.id)
        .where(counts.c.model == lane.model, counts.c.asked_engine.in_(["", lane.engine]))
        .where(counts.c.succeeded > 0)
        .order_by(batches.c.id.desc())
        .limit(1)
    )
    batch = connection.execute(newest).first()
    if batch is None:
        return None
    few = select(jobs).where(jobs.c.batch_id == batch.id).order_by(jobs.c.idx).limit(AMONG)
    one = few.subquery().c
    query = (
        select(*one)
        .where(one.model == lane.model, one.asked_engine.in_(["", lane.engine]))
        .where(one.state == JobState.SUCCEEDED, one.render_s.is_not(None))
        .order_by(one.render_s)
        .limit(16)
    )
    specs = (spec_of(row, batch.params) for row in connection.execute(query))
    return next((spec for spec in specs if spec.init_image is None), None)
