"""What is around the farm goes away, fills up or falls silent: nothing fails, all goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import func, select

from farm.store.tables import sessions
from tests.chaos.outage import s3_outage_run
from tests.farm_kit import FarmKit, until
from tests.servers import PostgresServer, RedisServer, S3Server

MODEL = "fake-one"
OUTAGE_S = float(os.environ.get("CHAOS_OUTAGE_S", "10"))  # 60 is what was promised


@pytest.mark.slow
@pytest.mark.parametrize(
    ("database", "kind", "settings"),
    [
        ("postgres", "down", {}),
        ("sqlite", "silent", {}),
        ("sqlite", "down", {"spool_max": "200KB"}),  # about 16 pictures
    ],
    ids=["down", "silent", "spool full"],
)
def test_an_outage_of_the_blob_store_repeats_no_render_and_fails_no_job(
    tmp_path: Path,
    redis_server: RedisServer,
    s3_server: S3Server,
    postgres_server: PostgresServer,
    database: str,
    kind: Literal["down", "silent"],
    settings: dict[str, Any],
) -> None:
    for server in (redis_server, s3_server, postgres_server):
        server.start()
    redis_server.flushall()
    postgres = postgres_server if database == "postgres" else None
    told = s3_outage_run(
        OUTAGE_S, tmp_path / "home", redis_server, s3_server, postgres, kind, **settings
    )
    print(told.text())
    assert (told.rendered, told.claims) == (told.jobs, told.jobs)
    assert (told.failures, told.given_back, told.wrong) == (0, 0, [])
    assert told.during > 0
    if kind == "down":
        assert told.most_held > 0
        assert "is the server running" in told.says


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_worker_that_ends_in_an_outage_leaves_its_pictures_to_the_next(
    tmp_path: Path, redis_url: str, s3_server: S3Server, s3_bucket: str, how: signal.Signals
) -> None:
    n, store = 60, f"s3://{s3_bucket}"
    with FarmKit(tmp_path / "home", redis_url, blobs_url=store, s3=s3_server.options()) as kit:
        kit.dispatcher()
        first = kit.worker()
        s3_server.kill()
        batch = kit.farm.submit([f"picture {i}" for i in range(n)], model=MODEL)
        until(lambda: _spooled(kit) >= n // 2, 60)
        first.send_signal(how)
        assert first.wait(30) == (0 if how == signal.SIGTERM else -9)
        found = len(list((kit.home / "spool").glob("*/*/[!.]*-*-*")))
        assert found >= n // 2
        second = kit.worker()
        s3_server.start()
        status = kit.farm.wait(batch.id, 60)
        assert status.counts["succeeded"] == n
        again = _rendered_by(kit, second)
        print(f"{how.name}: {found} pictures in the spool, {again} of {n} rendered by the next")
        assert again == n - found
        assert not list((kit.home / "spool").glob("*/*/[!.]*-*-*"))
        kit.assert_whole(batch.id)
        if how == signal.SIGTERM:
            assert all(job.failures == 0 for job in kit.farm.jobs(batch.id))


def _spooled(kit: FarmKit) -> int:
    return sum(worker.spooled for worker in kit.farm.workers())


def _rendered_by(kit: FarmKit, worker: subprocess.Popen[bytes]) -> int:
    """As its session tells at its end."""
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    with kit.farm.db.read() as connection:
        mine = select(sessions.c.rendered).where(sessions.c.pid == worker.pid)
        return connection.scalars(mine).one()


def test_work_goes_on_while_redis_is_full_read_only_or_gone(
    tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        kit.dispatcher()
        worker = kit.worker()
        for trouble, ends in (
            (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
            (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
            ((), ()),
        ):
            name = " ".join(trouble) or "killed"
            if trouble:
                redis_server.command(*trouble)
                redis_server.command("CLIENT", "KILL", "TYPE", "normal")
            else:
                redis_server.kill()
            try:
                meanwhile = kit.farm.submit([f"{name}: meanwhile"], model=MODEL)
                assert kit.farm.wait(meanwhile.id, 30).counts["succeeded"] == 1, name
            finally:
                redis_server.start()
                if ends:
                    redis_server.command(*ends)
            after = kit.farm.submit([f"{name}: after"], model=MODEL)
            assert kit.farm.wait(after.id, 30).counts["succeeded"] == 1, name
            assert worker.poll() is None
        said = kit.log("worker-fake-one").splitlines()
        assert len(said) < 200, "it does not repeat itself all the time"


def _sessions(kit: FarmKit) -> int:
    with kit.farm.db.read() as connection:
        return connection.scalar(select(func.count()).select_from(sessions)) or 0


@pytest.mark.parametrize("part", ["consumer", "process"])
def test_a_worker_that_hears_no_token_works_on_and_mends_itself(
    tmp_path: Path, redis_url: str, part: str
) -> None:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        words = ("--model", MODEL, "--engine", "fake")
        worker = kit.run("-m", "tests.chaos.deaf", part, *words, name="deaf")
        until(lambda: worker.pid in kit.live(), 60)
        batch = kit.farm.submit(["a", "b", "c"], model=MODEL)
        assert kit.farm.wait(batch.id, 20).counts["succeeded"] == 3, "although it is deaf"
        assert kit.tokens() > 0
        until(lambda: kit.tokens() == 0, 60)
        log = kit.log("deaf")
        assert "the consumer is restarted" in log
        assert ("the worker starts anew" in log) == (part == "process")
        assert worker.poll() is None
        until(lambda: worker.pid in kit.live(), 30)
        assert _sessions(kit) == (2 if part == "process" else 1)
        again = kit.farm.submit(["d"], model=MODEL)
        assert kit.farm.wait(again.id, 20).counts["succeeded"] == 1
