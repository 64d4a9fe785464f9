"""Who leads where one is enough: a row that expires on the database's clock."""

from __future__ import annotations

import os
import secrets
import socket

from sqlalchemy import Connection, and_, delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from farm.store.tables import leases, now

DISPATCHER = "dispatcher"  # the lease of the dispatcher that leads


def holder_name() -> str:
    """A name for whoever asks, of this process and like no other."""
    return f"{socket.gethostname()[:32]}:{os.getpid()}:{secrets.token_hex(4)}"


def take(connection: Connection, name: str, holder: str, ttl_s: float) -> bool:
    """Hold the lease for `ttl_s` seconds from now, or on; False: another one holds it."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    values = {"holder": holder, "expires_at": now() + ttl_s}
    insert = dialect.insert(leases).values(name=name, **values)
    free = or_(leases.c.holder == holder, leases.c.expires_at < now())
    taken = insert.on_conflict_do_update(index_elements=[leases.c.name], set_=values, where=free)
    return connection.execute(taken.returning(leases.c.name)).first() is not None


def is_held(connection: Connection, name: str) -> bool:
    """Whether somebody holds it now."""
    held = select(leases.c.name).where(leases.c.name == name, leases.c.expires_at >= now())
    return connection.execute(held).first() is not None


def give_up(connection: Connection, name: str, holder: str) -> None:
    """Let another one have it at once."""
    mine = and_(leases.c.name == name, leases.c.holder == holder)
    connection.execute(delete(leases).where(mine))
