"""Batches: the jobs submitted together, and the small tables that answer `status` at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, delete, exists, or_, select, update
from sqlalchemy.exc import IntegrityError

from farm.errors import KeyReused, NotFound, SubmitInProgress
from farm.states import JobState
from farm.store.ids import new_batch_id
from farm.store.tables import batches, counts, now


@dataclass(frozen=True)
class BatchStatus:
    """How far a batch is. Times in seconds since 1970; `eta_s` and `rate` are None when unknown.

    `cancelled`: a person wants no job of it any more. `after`: the batch that it comes after,
    `waits`: that one is not done yet. `expires_at`: what has not begun by then is cancelled.
    """

    id: str
    name: str
    owner: str
    priority: int
    paused: bool
    cancelled: bool
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
    after: str | None = None
    waits: bool = False
    expires_at: float | None = None

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
    reuse: bool = True,
    after: str | None = None,
    expires_s: float | None = None,
) -> str:
    """A new, empty batch that no worker sees before `release`, unless it is `ready`. Its id.

    `after`: the id of a batch that must be done with first, however it ends. `expires_s`: what has
    not begun so many seconds from now is cancelled.
    Raises NotFound when there is no batch `after`, and SubmitInProgress when another batch of the
    owner has the key of `once`.
    """
    former = _row(after or "").with_for_update(read=True, key_share=True)  # not pruned meanwhile
    if after is not None and connection.scalar(former) is None:
        raise NotFound(f"there is no batch {after[:40]!r} to come after; `farm status` lists them")
    batch_id = new_batch_id()
    values = {
        "id": batch_id,
        "params": params,
        "name": name,
        "owner": owner,
        "priority": priority,
        "ready": ready,
        "after_id": after,
        "expires_at": None if expires_s is None else now() + expires_s,
        "reuse": reuse,
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
    _lock_counters(connection, batch_id)
    moved = connection.execute(
        update(batches)
        .where(batches.c.id == batch_id, batches.c.total == before, ~batches.c.whole)
        .values(total=total, digest=digest, touched_at=now())
    )
    return bool(moved.rowcount)


def release(connection: Connection, batch_id: str, total: int) -> None:
    """The batch is whole: workers may take its jobs."""
    _lock_counters(connection, batch_id)
    connection.execute(
        update(batches).where(batches.c.id == batch_id).values(ready=True, whole=True, total=total)
    )


def _lock_counters(connection: Connection, batch_id: str) -> None:
    """Counters before batches, as everywhere: an eager batch's jobs are claimed meanwhile."""
    mine = select(counts.c.model).where(counts.c.batch_id == batch_id)
    connection.execute(mine.order_by(*counts.primary_key.columns).with_for_update()).all()


def _row(batch_id: str) -> Select[tuple[str]]:
    return select(batches.c.id).where(batches.c.id == batch_id)


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
    found = _statuses(connection, [row])[0]
    if found.done and found.finished_at is None:  # its last job ended between the two looks
        row = connection.execute(_with_clock().where(batches.c.id == batch_id)).first() or row
        found = _statuses(connection, [row])[0]
    return found


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


def set_cancelled(connection: Connection, batch_id: str) -> None:
    """No job of the batch is claimed from now on; `jobs` and the reconciler cancel what is left."""
    mine = and_(batches.c.id == batch_id, batches.c.finished_at.is_(None))
    connection.execute(update(batches).where(mine).values(cancel_requested=True))


def stopping(connection: Connection) -> list[tuple[str, bool]]:
    """Batches with jobs to be cancelled: (id, whether a person wants it; else it has expired)."""
    expired = and_(batches.c.expires_at <= now(), counts.c.queued > 0)
    unwanted = and_(batches.c.cancel_requested, counts.c.queued + counts.c.running > 0)
    query = (
        select(batches.c.id, batches.c.cancel_requested)
        .join(counts, counts.c.batch_id == batches.c.id)
        .where(batches.c.finished_at.is_(None), or_(expired, unwanted))
        .distinct()
    )
    return [(row.id, row.cancel_requested) for row in connection.execute(query)]


def _with_clock() -> Any:
    former = batches.alias("former")
    waits = exists().where(former.c.id == batches.c.after_id, former.c.finished_at.is_(None))
    return select(batches, now().label("clock"), waits.label("waits"))


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
        cancelled=row.cancel_requested,
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
        after=row.after_id,
        waits=bool(row.waits),
        expires_at=row.expires_at,
    )
