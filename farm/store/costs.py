"""What a picture of a model costs here, as far as it was measured: time and bytes."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, func, select

from farm.states import JobState
from farm.store import sessions as workers
from farm.store.tables import counts, is_state, jobs, sessions

SAMPLE = 200  # pictures of which the mean size is taken


class Cost(NamedTuple):
    """Of one picture; None: nothing is known yet. `seconds`: of all who serve the model now."""

    seconds: float | None
    size_bytes: float | None


def cost(connection: Connection, model: str) -> Cost:
    """The speed of the workers that live, else of the last one; the size of the first pictures of
    the newest batch that has some."""
    speeds = [
        1 / worker.seconds_per_picture
        for worker in workers.live(connection)
        if worker.model == model and worker.seconds_per_picture
    ]
    seconds = 1 / sum(speeds) if speeds else _last_speed(connection, model)
    return Cost(seconds, _size(connection, model))


def _size(connection: Connection, model: str) -> float | None:
    mine = (counts.c.model == model, counts.c.succeeded > 0)
    newest = select(func.max(counts.c.batch_id)).where(*mine).scalar_subquery()
    pictures = (
        select(jobs.c.size_bytes)
        .where(jobs.c.batch_id == newest, jobs.c.model == model, is_state(JobState.SUCCEEDED))
        .order_by(jobs.c.idx)
        .limit(SAMPLE)
        .subquery()
    )
    size = connection.scalar(select(func.avg(pictures.c.size_bytes)))
    return None if size is None else float(size)


def _last_speed(connection: Connection, model: str) -> float | None:
    """Of the last worker that rendered it, should none do now."""
    known = select(sessions.c.seconds_per_picture).where(
        sessions.c.model == model, sessions.c.seconds_per_picture.is_not(None)
    )
    found = connection.scalar(known.order_by(sessions.c.opened_at.desc()).limit(1))
    return None if found is None else float(found)
