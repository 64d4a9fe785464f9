"""A database that refuses, is full or fails over is away: that is waited out, and costs no job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from farm.config import Settings
from farm.errors import DatabaseUnavailable, InvalidConfig, RenderFailed
from farm.store import reads
from farm.store.db import Database
from tests.servers import PostgresServer, poll
from tests.store_kit import PICTURE, Kit, spec
from workers import recorder as recorder_module
from workers.recorder import Recorder

# https://www.postgresql.org/docs/current/errcodes-appendix.html
FAULTS = {
    "read_only_sql_transaction": "25006",
    "idle_in_transaction_session_timeout": "25P03",
    "serialization_failure": "40001",
    "deadlock_detected": "40P01",
    "insufficient_privilege": "42501",
    "disk_full": "53100",
    "out_of_memory": "53200",
    "too_many_connections": "53300",
    "lock_not_available": "55P03",
    "query_canceled, as by statement_timeout": "57014",
    "admin_shutdown": "57P01",
    "cannot_connect_now": "57P03",
    "io_error": "58030",
    "data_corrupted": "XX001",
}


@pytest.mark.parametrize("state", FAULTS.values(), ids=FAULTS)
def test_postgresql_is_away_when_it_says_so(pg_faults: Database, state: str) -> None:
    said = f"DO $$ BEGIN RAISE EXCEPTION 'told' USING ERRCODE = '{state}'; END $$"
    with pytest.raises(DatabaseUnavailable, match="told"), pg_faults.write() as connection:
        connection.execute(text(said))
    with pg_faults.read() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_missing_table_is_a_missing_schema_and_a_wrong_statement_is_ours(
    pg_faults: Database,
) -> None:
    with pytest.raises(InvalidConfig, match="farm db upgrade"), pg_faults.read() as connection:
        connection.execute(text("SELECT * FROM nothing_here"))
    with pytest.raises(Exception, match="syntax") as found, pg_faults.read() as connection:
        connection.execute(text("SELECT FROM WHERE"))
    assert not isinstance(found.value, DatabaseUnavailable)


@pytest.fixture(scope="module")
def pg_faults(postgres_server: PostgresServer) -> Iterator[Database]:
    postgres_server.start()
    url = postgres_server.create_database()
    db = Database(url)
    yield db
    db.close()
    postgres_server.drop_database(url)


@pytest.mark.parametrize("pragma", ["max_page_count=1", "query_only=ON"])
def test_sqlite_that_is_full_or_read_only_is_away(tmp_path: Path, pragma: str) -> None:
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    with kit.db.read() as connection:
        connection.exec_driver_sql(f"PRAGMA {pragma}")  # of this connection, which the pool keeps
    with pytest.raises(DatabaseUnavailable, match=r"full|readonly"):
        kit.batch(*(spec("x" * 1000) for _ in range(100)))
    kit.db.close()


def test_a_file_that_is_no_database_is_away(tmp_path: Path) -> None:
    (tmp_path / "farm.db").write_bytes(b"no database at all" * 1000)
    db = Database(f"sqlite:///{tmp_path / 'farm.db'}")
    with pytest.raises(DatabaseUnavailable, match="not a database"), db.read() as connection:
        connection.execute(text("SELECT 1"))
    db.close()


def test_records_wait_until_a_database_may_be_written_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failover: the old primary is read-only for a while."""
    monkeypatch.setattr(recorder_module, "MAX_BACKOFF_S", 0.1)
    kit = Kit.at(database_url)
    batch = kit.batch(spec("a"), spec("b"), spec("c"))
    claims = kit.claim(batch, kit.session(), limit=3)
    _set_read_only(kit.db, True)
    recorder = Recorder(kit.db, Settings(retry_delay_s=0.0), lambda claim, picture: None)
    recorder.pictures([(claims[0], PICTURE)])
    recorder.failure(claims[1], RenderFailed("odd"))
    recorder.back(claims[2], "its worker was shut down")
    with pytest.raises(DatabaseUnavailable):
        kit.claim(batch, kit.session(), limit=1)
    assert not recorder.close(0.5)
    _set_read_only(kit.db, False)
    poll(lambda: kit.states(batch) == {"succeeded": 1, "queued": 2}, "the records", 10)
    assert recorder.close(10)
    with kit.db.read() as connection:
        failures = [reads.job(connection, claim.ref).failures for claim in claims]
    assert failures == [0, 1, 0]
    kit.db.close()


def _set_read_only(db: Database, wanted: bool) -> None:
    """For every connection, those that are open too."""
    state = "on" if wanted else "off"
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if db.dialect == "sqlite":
            connection.exec_driver_sql(f"PRAGMA query_only={state}")  # the pool has this one only
            return
        connection.detach()  # its session keeps what is set here: nobody else's
        connection.execute(text("SET default_transaction_read_only = off"))
        name = db.engine.url.database
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only={state}"))
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(
            text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        )
