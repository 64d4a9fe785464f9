"""Figures of the whole farm, none of which scans jobs or all of their events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from farm.states import JobState
from farm.store.tables import batches, counts, events, now
from farm.store.turns import claimable

MOST_EVENTS = 10_000  # read at once; the rest at the next look


class Waiting(NamedTuple):
    """The backlog of a model and the engine that its jobs ask for ('': any)."""

    model: str
    engine: str
    queued: int
    oldest_s: float  # since the oldest of its batches was submitted
    priority: int  # the highest of its batches


@dataclass(frozen=True)
class NewFailures:
    """Failures by (code, what followed: `requeued` or `failed`), up to the event `last_event`."""

    last_event: int
    counted: dict[tuple[str, str], int]


def by_state(connection: Connection) -> list[tuple[str, int]]:
    """How many jobs stand in each state."""
    sums = [func.coalesce(func.sum(counts.c[state]), 0) for state in JobState]
    row = connection.execute(select(*sums)).one()
    return [(str(state), int(n)) for state, n in zip(JobState, row, strict=True)]


def waiting(connection: Connection) -> list[Waiting]:
    """What may be claimed now, by model and engine asked for."""
    query = (
        select(
            counts.c.model,
            counts.c.asked_engine,
            func.sum(counts.c.queued),
            now() - func.min(batches.c.created_at),
            func.max(batches.c.priority),
        )
        .join(batches, counts.c.batch_id == batches.c.id)
        .where(counts.c.queued > 0, claimable())
        .group_by(counts.c.model, counts.c.asked_engine)
    )
    return [
        Waiting(model, engine, int(queued), float(oldest_s), priority)
        for model, engine, queued, oldest_s, priority in connection.execute(query)
    ]


def new_failures(connection: Connection, after: int | None) -> NewFailures:
    """Failures among the events after `after`, at most MOST_EVENTS; None: only where to go on.

    PostgreSQL numbers events before it commits them, so one that commits late may be missed.
    """
    if after is None:
        return NewFailures(connection.scalar(select(func.max(events.c.id))) or 0, {})
    page = (
        select(events.c.id, events.c.code, events.c.kind)
        .where(events.c.id > after)
        .order_by(events.c.id)
        .limit(MOST_EVENTS)
        .subquery()
    )
    query = select(page.c.code, page.c.kind, func.count(), func.max(page.c.id))
    last, counted = after, dict[tuple[str, str], int]()
    for code, kind, n, newest in connection.execute(query.group_by(page.c.code, page.c.kind)):
        last = max(last, newest)
        if kind in ("failed", "requeued"):
            counted[code or "", kind] = n
    return NewFailures(last, counted)
