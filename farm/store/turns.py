"""Who is next: the jobs that may be claimed, and the order in which claims try their batches.

All of it starts from the open batches (`ix_batches_open`) and their counters. How many jobs there
are, and how many batches have ended, does not matter.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Row,
    and_,
    case,
    exists,
    func,
    or_,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from farm.catalog import Lane
from farm.store.owners import ALL
from farm.store.tables import (
    ANYWHERE,
    POOL_ORDER,
    batches,
    counts,
    in_pool,
    is_due,
    jobs,
    now,
    owners,
    turns,
)


def claimable() -> ColumnElement[bool]:
    """Batches that are handed out: whole or eager, not stopped, not expired, and their turn came.

    A batch after another one waits until that is done with, however it ended, or is removed.
    """
    former = batches.alias("former")
    waits = exists().where(former.c.id == batches.c.after_id, former.c.finished_at.is_(None))
    return and_(
        batches.c.finished_at.is_(None),
        batches.c.ready,
        ~batches.c.paused,
        ~batches.c.cancel_requested,
        or_(batches.c.expires_at.is_(None), batches.c.expires_at > now()),
        or_(batches.c.after_id.is_(None), ~waits),
    )


def backlog(connection: Connection) -> dict[tuple[str, str], int]:
    """Queued jobs that may be claimed, by model and engine asked for ('': any)."""
    query = (
        select(counts.c.model, counts.c.asked_engine, func.sum(counts.c.queued))
        .join(batches, counts.c.batch_id == batches.c.id)
        .where(counts.c.queued > 0, claimable())
        .group_by(counts.c.model, counts.c.asked_engine)
    )
    return {(model, asked): int(n) for model, asked, n in connection.execute(query)}


def candidates(
    connection: Connection, lane: Lane, may: ColumnElement[bool] = ANYWHERE, limit: int = 16
) -> list[Row[Any]]:
    """The first `limit` batches that have jobs for a lane now, in the order to try them.

    Priority first. Among equals the owner with the fewest running jobs of the model, then the one
    who was served longest ago; of an owner the batch with the fewest running jobs, then the one
    served longest ago (a new one counts from its submit, so that no stream of new ones passes an
    old one for ever). Of a batch, first the jobs that ask for this very engine (`asked_engine`).
    Owners at their limit of running jobs are left out; `max_running` is that limit, if any.
    `may`: the jobs that the worker may take; others do not count.
    """
    opened = _open()
    load = _load(opened, lane)
    own = owners.alias("own")
    default = select(owners.c.max_running).where(owners.c.owner == ALL).scalar_subquery()
    max_running = case((own.c.owner.is_(None), default), else_=own.c.max_running)
    turn = and_(turns.c.owner == opened.c.owner, turns.c.model == lane.model)
    ranked = (
        select(opened.c.id, opened.c.owner, opened.c.asked_engine, max_running.label("max_running"))
        .outerjoin(load, load.c.owner == opened.c.owner)
        .outerjoin(turns, turn)
        .outerjoin(own, own.c.owner == opened.c.owner)
        .where(opened.c.model == lane.model, opened.c.asked_engine.in_(["", lane.engine]))
        .where(opened.c.queued > 0, opened.c.free)
        .where(or_(max_running.is_(None), func.coalesce(load.c.total, 0) < max_running))
        .order_by(
            opened.c.priority.desc(),
            func.coalesce(load.c.here, 0),
            func.coalesce(turns.c.at, 0.0),
            opened.c.running,
            opened.c.waits_since,
            opened.c.id,
            opened.c.asked_engine.desc(),
        )
        .offset(0)  # sorted once; whether jobs are due is then asked until enough are found
        .subquery("ranked")
    )
    pool = in_pool(ranked.c.id, lane.model, ranked.c.asked_engine)
    due = select(jobs.c.idx).where(pool, is_due(), may)
    first = due.order_by(*POOL_ORDER).limit(1).scalar_subquery()
    params = select(batches.c.params).where(batches.c.id == ranked.c.id).scalar_subquery()
    query = select(ranked, params.label("params")).where(first.is_not(None)).limit(limit)
    return list(connection.execute(query))


def _open() -> CTE:
    """The counters of open batches, with what they are ranked by."""
    return (
        select(
            batches.c.id,
            batches.c.owner,
            batches.c.priority,
            claimable().label("free"),
            counts.c.model,
            counts.c.asked_engine,
            counts.c.queued,
            counts.c.running,
            func.coalesce(counts.c.claimed_at, batches.c.created_at).label("waits_since"),
        )
        .join(counts, counts.c.batch_id == batches.c.id)
        .where(batches.c.finished_at.is_(None))
        .cte("open")
    )


def _load(opened: CTE, lane: Lane) -> CTE:
    """The running jobs of each owner: in all, and of the lane's model."""
    here = case((opened.c.model == lane.model, opened.c.running), else_=0)
    return (
        select(
            opened.c.owner,
            func.sum(opened.c.running).label("total"),
            func.sum(here).label("here"),
        )
        .where(opened.c.running > 0)
        .group_by(opened.c.owner)
        .cte("load")
    )


def take(connection: Connection, owner: str, model: str) -> None:
    """Note that the owner was given jobs of the model just now."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(turns).values(owner=owner, model=model, at=now())
    connection.execute(
        insert.on_conflict_do_update(
            index_elements=[turns.c.owner, turns.c.model], set_={"at": insert.excluded.at}
        )
    )
