"""One job that aborts the engine each time, among many that do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.chaos.audit import audit
from tests.chaos.farm_under_fire import LANE, FarmUnderFire
from tests.servers import PostgresServer, RedisServer, S3Server

GOOD = 200


@pytest.mark.slow
def test_a_poison_job_is_failed_with_its_evidence_and_two_hundred_others_succeed(
    tmp_path: Path,
    redis_server: RedisServer,
    s3_server: S3Server,
    postgres_server: PostgresServer,
) -> None:
    for server in (redis_server, s3_server, postgres_server):
        server.start()
    redis_server.flushall()
    with FarmUnderFire(
        tmp_path / "home", redis_server, s3_server, postgres_server, max_failures=3
    ) as farm:
        farm.start()
        _timed(farm, "warm", 60)  # speeds are measured now, and bundles have their size
        clean_s, _ = _timed(farm, "good", GOOD)
        poisoned_s, batch_id = _timed(farm, "beside poison", GOOD, poison_at=GOOD // 3)
        print(f"{GOOD} jobs: {clean_s:.1f} s without and {poisoned_s:.1f} s with one poison job: "
              f"{poisoned_s - clean_s:+.1f} s, {poisoned_s / clean_s:.2f} times")  # fmt: skip
        job = farm.farm.job(f"{batch_id}/{GOOD // 3}")
        assert (job.state, job.error_code, job.failures) == ("failed", "ERR_ENGINE_CRASHED", 2)
        assert "SIGABRT" in (job.error or "")
        assert "asked to crash" in (job.error or "")
        counts = farm.farm.status(batch_id).counts
        assert (counts["succeeded"], counts["failed"]) == (GOOD, 1)
        assert all(job.failures <= 1 for job in farm.farm.pictures(batch_id))
        (wrong,) = audit(farm.farm, [batch_id], {}, LANE).wrong
        assert f"{job.id} is failed" in wrong


def _timed(
    farm: FarmUnderFire, name: str, n: int, poison_at: int | None = None
) -> tuple[float, str]:
    prompts = [f"{name} {i}" for i in range(n)]
    if poison_at is not None:
        prompts.insert(poison_at, "!crash")
    began = time.monotonic()
    batch = farm.farm.submit(prompts, model=LANE.model)
    farm.wait_for(lambda: farm.farm.status(batch.id).done, name, 120)
    return time.monotonic() - began, batch.id
