"""The counters of a batch against a full count of its jobs, and a batch's end against both.

A count takes no lock: one statement sees jobs and counters as of one moment, and whoever moves a
job moves its counter in the same transaction. Only what differs is locked, counted again and put
right, so that a farm may run on meanwhile, and several may do it at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, and_, exists, func, literal, select, union_all, update

from farm.states import JobState
from farm.store.jobs import counter_of
from farm.store.tables import batches, counts, is_state, jobs, now

_STATES = tuple(JobState)


@dataclass(frozen=True)
class Drift:
    """Counters that do not say what the jobs do; `kept` is None where there is no such row."""

    batch_id: str
    model: str
    asked_engine: str
    kept: dict[str, int] | None
    counted: dict[str, int]

    def __str__(self) -> str:
        kept, pool = self.kept or {}, f"{self.model}:{self.asked_engine}".rstrip(":")
        told = [
            f"{state} {kept.get(state, 0)}, not {n}"
            for state, n in self.counted.items()
            if n != kept.get(state, 0)
        ]
        return f"{pool}: " + "; ".join(told)


def drift(connection: Connection, batch_id: str) -> list[Drift]:
    """Where the batch's counters differ from a full count; reads each of its rows once."""
    each = [func.count().filter(is_state(state)).label(state) for state in _STATES]
    pool = (jobs.c.model, jobs.c.asked_engine)
    full = select(literal(True).label("full"), *pool, *each).where(jobs.c.batch_id == batch_id)
    told = (counts.c.model, counts.c.asked_engine, *(counts.c[state] for state in _STATES))
    kept = select(literal(False), *told).where(counts.c.batch_id == batch_id)
    found: dict[tuple[str, str], dict[bool, dict[str, int]]] = {}
    for is_full, model, asked, *numbers in connection.execute(
        union_all(full.group_by(*pool), kept)
    ):
        by_state = dict(zip(map(str, _STATES), numbers, strict=True))
        found.setdefault((model, asked), {})[bool(is_full)] = by_state
    none = dict.fromkeys(map(str, _STATES), 0)
    pairs = [(pool, sides.get(False), sides.get(True, none)) for pool, sides in found.items()]
    return [Drift(batch_id, *pool, old, new) for pool, old, new in sorted(pairs) if old != new]


def mend(connection: Connection, batch_id: str) -> tuple[list[Drift], bool]:
    """Put the batch's counters and its end right; what differed, and whether its end did.

    Waits for transitions that are under way, and holds up those to come until it has counted.
    """
    mine = select(counts.c.model).where(counts.c.batch_id == batch_id)
    connection.execute(mine.order_by(*counts.primary_key.columns).with_for_update()).all()
    whole = select(batches.c.id).where(batches.c.id == batch_id)
    connection.execute(whole.with_for_update(key_share=True)).all()
    found = drift(connection, batch_id)
    for one in found:
        pool = (batch_id, one.model, one.asked_engine)
        if one.kept is None:
            names = dict(zip(("batch_id", "model", "asked_engine"), pool, strict=True))
            connection.execute(counts.insert().values({**names, **one.counted}))
            continue
        moved = {s: counts.c[s] + n - one.kept[s] for s, n in one.counted.items()}
        connection.execute(update(counts).where(counter_of(pool)).values(moved))
    return found, _mend_end(connection, batch_id)


_OPEN = exists().where(counts.c.batch_id == batches.c.id, counts.c.queued + counts.c.running > 0)
_UNENDED = and_(batches.c.finished_at.is_(None), batches.c.whole, ~_OPEN)
_REOPENED = and_(batches.c.finished_at.is_not(None), _OPEN)


def wrong_ends(connection: Connection, batch_id: str | None = None) -> list[str]:
    """Batches that are done by their counters and have no time of end, or have one and are not."""
    mine = literal(True) if batch_id is None else batches.c.id == batch_id
    unended = select(batches.c.id).where(_UNENDED, mine)
    return list(connection.scalars(union_all(unended, select(batches.c.id).where(_REOPENED, mine))))


def _mend_end(connection: Connection, batch_id: str) -> bool:
    mine = batches.c.id == batch_id
    last = select(func.max(jobs.c.finished_at)).where(jobs.c.batch_id == batch_id)
    ended = {"finished_at": func.coalesce(last.scalar_subquery(), now())}
    moved = connection.execute(update(batches).where(mine, _UNENDED).values(ended)).rowcount
    again = update(batches).where(mine, _REOPENED).values(finished_at=None)
    return bool(connection.execute(again).rowcount + moved)
