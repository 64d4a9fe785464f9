"""Batches: the jobs submitted together, and the small tables that answer `status` at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, select, update
from sqlalchemy.exc import IntegrityError

from farm.catalog import Lane
from farm.errors import KeyReused, NotFound, SubmitInProgress
from farm.states import JobState
from farm.store.ids import new_batch_id
from farm.store.tables import batches, counts, is_due, jobs, may_fit, now


@dataclass(frozen=True)
class BatchStatus:
    """How far a batch is. Times in seconds since 1970; `eta_s` and `rate` are None when unknown."""

    id: str
    name: str
    owner: str
    priority: int
    paused: bool
    ready: bool
    whole: bool
    total: int
    counts: dict[str, int]
    by_model: dict[str, dict[str, int]]
    created_at: float
    started_at: float | None
    finished_at: float | None
    rate: float | None
    eta_s: float | None

    @property
    def open(self) -> int:
        """Jobs that are not in a final state yet."""
        return self.counts["queued"] + self.counts["running"]

    @property
    def done(self) -> bool:
        return self.whole and self.open == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"done": self.done}


@dataclass(frozen=True)
class Once:
    """Marks a request that may be sent again and is carried out once: its key, and its SHA-256."""

    key: str
    sha256: str


def create(
    connection: Connection,
    params: dict[str, Any],
    *,
    name: str,
    owner: str,
    priority: int,
    once: Once | None = None,
    ready: bool = False,
) -> str:
    """A new, empty batch that no worker sees before `release`, unless it is `ready`. Its id.

    Raises SubmitInProgress when another batch of the owner has the key of `once`.
    """
    batch_id = new_batch_id()
    values = {
        "id": batch_id,
        "params": params,
        "name": name,
        "owner": owner,
        "priority": priority,
        "ready": ready,
        "created_at": now(),
        "touched_at": now(),
    }
    if once:
        values |= {"idempotency_key": once.key, "request_sha256": once.sha256}
    try:
        connection.execute(batches.insert().values(values))
    except IntegrityError as error:
        raise SubmitInProgress() from error
    return batch_id


@dataclass(frozen=True)
class Made:
    """What a submit has made so far: `total` jobs are in, of whose texts `digest` tells.

    `silent_s`: seconds since its submitter put the last ones in.
    """

    id: str
    total: int
    digest: str
    ready: bool
    whole: bool
    params: dict[str, Any]
    silent_s: float


def _made(row: Row[Any]) -> Made:
    silent_s = row.clock - row.touched_at
    return Made(row.id, row.total, row.digest, row.ready, row.whole, row.params, silent_s)


def made_by(connection: Connection, owner: str, once: Once) -> Made | None:
    """What this very request made before, be it whole or not.

    Raises KeyReused when the key belongs to another request.
    """
    mine = and_(batches.c.owner == owner, batches.c.idempotency_key == once.key)
    row = connection.execute(_with_clock().where(mine)).first()
    if row is None:
        return None
    if row.request_sha256 != once.sha256:
        raise KeyReused()
    return _made(row)


def grow(connection: Connection, batch_id: str, before: int, total: int, digest: str) -> bool:
    """Make room for the jobs from `before` to `total`; False: another submitter was here."""
    moved = connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.total == before, ~batches.c.whole)
        .values(total=total, digest=digest, touched_at=now())
    )
    return bool(moved.rowcount)


def release(connection: Connection, batch_id: str, total: int) -> None:
    """The batch is whole: workers may take its jobs."""
    connection.execute(
        update(batches).where(batches.c.id == batch_id).values(ready=True, whole=True, total=total)
    )


def abandoned(connection: Connection, after_s: float) -> list[Made]:
    """Batches whose submitter stopped half-way, silent for `after_s` seconds."""
    silent = and_(~batches.c.whole, batches.c.touched_at < now() - after_s)
    return [_made(row) for row in connection.execute(_with_clock().where(silent))]


def remove(connection: Connection, batch_id: str) -> None:
    """The batch and its rows are gone (a submit that was refused)."""
    connection.execute(delete(batches).where(batches.c.id == batch_id))


def status(connection: Connection, batch_id: str) -> BatchStatus:
    """Read from the counters, whatever the batch's size. Raises NotFound."""
    row = connection.execute(_with_clock().where(batches.c.id == batch_id)).first()
    if row is None:
        raise NotFound(f"no batch {batch_id[:40]!r}; `farm status` lists them")
    return _statuses(connection, [row])[0]


def recent(
    connection: Connection,
    limit: int = 20,
    *,
    before: str | None = None,
    owner: str | None = None,
) -> list[BatchStatus]:
    """The newest batches, newest first: those older than the batch `before`, those of an owner."""
    query = _with_clock().order_by(batches.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(batches.c.id < before)
    if owner is not None:
        query = query.where(batches.c.owner == owner)
    return _statuses(connection, connection.execute(query).all())


def find(connection: Connection, text: str) -> str:
    """The batch id that `text` means: a whole id, a unique beginning or end of one, or `latest`.

    Raises NotFound when there is none or more than one.
    """
    if text == "latest":
        found = connection.scalars(
            select(batches.c.id).order_by(batches.c.id.desc()).limit(1)
        ).all()
    elif text.isalnum() and len(text) <= 16:
        match = batches.c.id.like(f"{text}%") | batches.c.id.like(f"%{text}")
        found = connection.scalars(select(batches.c.id).where(match).limit(2)).all()
    else:
        found = []
    if len(found) != 1:
        what = "several batches" if found else "no batch"
        raise NotFound(f"{text[:40]!r} names {what}; `farm status` lists them")
    return str(found[0])


def set_paused(connection: Connection, batch_id: str, paused: bool) -> None:
    connection.execute(update(batches).where(batches.c.id == batch_id).values(paused=paused))


def candidates(
    connection: Connection, lane: Lane, memory: int | None = None, limit: int = 16
) -> list[Row[Any]]:
    """Batches with jobs for a lane that are due, in the order in which claims should try them.

    Priority first; among equals the batch with the fewest running jobs, then the oldest; within
    one, the jobs that ask for this very engine (`asked_engine`), which no other can do. `memory`:
    the worker's, in bytes; jobs known to need more do not count.
    """
    due = select(jobs.c.idx).where(
        jobs.c.batch_id == counts.c.batch_id,
        jobs.c.model == lane.model,
        jobs.c.asked_engine == counts.c.asked_engine,
        is_due(),
        may_fit(memory),
    )
    query = (
        select(batches.c.id, batches.c.params, counts.c.asked_engine)
        .join(counts, counts.c.batch_id == batches.c.id)
        .where(counts.c.model == lane.model, counts.c.asked_engine.in_(["", lane.engine]))
        .where(counts.c.queued > 0)
        .where(batches.c.ready, ~batches.c.paused, due.exists())
        .order_by(
            batches.c.priority.desc(),
            counts.c.running,
            batches.c.id,
            counts.c.asked_engine.desc(),
        )
        .limit(limit)
    )
    return list(connection.execute(query))


def backlog(connection: Connection) -> dict[tuple[str, str], int]:
    """Queued jobs that may be claimed, by model and engine asked for ('': any)."""
    query = (
        select(counts.c.model, counts.c.asked_engine, func.sum(counts.c.queued))
        .join(batches, counts.c.batch_id == batches.c.id)
        .where(counts.c.queued > 0, batches.c.ready, ~batches.c.paused)
        .group_by(counts.c.model, counts.c.asked_engine)
    )
    return {(model, asked): int(n) for model, asked, n in connection.execute(query)}


def _with_clock() -> Any:
    return select(batches, now().label("clock"))


def _statuses(connection: Connection, rows: Any) -> list[BatchStatus]:
    by_batch: dict[str, dict[str, dict[str, int]]] = {row.id: {} for row in rows}
    for line in connection.execute(select(counts).where(counts.c.batch_id.in_(by_batch))):
        model = by_batch[line.batch_id].setdefault(line.model, {str(s): 0 for s in JobState})
        for state in JobState:
            model[state] += getattr(line, state)
    return [_status(row, by_batch[row.id]) for row in rows]


def _status(row: Row[Any], by_model: dict[str, dict[str, int]]) -> BatchStatus:
    total = {str(s): sum(model[s] for model in by_model.values()) for s in JobState}
    finished = total["succeeded"] + total["failed"]
    left = total["queued"] + total["running"]
    rate = eta = None
    if row.started_at and finished:
        until = row.finished_at if row.finished_at and not left else row.clock
        rate = finished / max(until - row.started_at, 1e-3)
        eta = left / rate
    return BatchStatus(
        id=row.id,
        name=row.name,
        owner=row.owner,
        priority=row.priority,
        paused=row.paused,
        ready=row.ready,
        whole=row.whole,
        total=row.total,
        counts=total,
        by_model=by_model,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        rate=rate,
        eta_s=eta,
    )
