"""The connection to SQL: SQLite in WAL mode or PostgreSQL through psycopg 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from farm.config import redact
from farm.errors import DatabaseUnavailable, FarmError, InvalidConfig, InvalidParameter

BUSY_TIMEOUT_S = 30
# https://www.postgresql.org/docs/current/errcodes-appendix.html
UNDEFINED_TABLE = "42P01"
_NOT_OURS = {"42501", "0A000"}  # a right was taken away; a plan was made before a migration
POSTGRES = {  # a server that fell silent is given up after about 20 s
    "application_name": "farm",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 20_000,  # milliseconds
}

_NO_URL = (
    "database_url is no SQLAlchemy URL; write sqlite:////path/farm.db or "
    "postgresql+psycopg://user:password@host/name"
)


class Database:
    """Short transactions on one database. Safe to use from several threads.

    Raises InvalidConfig for a URL that is none, and for a driver that is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # ValueError: a port that is no number
            raise InvalidConfig(_NO_URL) from None
        self.dialect = parsed.get_backend_name()
        self.shown = redact(url)
        if self.dialect not in ("sqlite", "postgresql"):
            raise InvalidConfig(f"database {self.dialect!r} is not served: sqlite or postgresql is")
        try:
            self.engine = self._engine(url, parsed.database)
        except ArgumentError:  # SQLite's, with a host
            raise InvalidConfig(_NO_URL) from None
        except ModuleNotFoundError as error:
            raise InvalidConfig(
                f"{self.shown} needs the package {error.name}: pip install 'renderfarm[postgres]'"
            ) from None

    def _engine(self, url: str, database: str | None) -> Engine:
        if self.dialect == "postgresql":
            if url.startswith("postgresql://"):
                url = url.replace("postgresql://", "postgresql+psycopg://", 1)
            engine = create_engine(url, pool_pre_ping=True, connect_args=POSTGRES)
            event.listen(engine, "connect", _postgres_connect)
            return engine
        if database and database != ":memory:":
            Path(database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
        return engine

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One writing transaction: committed at the end of the block, rolled back on an exception.

        Raises DatabaseUnavailable when the database is away, and InvalidParameter for a number or
        a text that no column holds.
        """
        with self._transaction(write=True) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One reading transaction. Raises as `write` does."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        """One writing transaction in which tables may be made anew, on a connection of its own.

        SQLite's foreign keys are off in it, for dropping a table would delete what refers to it
        (https://www.sqlite.org/lang_altertable.html, 7). Raises DatabaseUnavailable.
        """
        with self._transaction(write=True, foreign_keys=False) as connection:
            connection.detach()  # the next one from the pool has its foreign keys
            yield connection

    @contextmanager
    def _transaction(self, *, write: bool, foreign_keys: bool = True) -> Iterator[Connection]:
        try:
            options = {"farm_write": write, "farm_foreign_keys": foreign_keys}
            with self.engine.execution_options(**options).begin() as connection:
                yield connection
        except (OverflowError, UnicodeEncodeError) as error:
            raise InvalidParameter(f"the database cannot hold this: {error}") from error
        except (DBAPIError, PoolTimeout, self.engine.dialect.loaded_dbapi.Error) as error:
            if fault := self._fault(error):
                raise fault from error
            raise

    def _fault(self, error: Exception) -> FarmError | None:
        """What an error of the driver means; None: a statement is wrong, or a constraint held."""
        cause = getattr(error, "orig", None) or error
        state = getattr(cause, "sqlstate", None)
        driver = self.engine.dialect.loaded_dbapi
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        if state == UNDEFINED_TABLE or "no such table" in why:
            return InvalidConfig(f"{self.shown} has no schema yet; run: farm db upgrade")
        if isinstance(cause, driver.DataError):
            return InvalidParameter(f"the database cannot hold this: {why}")
        ours = (driver.IntegrityError, driver.ProgrammingError, driver.NotSupportedError)
        if isinstance(cause, ours) and state not in _NOT_OURS:
            return None
        return DatabaseUnavailable(f"{self.shown} does not answer: {why}")

    def close(self) -> None:
        self.engine.dispose()


def _postgres_connect(connection: Any, record: Any) -> None:
    """A machine that freezes in a transaction must not hold up the others for long.

    A row found by its index costs little more than one in order, unlike on the turning disks that
    the default is made for; without it a few hundred jobs are found by reading a whole table.
    """
    with connection.cursor() as cursor:
        cursor.execute("SET random_page_cost = 1.1")
        cursor.execute("SET lock_timeout = '10s'")
        cursor.execute("SET idle_in_transaction_session_timeout = '10s'")
    connection.commit()


def _sqlite_connect(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    """A writer takes the lock at once: upgrading a read lock later would fail as `locked`."""
    options = connection.get_execution_options()
    if not options.get("farm_foreign_keys", True):
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("farm_write") else "BEGIN")
