"""Who leads where one is enough: a row that expires on the database's clock."""

from __future__ import annotations

from sqlalchemy import Connection, and_, delete, or_
from sqlalchemy.dialects import postgresql, sqlite

from farm.store.tables import leases, now


def take(connection: Connection, name: str, holder: str, ttl_s: float) -> bool:
    """Hold the lease for `ttl_s` seconds from now, or on; False: another one holds it."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = {"holder": holder, "expires_at": now() + ttl_s}
    insert = dialect.insert(leases).values(name=name, **values)
    free = or_(leases.c.holder == holder, leases.c.expires_at < now())
    taken = insert.on_conflict_do_update(index_elements=[leases.c.name], set_=values, where=free)
    return connection.execute(taken.returning(leases.c.name)).first() is not None


def give_up(connection: Connection, name: str, holder: str) -> None:
    """Let another one have it at once."""
    mine = and_(leases.c.name == name, leases.c.holder == holder)
    connection.execute(delete(leases).where(mine))
