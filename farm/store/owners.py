"""How many jobs an owner may have queued and running at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, literal, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from farm.errors import QuotaExceeded
from farm.store.tables import batches, counts, owners

ALL = "*"  # the owner whose limits stand for all who have none of their own
_RUNNING = "farm.running"  # names of advisory locks
_QUEUED = "farm.queued"


@dataclass(frozen=True)
class Limits:
    """The most jobs that an owner may have at once; None: no limit."""

    max_queued: int | None = None
    max_running: int | None = None


@dataclass(frozen=True)
class OwnerStatus:
    """What an owner has now, and may have. The owner '*' is everyone without limits of his own."""

    owner: str
    queued: int
    running: int
    max_queued: int | None
    max_running: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def set_limits(connection: Connection, owner: str, limits: Limits | None) -> None:
    """Set an owner's limits, or ('*') those of all who have none; None: he has none any more."""
    if limits is None:
        connection.execute(delete(owners).where(owners.c.owner == owner))
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    insert = dialect.insert(owners).values(owner=owner, **asdict(limits))
    upsert = insert.on_conflict_do_update(index_elements=[owners.c.owner], set_=asdict(limits))
    connection.execute(upsert)


def limits_of(connection: Connection, owner: str) -> Limits:
    """What holds for an owner: his own row, else the one of '*'."""
    query = select(owners).where(or_(owners.c.owner == owner, owners.c.owner == ALL))
    found = {row.owner: row for row in connection.execute(query)}
    row = found.get(owner) or found.get(ALL)
    return Limits(row.max_queued, row.max_running) if row else Limits()


def listing(connection: Connection) -> list[OwnerStatus]:
    """Owners who have jobs under way or limits of their own, by name."""
    set_ = {row.owner: row for row in connection.execute(select(owners))}
    query = _under_way(batches.c.owner, "queued", "running").group_by(batches.c.owner)
    now = {row.owner: (int(row.queued), int(row.running)) for row in connection.execute(query)}
    told = []
    for owner in sorted(set_ | now):
        limits = limits_of(connection, owner)
        told.append(OwnerStatus(owner, *now.get(owner, (0, 0)), **asdict(limits)))
    return told


def room_to_run(connection: Connection, owner: str, max_running: int) -> int:
    """How many more jobs of an owner may run. Nobody else finds out before this transaction ends.

    One lock serves all owners: who held one and waited for the next could wait for ever.
    """
    _alone(connection, _RUNNING, "")
    return max_running - _count(connection, owner, "running")


def check_queued(connection: Connection, owner: str, more: int) -> None:
    """Raises QuotaExceeded if the owner may not have `more` jobs queued beside those he has.

    Call it in the transaction that inserts them: another submit of the owner waits for its end.
    """
    if limits_of(connection, owner).max_queued is None:
        return
    _alone(connection, _QUEUED, owner)
    most = limits_of(connection, owner).max_queued
    queued = _count(connection, owner, "queued")
    if most is not None and queued + more > most:
        who = f"owner {owner[:60]!r}" if owner else "who names no owner"
        raise QuotaExceeded(
            f"{who} may have {most:,} jobs queued at once; {queued:,} are, and these are {more:,} "
            "more. Submit fewer, or wait until some are rendered"
        )


def _alone(connection: Connection, what: str, owner: str) -> None:
    """One transaction at a time passes here. SQLite has one writer at a time anyway."""
    if connection.dialect.name == "postgresql":
        names = (func.hashtext(literal(what)), func.hashtext(literal(owner)))
        connection.execute(select(func.pg_advisory_xact_lock(*names)))


def _count(connection: Connection, owner: str, state: str) -> int:
    query = _under_way(batches.c.owner, state).where(batches.c.owner == owner)
    row = connection.execute(query.group_by(batches.c.owner)).first()
    return int(row[1]) if row else 0


def _under_way(*columns: Any) -> Any:
    """Sums of counters over the open batches, by the columns; states are given by name."""
    shown = [func.sum(counts.c[c]).label(c) if isinstance(c, str) else c for c in columns]
    joined = select(*shown).join(counts, counts.c.batch_id == batches.c.id)
    return joined.where(batches.c.finished_at.is_(None))
