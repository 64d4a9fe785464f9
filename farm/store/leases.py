"""Who leads where one is enough: a row that expires on the database's clock."""

from __future__ import annotations

from sqlalchemy import Connection, and_, delete, or_, update
from sqlalchemy.dialects import postgresql, sqlite

from farm.store.tables import leases, now


def take(connection: Connection, name: str, holder: str, ttl_s: float) -> bool:
    """Hold the lease for `ttl_s` seconds from now, or on; False: another one holds it."""
    values = {"holder": holder, "expires_at": now() + ttl_s}
    free = or_(leases.c.holder == holder, leases.c.expires_at < now())
    renew = update(leases).where(leases.c.name == name, free).values(values)
    if connection.execute(renew).rowcount:
        return True
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    first = dialect.insert(leases).values(name=name, **values).on_conflict_do_nothing()
    return bool(connection.execute(first).rowcount)


def give_up(connection: Connection, name: str, holder: str) -> None:
    """Let another one have it at once."""
    mine = and_(leases.c.name == name, leases.c.holder == holder)
    connection.execute(delete(leases).where(mine))
