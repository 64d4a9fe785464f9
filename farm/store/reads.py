"""Looking at jobs: one, or a page of a batch by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select

from farm.errors import NotFound
from farm.store.ids import JobRef
from farm.store.jobs import spec_of
from farm.store.tables import batches, events, jobs

_PLAIN = (
    "state",
    "failures",
    "claim_no",
    "engine",
    "progress",
    "started_at",
    "finished_at",
    "object_key",
    "sha256",
    "size_bytes",
    "render_s",
    "fingerprint",
    "error_code",
    "error",
)


@dataclass(frozen=True)
class Job:
    """A job as it stands. Times in seconds since 1970, `render_s` in seconds, progress 0 to 1."""

    id: str
    batch_id: str
    idx: int
    spec: dict[str, Any]
    state: str
    failures: int
    claim_no: int
    engine: str | None
    progress: float
    started_at: float | None
    finished_at: float | None
    object_key: str | None
    sha256: str | None
    size_bytes: int | None
    render_s: float | None
    fingerprint: str | None
    error_code: str | None
    error: str | None

    @property
    def ref(self) -> JobRef:
        return JobRef(self.batch_id, self.idx)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _query() -> Any:
    return select(jobs, batches.c.params.label("shared")).join(
        batches, batches.c.id == jobs.c.batch_id
    )


def _job(row: Row[Any]) -> Job:
    ref = JobRef(row.batch_id, row.idx)
    plain = {name: getattr(row, name) for name in _PLAIN}
    return Job(str(ref), *ref, spec=spec_of(row, row.shared).model_dump(), **plain)


def job(connection: Connection, ref: JobRef) -> Job:
    """Raises NotFound."""
    query = _query().where(jobs.c.batch_id == ref.batch_id, jobs.c.idx == ref.idx)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"no job {ref}")
    return _job(row)


def page(
    connection: Connection,
    batch_id: str,
    *,
    states: Sequence[str] = (),
    after: int = -1,
    limit: int = 500,
) -> list[Job]:
    """The batch's next `limit` jobs after place `after`, in order."""
    query = _query().where(jobs.c.batch_id == batch_id, jobs.c.idx > after)
    if states:
        query = query.where(jobs.c.state.in_(states))
    rows = connection.execute(query.order_by(jobs.c.idx).limit(limit))
    return [_job(row) for row in rows]


def history(connection: Connection, ref: JobRef) -> list[dict[str, Any]]:
    """The job's events, oldest first."""
    query = select(events).where(events.c.batch_id == ref.batch_id, events.c.idx == ref.idx)
    rows = connection.execute(query.order_by(events.c.id))
    return [dict(row._mapping) for row in rows]


def failures(connection: Connection, batch_id: str) -> dict[str, int]:
    """The batch's failed jobs by error code, the most frequent first."""
    n = func.count()
    query = (
        select(jobs.c.error_code, n)
        .where(jobs.c.batch_id == batch_id, jobs.c.state == "failed")
        .group_by(jobs.c.error_code)
        .order_by(n.desc(), jobs.c.error_code)
    )
    return {row[0]: row[1] for row in connection.execute(query)}
