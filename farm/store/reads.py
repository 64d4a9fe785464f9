"""Looking at jobs: one, or a page of a batch by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, func, literal_column, select

from farm.errors import InvalidParameter, NotFound
from farm.states import FINAL_STATES, JobState
from farm.store.ids import JobRef, claim_in
from farm.store.jobs import spec_of
from farm.store.tables import batches, counts, events, is_state, jobs, now

ENDED_BADLY = (JobState.FAILED, JobState.CANCELLED)
_ENDED_BADLY = "jobs.state IN ('failed', 'cancelled')"  # as the index has it

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
    """A job as it stands. Times in seconds since 1970, progress 0 to 1.

    `render_s` in seconds; None also for a picture that was rendered for another job.
    """

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

    @property
    def rendered_for(self) -> JobRef | None:
        """The job whose picture this one shares, having been linked to it."""
        claim = claim_in(self.object_key) if self.object_key else None
        return claim[0] if claim and claim[0] != self.ref else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _query() -> Select[Any]:
    return select(jobs, batches.c.params.label("shared")).join(
        batches, batches.c.id == jobs.c.batch_id
    )


def _job(row: Row[Any]) -> Job:
    ref = JobRef(row.batch_id, row.idx)
    plain = {name: getattr(row, name) for name in _PLAIN}
    return Job(str(ref), *ref, spec=spec_of(row, row.shared).model_dump(warnings=False), **plain)


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
    code: str | None = None,
    within_s: float | None = None,
    after: int = -1,
    limit: int = 500,
) -> list[Job]:
    """The batch's next `limit` jobs after place `after`, in order; fewer mean that it was the last.

    `code`: those that ended with this error. `within_s`: those that ended so many seconds ago or
    less. The cost is that of the page, whatever the batch's size: each state has its index.
    Raises InvalidParameter for a state that there is not.
    """
    found: list[Job] = []
    for query in _sources(connection, batch_id, states, code, after, limit):
        if code:
            query = query.where(jobs.c.error_code == code)
        if within_s is not None:
            query = query.where(jobs.c.finished_at >= now() - within_s)
        found += map(_job, connection.execute(query))
    return sorted(found, key=lambda job: job.idx)[:limit]


def _state(text: str) -> JobState:
    try:
        return JobState(text)
    except ValueError:
        known = ", ".join(JobState)
        raise InvalidParameter(f"no state {str(text)[:40]!r}, there are: {known}") from None


def _sources(
    connection: Connection,
    batch_id: str,
    states: Sequence[str],
    code: str | None,
    after: int,
    limit: int,
) -> Iterator[Select[Any]]:
    """A query for each index in which such jobs stand; each gives its first `limit`, in order."""
    here = _query().where(jobs.c.batch_id == batch_id, jobs.c.idx > after).limit(limit)
    here = here.order_by(jobs.c.idx)
    if code and not states:
        states = ENDED_BADLY
    if not states:
        yield here
    for state in map(_state, dict.fromkeys(states)):
        mine = here.where(is_state(state))
        if state in ENDED_BADLY:
            by_code = code and state == JobState.FAILED
            yield mine if by_code else mine.where(literal_column(_ENDED_BADLY))
        elif state == JobState.QUEUED:
            yield from _by_pool(connection, batch_id, mine)
        elif state == JobState.RUNNING:
            yield _held(batch_id, after, limit)
        elif first := _how_many(connection, batch_id, after, limit):
            yield mine.limit(first)


def _by_pool(connection: Connection, batch_id: str, query: Select[Any]) -> Iterator[Select[Any]]:
    pools = select(counts.c.model, counts.c.asked_engine)
    pools = pools.where(counts.c.batch_id == batch_id, counts.c.queued > 0)
    for model, asked in connection.execute(pools):
        yield query.where(jobs.c.model == model, jobs.c.asked_engine == asked)


def _held(batch_id: str, after: int, limit: int) -> Select[Any]:
    """Running jobs are few in all: by what sessions hold, not by their batch's million."""
    held = (is_state(JobState.RUNNING), jobs.c.session_id > "")
    unindexed = (jobs.c.batch_id.concat("") == batch_id, jobs.c.idx + 0 > after)
    return _query().where(*held, *unindexed).order_by(jobs.c.idx + 0).limit(limit)


def _how_many(connection: Connection, batch_id: str, after: int, limit: int) -> int:
    """How many of a batch's succeeded jobs to look for: beyond the last, all rows are walked."""
    mine = select(func.sum(counts.c.succeeded)).where(counts.c.batch_id == batch_id)
    return min(limit, int(connection.scalar(mine) or 0)) if after < 0 else limit


def is_open(connection: Connection, batch_id: str, first: int, end: int) -> bool:
    """Whether a job from place `first` up to, not including, `end` is not in a final state."""
    mine = (jobs.c.batch_id == batch_id, jobs.c.idx >= first, jobs.c.idx < end)
    query = select(jobs.c.idx).where(*mine, jobs.c.state.not_in(FINAL_STATES)).limit(1)
    return connection.scalar(query) is not None


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
        .where(jobs.c.batch_id == batch_id, is_state(JobState.FAILED))
        .group_by(jobs.c.error_code)
        .order_by(n.desc(), jobs.c.error_code)
    )
    return {row[0]: row[1] for row in connection.execute(query)}
