"""Servers and stores for every test. One server of a kind a pytest process, started when asked for.

On a laptop a test is skipped where a server's package is missing; with CI set that is an error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

from farm.blobs import BlobStore, open_blobs
from tests.servers import PostgresServer, RedisServer, S3Server, Server, ServerMissing

S = TypeVar("S", bound=Server)
# nohup and the like ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Hypothesis' own of a laptop or of CI, but an example may take its time on a busy machine.
settings.register_profile("farm", settings.default, deadline=None)
settings.load_profile("farm")


@contextmanager
def _running(kind: type[S]) -> Iterator[S]:
    with ExitStack() as stack:
        try:
            server = kind()
            stack.enter_context(server)
        except ServerMissing as exc:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(exc))
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with _running(RedisServer) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    with _running(PostgresServer) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with _running(S3Server) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Celery's URL of an empty Redis; redis-py wants `redis_server.client_url`."""
    redis_server.start()  # a test before may have stopped it
    redis_server.flushall()
    return redis_server.url


@pytest.fixture
def pg_url(postgres_server: PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of an empty PostgreSQL database, dropped afterwards."""
    postgres_server.start()
    url = postgres_server.create_database()
    yield url
    postgres_server.start()
    postgres_server.drop_database(url)


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """The name of an empty bucket."""
    s3_server.start()
    return s3_server.create_bucket()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLAlchemy URL of an empty database: a SQLite file, then PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'farm.db'}"
    url: str = request.getfixturevalue("pg_url")
    return url


@pytest.fixture(params=["local", "s3"])
def blob_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobStore]:
    """An empty blob store: a directory, then a prefix of a bucket."""
    if request.param == "local":
        store = open_blobs((tmp_path / "blobs").as_uri())
    else:
        bucket = request.getfixturevalue("s3_bucket")
        options = request.getfixturevalue("s3_server").options()
        store = open_blobs(f"s3://{bucket}/farm/pictures", s3=options)
    yield store
    store.close()
