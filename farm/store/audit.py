"""What an audit asks of SQL: pages of pictures by place, and who holds what they should not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, func, or_, select

from farm.states import JobState
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.sessions import IS_LIVE
from farm.store.tables import batches, counts, is_state, jobs, now, sessions

PAGE = 1_000


class Recorded(NamedTuple):
    """A succeeded job's picture as its row has it; `linked`: it was rendered for another job."""

    ref: JobRef
    object_key: str
    sha256: str
    size_bytes: int | None
    linked: bool


def recorded(connection: Connection, batch_id: str, after: int, limit: int) -> list[Recorded]:
    """The batch's next `limit` succeeded jobs behind place `after`, in order."""
    query = _recorded().where(jobs.c.batch_id == batch_id, jobs.c.idx > after)
    return [_row(*row) for row in connection.execute(query.order_by(jobs.c.idx).limit(limit))]


def still(connection: Connection, one: Recorded) -> bool:
    """Whether the record is there, and the same."""
    mine = (jobs.c.batch_id == one.ref.batch_id, jobs.c.idx == one.ref.idx)
    row = connection.execute(_recorded().where(*mine)).first()
    return row is not None and _row(*row) == one


_COLUMNS = (jobs.c.object_key, jobs.c.sha256, jobs.c.size_bytes, jobs.c.render_s.is_(None))


def _recorded() -> Select[Any]:
    place = (jobs.c.batch_id, jobs.c.idx)
    return select(*place, *_COLUMNS).where(is_state(JobState.SUCCEEDED))


def _row(
    batch_id: str, idx: int, key: str, sha256: str, size: int | None, linked: bool
) -> Recorded:
    return Recorded(JobRef(batch_id, idx), key, sha256, size, bool(linked))


def held_by_the_dead(connection: Connection) -> list[tuple[JobRef, str]]:
    """Running jobs whose session has expired, has ended or is not there: (job, session)."""
    lives = select(sessions.c.id).where(sessions.c.id == jobs.c.session_id, IS_LIVE)
    query = select(jobs.c.batch_id, jobs.c.idx, jobs.c.session_id).where(
        is_state(JobState.RUNNING), ~lives.exists()
    )
    return [
        (JobRef(batch_id, idx), session) for batch_id, idx, session in connection.execute(query)
    ]


def every_batch(db: Database, after: str = "") -> Iterator[str]:
    """The batches behind that id, the oldest first; in a short transaction for each page."""
    while True:
        query = select(batches.c.id).where(batches.c.id > after).order_by(batches.c.id)
        with db.read() as connection:
            page = list(connection.scalars(query.limit(PAGE)))
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1]


def busy_batches(connection: Connection, within_s: float) -> list[str]:
    """Batches that are open, or ended so many seconds ago or less."""
    ended = batches.c.finished_at
    query = select(batches.c.id).where(or_(ended.is_(None), ended > now() - within_s))
    return list(connection.scalars(query))


def pictures(connection: Connection, batch_id: str | None = None, after: str = "") -> int:
    """How many succeeded jobs a batch has, or all batches behind that id, by the counters."""
    mine = counts.c.batch_id > after if batch_id is None else counts.c.batch_id == batch_id
    return int(connection.scalar(select(func.sum(counts.c.succeeded)).where(mine)) or 0)
