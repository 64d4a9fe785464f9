"""The short chaos run of one seed; `make chaos` is the whole one. CHAOS_SEED: another seed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.run import SHORT, run
from tests.servers import PostgresServer, RedisServer, S3Server


@pytest.mark.slow
@pytest.mark.timeout(600)  # three workers and their servers share the cores with what else runs
@pytest.mark.parametrize("database", ["postgres", "sqlite"])
def test_nothing_is_lost_and_nothing_is_recorded_twice(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    redis_server: RedisServer,
    s3_server: S3Server,
    database: str,
) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    postgres: PostgresServer | None = None
    if database == "postgres":
        postgres = request.getfixturevalue("postgres_server")
    for server in (redis_server, s3_server, postgres):
        if server:
            server.start()
    redis_server.flushall()
    report = run(tmp_path / "home", SHORT, seed, redis_server, s3_server, postgres)
    print(report.text())
    assert not report.audit.wrong
    assert report.struck.total() >= SHORT.times["worker killed"]
