"""Machines whose clocks are hours apart: only the database's clock counts.

libfaketime sets what a process believes; monotonic clocks run true, as on real machines.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import func, select

from farm.store.tables import sessions
from tests.chaos.audit import audit
from tests.chaos.farm_under_fire import LANE, FarmUnderFire
from tests.servers import PostgresServer, RedisServer, S3Server

TTL_S = 6.0
SPARE_S = 15.0
JOBS = 150


def clock(by: str) -> dict[str, str]:
    """The environment of a process whose clock is wrong by so much, such as +1h."""
    found = find_spec("libfaketime")
    if not (found and found.submodule_search_locations):
        pytest.skip("no clocks to set: pip install libfaketime")
    (home,) = found.submodule_search_locations
    library = Path(home) / "vendor/libfaketime/src/libfaketime.so.1"
    return {"LD_PRELOAD": str(library), "FAKETIME": by, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.fixture
def servers(
    redis_server: RedisServer, s3_server: S3Server, postgres_server: PostgresServer
) -> tuple[RedisServer, S3Server, PostgresServer]:
    for server in (redis_server, s3_server, postgres_server):
        server.start()
    redis_server.flushall()
    return redis_server, s3_server, postgres_server


@pytest.mark.slow
def test_with_clocks_two_hours_apart_nobody_is_given_up_and_nobody_kept(
    tmp_path: Path, servers: tuple[RedisServer, S3Server, PostgresServer]
) -> None:
    wrong = {"worker-0": clock("+1h"), "worker-1": clock("-1h"), "dispatcher-0": clock("+1h")}
    wrong["dispatcher-1"] = clock("-1h")
    blobs = (tmp_path / "blobs").as_uri()
    told = {"session_ttl_s": TTL_S, "blobs_url": blobs}
    with FarmUnderFire(tmp_path / "home", *servers, envs=wrong, **told) as farm:
        farm.start()
        batch = farm.farm.submit([f"picture {i}" for i in range(JOBS)], model=LANE.model)
        farm.wait_for(lambda: _at_work(farm) == farm.size, "a picture of each worker", 60)
        assert _lost(farm) == 0
        farm.alive["worker-0"].kill()
        killed = time.monotonic()
        farm.wait_for(lambda: _lost(farm), "the lost session", TTL_S + SPARE_S)
        took = time.monotonic() - killed
        farm.alive["dispatcher-0"].kill()  # whichever leads, the other one's clock is wrong too
        farm.wait_for(lambda: farm.farm.status(batch.id).done, "all", 60)
        farm.stop_all()
        found = audit(farm.farm, [batch.id], {}, LANE)
        print(f"clocks an hour fast and slow: {found.succeeded} succeeded, a killed worker's "
              f"session was ended after {took:.1f} s (time to live {TTL_S:g} s)")  # fmt: skip
        assert not found.wrong
        assert found.succeeded == JOBS
        assert _lost(farm) == 1


@pytest.mark.slow
def test_what_storage_refuses_for_a_wrong_clock_is_held_until_the_clock_is_right(
    tmp_path: Path, servers: tuple[RedisServer, S3Server, PostgresServer]
) -> None:
    """S3 refuses signatures that are 15 minutes off; the sentence names the clock."""
    envs = {"worker-0": clock("+1h")}
    with FarmUnderFire(tmp_path / "home", *servers, workers=1, envs=envs) as farm:
        farm.start()
        batch = farm.farm.submit([f"picture {i}" for i in range(12)], model=LANE.model)
        farm.wait_for(lambda: any("clocks" in w.note for w in farm.farm.workers()), "a note", 30)
        assert farm.farm.status(batch.id).counts["failed"] == 0
        envs.clear()
        farm.alive["worker-0"].terminate()  # the next one has the right time
        farm.wait_for(lambda: farm.farm.status(batch.id).done, "all", 90)
        farm.stop_all()
        assert not audit(farm.farm, [batch.id], {}, LANE).wrong
        assert all(job.failures == 0 for job in farm.farm.pictures(batch.id))


def _at_work(farm: FarmUnderFire) -> int:
    return sum(worker.rendered > 0 for worker in farm.farm.workers())


def _lost(farm: FarmUnderFire) -> int:
    with farm.farm.db.read() as connection:
        query = select(func.count()).select_from(sessions).where(sessions.c.lost)
        return int(connection.scalar(query) or 0)
