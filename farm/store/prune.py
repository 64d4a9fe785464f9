"""The rows of batches that are no longer wanted, out in steps; each step leaves the store whole.

A row goes before its object, and what no row names any more is noted in `dropped_objects` in the
same transaction: so there is never a succeeded job without its picture, and a prune that was killed
goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    and_,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from farm.states import FINAL_STATES, JobState
from farm.store.ids import SESSION_PART, KeyClaim, claim_in
from farm.store.jobs import counter_of
from farm.store.rows import rows
from farm.store.tables import (
    batch_inputs,
    batches,
    counts,
    dropped_objects,
    events,
    is_state,
    jobs,
    now,
)

_ONE_AT_A_TIME = 0x6661726D  # PostgreSQL's advisory lock: two prunes would each see the other's row
_LINKED = and_(is_state(JobState.SUCCEEDED), jobs.c.render_s.is_(None))


@dataclass(frozen=True)
class Step:
    """What one transaction took away. `ended`: the batch is gone; `kept`: it is not done."""

    jobs: int = 0
    ended: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Size:
    """What a batch holds: its jobs, and the pictures that were rendered for it, with their bytes.

    Those of them that other batches share stay.
    """

    jobs: int
    pictures: int
    bytes: int


def finished(connection: Connection, older_than_s: float) -> list[str]:
    """Batches whose last job ended longer ago than that, the oldest first."""
    old = batches.c.finished_at < now() - older_than_s
    query = select(batches.c.id).where(batches.c.whole, old).order_by(batches.c.finished_at)
    return list(connection.scalars(query))


def is_done(connection: Connection, batch_id: str) -> bool:
    """Whether the batch is wholly submitted and all its jobs have ended."""
    left = select(counts.c.batch_id).where(
        counts.c.batch_id == batch_id, counts.c.queued + counts.c.running > 0
    )
    done = select(batches.c.id).where(batches.c.id == batch_id, batches.c.whole, ~left.exists())
    return connection.execute(done).first() is not None


def size(connection: Connection, batch_id: str) -> Size:
    """Reads every row of the batch."""
    own = and_(jobs.c.batch_id == batch_id, is_state(JobState.SUCCEEDED), ~_LINKED)
    held = select(func.count(), func.sum(jobs.c.size_bytes)).where(own)
    total = connection.scalar(select(batches.c.total).where(batches.c.id == batch_id))
    pictures, taken = connection.execute(held).one()
    return Size(total or 0, pictures, taken or 0)


def step(connection: Connection, batch_id: str, limit: int) -> Step:
    """Take away the batch's next `limit` jobs; at last its input pictures, and the batch.

    A batch that is not done, or not any more, is left as it is.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_ONE_AT_A_TIME)))
    if not is_done(connection, batch_id):
        return Step(kept=True)
    columns = ("idx", "model", "asked_engine", "state", "object_key", "size_bytes")
    found = select(*(jobs.c[name] for name in columns)).where(jobs.c.batch_id == batch_id)
    next_ones = found.order_by(jobs.c.idx).limit(limit).with_for_update()
    if gone := connection.execute(next_ones).all():
        if any(row.state not in FINAL_STATES for row in gone):  # driven anew just now
            return Step(kept=True)
        _remove_jobs(connection, batch_id, gone)
        return Step(len(gone))
    if _forget_inputs(connection, batch_id, limit):
        return Step()
    connection.execute(delete(batches).where(batches.c.id == batch_id))
    return Step(ended=True)


def _remove_jobs(connection: Connection, batch_id: str, gone: Sequence[Row[Any]]) -> None:
    """Remove the batch's first rows, and from the counters too, so that the two still agree."""
    last = gone[-1].idx
    for table in (events, jobs):
        mine = and_(table.c.batch_id == batch_id, table.c.idx <= last)
        connection.execute(delete(table).where(mine))
    for (model, asked, state), n in sorted(
        Counter((row.model, row.asked_engine, row.state) for row in gone).items()
    ):
        here = counter_of((batch_id, model, asked))
        connection.execute(update(counts).where(here).values({state: counts.c[state] - n}))
    fewer = {"total": batches.c.total - len(gone), "idempotency_key": None}
    connection.execute(update(batches).where(batches.c.id == batch_id).values(fewer))
    sizes = {row.object_key: row.size_bytes for row in gone if row.object_key}
    named = named_pictures(connection, sizes)
    _note(connection, {key: size for key, size in sizes.items() if key not in named})


def _note(connection: Connection, sizes: Mapping[str, int | None]) -> None:
    if not sizes:
        return
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    new = [{"key": key, "size_bytes": size} for key, size in sizes.items()]
    connection.execute(dialect.insert(dropped_objects).on_conflict_do_nothing(), new)


def _forget_inputs(connection: Connection, batch_id: str, limit: int) -> int:
    """Let go of the batch's next `limit` input pictures; how many."""
    mine = batch_inputs.c.batch_id == batch_id
    keys = list(connection.scalars(select(batch_inputs.c.key).where(mine).limit(limit)))
    connection.execute(delete(batch_inputs).where(mine, batch_inputs.c.key.in_(keys)))
    named = named_inputs(connection, keys)
    _note(connection, {key: None for key in keys if key not in named})
    return len(keys)


def named_pictures(connection: Connection, keys: Iterable[str]) -> set[str]:
    """Those of the keys that a job names, or will name when its picture is recorded.

    A picture is named by the job that it was rendered for, and by those that were linked to it.
    A key that no job can have made counts as named.
    """
    claims = {key: claim_in(key) for key in keys}
    strange = {key for key, claim in claims.items() if claim is None}  # left alone
    if len(strange) == len(claims):
        return strange
    asked, owner = _asked(connection, claims)
    own = select(asked.c.object_key).join(jobs, owner)
    own = own.where(or_(jobs.c.object_key == asked.c.object_key, _under_way(asked)))
    # One look at the index a key, however many are linked to it. A range in order, which only
    # the index has: with an equation and few statistics PostgreSQL reads the table for each key.
    same = and_(jobs.c.object_key >= asked.c.object_key, jobs.c.object_key <= asked.c.object_key)
    link = select(jobs.c.object_key).where(same, _LINKED).order_by(jobs.c.object_key).limit(1)
    linked = select(asked.c.object_key)
    linked = linked.where(link.correlate(asked).scalar_subquery().is_not(None))
    return strange.union(connection.scalars(own), connection.scalars(linked))


def passed_pictures(connection: Connection, keys: Iterable[str]) -> set[str]:
    """Those of the keys that no job names, nor ever will: the claim is over, however young it is.

    Of a job that is there, whose last claim is this one or a later one. What a batch left that is
    not known here is not among them: it may be another farm's.
    """
    keys = list(keys)
    named = named_pictures(connection, keys)
    claims = {key: claim_in(key) for key in keys if key not in named}
    if not claims:
        return set()
    asked, owner = _asked(connection, claims)
    over = select(asked.c.object_key).join(jobs, owner)
    return set(connection.scalars(over.where(jobs.c.claim_no >= asked.c.claim_no)))


def _asked(
    connection: Connection, claims: Mapping[str, KeyClaim | None]
) -> tuple[FromClause, ColumnElement[bool]]:
    """Keys and the claims in them as a relation, and how it is joined to the jobs."""
    names = ("object_key", "batch_id", "idx", "claim_no", "session_id")
    given = [
        (key, *claim.ref, claim.claim_no, claim.session) for key, claim in claims.items() if claim
    ]
    asked = rows(connection, [jobs.c[name] for name in names], given)
    return asked, and_(jobs.c.batch_id == asked.c.batch_id, jobs.c.idx == asked.c.idx)


def _under_way(asked: FromClause) -> ColumnElement[bool]:
    """The job is still held under this very claim."""
    theirs = func.substr(jobs.c.session_id, 1, SESSION_PART)
    mine = or_(asked.c.session_id == "", asked.c.session_id == theirs)
    return and_(is_state(JobState.RUNNING), jobs.c.claim_no == asked.c.claim_no, mine)


def named_inputs(connection: Connection, keys: Sequence[str]) -> set[str]:
    """Those of the keys that a batch names."""
    query = select(batch_inputs.c.key).where(batch_inputs.c.key.in_(keys)).distinct()
    return set(connection.scalars(query))


def dropped(connection: Connection, limit: int) -> dict[str, int | None]:
    """The next objects that are to be deleted, with their bytes where these are known."""
    query = select(dropped_objects).order_by(dropped_objects.c.key).limit(limit)
    return {row.key: row.size_bytes for row in connection.execute(query)}


def dropped_among(connection: Connection, keys: Sequence[str]) -> set[str]:
    """Those of the keys that are to be deleted."""
    query = select(dropped_objects.c.key).where(dropped_objects.c.key.in_(keys))
    return set(connection.scalars(query))


def dropped_size(connection: Connection) -> tuple[int, int]:
    """How many objects are to be deleted, and their bytes as far as these are known."""
    size = func.coalesce(func.sum(dropped_objects.c.size_bytes), 0)
    n, taken = connection.execute(select(func.count(dropped_objects.c.key), size)).one()
    return n, int(taken)


def settle_dropped(connection: Connection, keys: Iterable[str]) -> None:
    """These are deleted in the blob store, or are to stay after all."""
    connection.execute(delete(dropped_objects).where(dropped_objects.c.key.in_(list(keys))))


def is_empty(connection: Connection) -> bool:
    """Whether there is no batch at all."""
    return connection.execute(select(batches.c.id).limit(1)).first() is None
