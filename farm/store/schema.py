"""Brings a database to the current schema through the Alembic scripts in migrations/.

A schema only ever grows while code that cannot live with it may be running: columns with defaults,
tables, indexes, and CHECKs that such code keeps. So code accepts a schema that is newer than
itself, as long as the schema's floor (the table `schema_floor`, written by each migration that ends
something) is a revision that the code knows.
"""

from __future__ import annotations

import logging
import random
import time
from enum import StrEnum
from pathlib import Path

from alembic.command import downgrade as alembic_downgrade
from alembic.command import upgrade as alembic_upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from farm.errors import DatabaseUnavailable, InvalidConfig
from farm.store.db import Database
from farm.store.tables import schema_floor

log = logging.getLogger(__name__)
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)
_PACKAGED = Path(__file__).parent.parent / "_migrations"
MIGRATIONS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "migrations"
TRIES = 60  # to get all tables at once from workers that go on
_ONE_AT_A_TIME = 0x6D696772  # PostgreSQL's advisory lock of migrations
_LOCK_NOT_AVAILABLE = "55P03"


class Fit(StrEnum):
    """What a database's schema is to this version."""

    EMPTY = "empty"
    OLDER = "older"  # `upgrade` mends it
    CURRENT = "current"
    NEWER = "newer"  # it has more than is known here, and all that is needed
    TOO_NEW = "too new"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def head() -> str:
    """The newest revision that this code knows."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def known() -> set[str]:
    """The revisions that this code knows."""
    return {one.revision for one in ScriptDirectory.from_config(_config()).walk_revisions()}


def current(db: Database) -> str | None:
    """The database's revision; None when it has no schema yet."""
    with db.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def fit(db: Database) -> Fit:
    """Whether this version can work with the database's schema as it is."""
    found, mine = current(db), known()
    if found is None:
        return Fit.EMPTY
    if found in mine:
        return Fit.CURRENT if found == head() else Fit.OLDER
    with db.read() as connection:
        has_floor = inspect(connection).has_table(schema_floor.name)
        floor = connection.scalar(select(schema_floor.c.revision)) if has_floor else None
    return Fit.NEWER if floor in mine else Fit.TOO_NEW


def upgrade(db: Database, revision: str = "head") -> None:
    """Create or upgrade the schema, in one transaction; a schema that is newer stays as it is.

    Workers of the version before may go on meanwhile. Raises InvalidConfig for a schema that is too
    new, and for rows that break what the new one promises.
    """
    found = fit(db)
    if found is Fit.TOO_NEW:
        raise too_new(db)
    if found is Fit.OLDER:  # SQLite copies its tables: half a minute for a million jobs
        log.warning("%s is brought to this version's schema; that may take a minute", db.shown)
    if found is not Fit.NEWER:
        _migrate(db, revision, up=True)


def downgrade(db: Database, revision: str) -> None:
    """Take the schema back to an older revision, in one transaction."""
    _migrate(db, revision, up=False)


def too_new(db: Database) -> InvalidConfig:
    """What to say of a schema that this version cannot work with."""
    return InvalidConfig(
        f"{db.shown} is at revision {current(db)}, which is too new for this version (it knows "
        f"{head()}); install the version of the farm that upgraded it"
    )


def _migrate(db: Database, revision: str, *, up: bool) -> None:
    config = _config()
    for attempt in range(TRIES):
        try:
            with db.migrate() as connection:
                _alone(connection)
                config.attributes["connection"] = connection
                (alembic_upgrade if up else alembic_downgrade)(config, revision)
                _check_references(db, connection)
            return
        except IntegrityError as error:
            raise InvalidConfig(
                f"{db.shown} stays as it was: some of its rows break the new schema "
                f"({str(error.orig).strip().splitlines()[0]}); mend them, then upgrade again"
            ) from error
        except DatabaseUnavailable as error:
            if attempt == TRIES - 1 or not _is_in_use(error):
                raise
            time.sleep(random.uniform(0.05, 0.5))


def _alone(connection: Connection) -> None:
    """Hold all tables before the first is changed.

    Workers take their locks in other orders, so it is the migration that gives way and tries again,
    before PostgreSQL finds a deadlock (after a second) and ends a worker's transaction.
    """
    if connection.dialect.name == "sqlite":
        return
    connection.execute(select(func.pg_advisory_xact_lock(_ONE_AT_A_TIME)))
    connection.execute(text("SET LOCAL lock_timeout = '500ms'"))
    if tables := inspect(connection).get_table_names():
        connection.execute(text(f"LOCK TABLE {', '.join(sorted(tables))} IN ACCESS EXCLUSIVE MODE"))


def _is_in_use(error: DatabaseUnavailable) -> bool:
    cause = error.__cause__
    return isinstance(cause, DBAPIError) and (
        getattr(cause.orig, "sqlstate", "") == _LOCK_NOT_AVAILABLE
    )


def _check_references(db: Database, connection: Connection) -> None:
    """SQLite's foreign keys were off."""
    if connection.dialect.name == "sqlite":
        lost = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if lost is not None:
            raise InvalidConfig(f"{db.shown} stays as it was: a row of {lost[0]} refers to none")
