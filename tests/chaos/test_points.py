"""A kill at each point of a worker's way, one by one, and how soon its jobs run elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import select

from farm.store.tables import jobs, sessions
from tests.chaos.audit import audit
from tests.chaos.farm_under_fire import LANE, FarmUnderFire, engine_of, worker_words
from tests.chaos.points import POINTS
from tests.servers import PostgresServer, RedisServer, S3Server

TTL_S = float(os.environ.get("CHAOS_TTL_S", "3"))  # 30 is what a farm has by default
SPARE_S = 15.0  # allowed beyond the session's time to live
PICTURES = 48
STORED = ["after the object is stored", "before the record is committed"]


@pytest.fixture(scope="module")
def farm(
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
    s3_server: S3Server,
    postgres_server: PostgresServer,
) -> Iterator[FarmUnderFire]:
    for server in (redis_server, s3_server, postgres_server):
        server.start()
    redis_server.flushall()
    home = tmp_path_factory.mktemp("points")
    with FarmUnderFire(
        home,
        redis_server,
        s3_server,
        postgres_server,
        workers=1,
        seconds_per_step=0.1,
        session_ttl_s=TTL_S,
    ) as farm:
        farm.start()
        yield farm


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_this_point_loses_nothing(farm: FarmUnderFire, point: str) -> None:
    words = worker_words()
    victim = farm.run("-m", "tests.chaos.points", point, *words[2:], name="victim")
    farm.wait_for(lambda: victim.pid in farm.live(), "the victim", 60)
    session, swept = _session(farm, victim.pid), _swept(farm)
    batch = farm.farm.submit([f"{point} {i}" for i in range(PICTURES)], model=LANE.model)
    farm.wait_for(lambda: victim.poll() is not None, "the kill", 60)
    killed = time.monotonic()
    assert victim.returncode == -9, farm.log("victim")
    held, before = _held(farm, session), None
    while held != before:  # its last commit may come after its end
        time.sleep(0.2)
        held, before = _held(farm, session), held
    farm.wait_for(
        lambda: all(_elsewhere(farm, *one) for one in held), "its jobs elsewhere", TTL_S + 30
    )
    took = time.monotonic() - killed
    farm.wait_for(lambda: farm.farm.status(batch.id).done, "the rest", 60)
    found = audit(farm.farm, [batch.id], {}, LANE)
    print(f"killed {point}: {len(held)} jobs ran elsewhere after {took:.1f} s "
          f"(time to live {TTL_S:g} s); {found.orphans} objects left over")  # fmt: skip
    assert not found.wrong
    assert found.succeeded == PICTURES
    _check_evidence(farm, point, batch.id, held)
    if point in STORED:  # a dispatcher's look, now and then, may have come before the audit's
        orphan = "a stored picture without its record, an orphan, that was removed"
        farm.wait_for(lambda: found.orphans or _swept(farm) > swept, orphan, 10)
    assert took < TTL_S + SPARE_S


def _check_evidence(farm: FarmUnderFire, point: str, batch_id: str, held: list[Any]) -> None:
    """Only whose render had begun is suspect, and only what was not recorded is rendered again."""
    found = list(farm.farm.jobs(batch_id))
    suspects = [job for job in found if job.failures]
    assert bool(suspects) == any(row.started_at for row in held)
    assert {job.idx for job in found if job.claim_no > 1} == {row.idx for row in held}
    if point == "after the claim":
        assert held
        assert not suspects
    if point == "after the record is committed":
        assert any(job.claim_no == 1 for job in found)


@pytest.mark.slow
def test_a_killed_engine_is_replaced_in_seconds(farm: FarmUnderFire) -> None:
    batch = farm.farm.submit([f"engine {i}" for i in range(60)], model=LANE.model)
    farm.wait_for(lambda: farm.farm.status(batch.id).counts["succeeded"] >= 8, "some work", 30)
    (worker,) = [process for name, process in farm.alive.items() if name == "worker-0"]
    engine = engine_of(worker)
    assert engine
    session = _session(farm, worker.pid)
    engine.kill()
    killed, held = time.monotonic(), _held(farm, session)
    with suppress(TimeoutError):
        farm.wait_for(lambda: all(_again(farm, *one) for one in held), "its jobs again", 30)
    took = time.monotonic() - killed
    farm.wait_for(lambda: farm.farm.status(batch.id).done, "the rest", 60)
    print(f"engine killed: {len(held)} jobs ran again after {took:.1f} s, its load included")
    assert held
    assert took < SPARE_S
    assert not audit(farm.farm, [batch.id], {}, LANE).wrong


def _swept(farm: FarmUnderFire) -> int:
    """How often the dispatchers have said that they removed pictures of no job."""
    logs = farm.home.glob("dispatcher-*.log")
    return sum(log.read_text().count("objects that no job names: ") for log in logs)


def _session(farm: FarmUnderFire, pid: int) -> str:
    with farm.farm.db.read() as connection:
        query = select(sessions.c.id).where(sessions.c.pid == pid, sessions.c.closed_at.is_(None))
        return str(connection.scalars(query).one())


def _held(farm: FarmUnderFire, session: str) -> list[Any]:
    with farm.farm.db.read() as connection:
        columns = (jobs.c.batch_id, jobs.c.idx, jobs.c.claim_no, jobs.c.started_at)
        return list(connection.execute(select(*columns).where(jobs.c.session_id == session)))


def _elsewhere(farm: FarmUnderFire, batch_id: str, idx: int, claim_no: int, _: object) -> bool:
    """Whether another has claimed the job since, or rendered it."""
    return farm.farm.job(f"{batch_id}/{idx}").claim_no > claim_no


def _again(farm: FarmUnderFire, batch_id: str, idx: int, claim_no: int, _: object) -> bool:
    job = farm.farm.job(f"{batch_id}/{idx}")
    return job.claim_no > claim_no or job.state == "succeeded"
