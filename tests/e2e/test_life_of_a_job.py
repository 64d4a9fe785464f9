"""The way of a job through real processes: Redis, SQL, pictures, a dispatcher and workers.

The engine is the fake one, so that what is timed and killed is the farm; the real engines have
tests of their own beside this file.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from farm.store.ids import JobRef
from tests.farm_kit import FarmKit, engine_child, until
from tests.servers import PostgresServer, RedisServer, S3Server, has_ended


@pytest.fixture
def kit(tmp_path: Path, redis_url: str, database_url: str) -> Iterator[FarmKit]:
    with FarmKit(tmp_path / "home", redis_url, database_url=database_url) as kit:
        yield kit


@pytest.fixture
def sqlite_kit(tmp_path: Path, redis_url: str) -> Iterator[FarmKit]:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        yield kit


def test_prompts_in_pictures_out(kit: FarmKit) -> None:
    kit.dispatcher()
    kit.worker()
    batch = kit.farm.submit(["one", "two", {"prompt": "three", "format": "webp"}], n=2,
                            model="fake-one")  # fmt: skip
    status = kit.farm.wait(batch.id, 30)
    assert status.counts["succeeded"] == status.total == 6
    kit.assert_whole(batch.id)
    out = kit.home / "out"
    assert kit.farm.download(batch.id, out) == 6
    names = sorted(path.name for path in out.iterdir())
    endings = [name.removeprefix(batch.id) for name in names]
    assert endings == ["-0000000.png", "-0000001.png", "-0000002.png", "-0000003.png",
                       "-0000004.webp", "-0000005.webp", ".jsonl"]  # fmt: skip
    rows = [json.loads(line) for line in (out / f"{batch.id}.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one"] * 2 + ["two"] * 2 + ["three"] * 2
    assert kit.farm.contact_sheet(batch.id, kit.home / "sheet.png") == 6


def test_work_that_waits_is_found_by_a_worker_that_comes_later(kit: FarmKit) -> None:
    batch = kit.farm.submit(["early"], model="fake-one")
    assert kit.tokens() == 0
    kit.worker()
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 1


def test_ten_thousand_lines_a_few_tokens_and_a_flush(
    kit: FarmKit, tmp_path: Path, redis_server: RedisServer
) -> None:
    path = tmp_path / "prompts.jsonl"
    with path.open("w") as file:
        for i in range(10_000):
            file.write(json.dumps({"prompt": f"prompt {i}", "seed": i}) + "\n")
    kit.dispatcher()
    for _ in range(2):
        kit.worker("fake-fast")
    batch = kit.farm.submit_file(path, model="fake-fast")
    assert batch.total == 10_000
    seen = looks = 0
    flushed = False
    for status in kit.farm.watch(batch.id, poll_s=0.05):
        assert sum(status.counts.values()) == 10_000
        seen, looks = max(seen, kit.tokens("fake-fast")), looks + 1
        if not flushed and status.counts["succeeded"] > 1_000:
            redis_server.flushall()
            flushed = True
    assert flushed
    assert looks > 10
    assert status.counts["succeeded"] == 10_000
    # 2 workers want 4; the client, the dispatcher and each worker may top up at the same moment
    assert seen <= 4 * 4, "Redis holds a few tokens, never the jobs"
    kit.assert_whole(batch.id)
    assert all(job.claim_no == 1 for job in kit.farm.jobs(batch.id)), "each was rendered once"


def test_flush_while_idle_loses_nothing(kit: FarmKit, redis_server: RedisServer) -> None:
    kit.dispatcher()
    worker = kit.worker()
    worker.send_signal(signal.SIGSTOP)
    batch = kit.farm.submit([f"p{i}" for i in range(50)], model="fake-one")
    redis_server.flushall()
    worker.send_signal(signal.SIGCONT)
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 50


@pytest.mark.parametrize("victim", ["child", "worker"])
def test_kill_during_a_render(kit: FarmKit, victim: str) -> None:
    aside = kit.home / "aside"
    aside.mkdir()
    kit.env["TMPDIR"] = str(aside)
    kit.dispatcher()
    worker = kit.worker()
    batch = kit.farm.submit([{"prompt": f"p{i}", "steps": 60} for i in range(40)], model="fake-one")
    until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 4, 30)
    if victim == "child":
        engine_child(worker).kill()
    else:
        child = engine_child(worker)
        worker.kill()
        until(lambda: has_ended(child), 30)
        worker.wait(30)
        kit.worker()
    assert len(list(aside.glob("farm-worker-*"))) == 1, "what a killed worker left is gone"
    status = kit.farm.wait(batch.id, 60)
    assert status.counts["succeeded"] == 40
    kit.assert_whole(batch.id, orphans=victim == "worker")
    assert any(kit.farm.history(job.ref) for job in kit.farm.jobs(batch.id)), "it was noticed"
    retried = [j for j in kit.farm.jobs(batch.id) if j.failures]
    assert len(retried) <= 4, "only the jobs whose render had begun are suspects"
    assert retried or victim == "child"  # which may end between two micro-batches
    for job in retried:
        codes = {event["code"] for event in kit.farm.history(job.ref)}
        assert codes <= {"ERR_ENGINE_KILLED", "ERR_WORKER_LOST"}


def test_a_succeeded_job_always_has_its_object(kit: FarmKit) -> None:
    """Look while workers are killed: a succeeded row without its object is never seen."""
    kit.dispatcher()
    batch = kit.farm.submit([f"p{i}" for i in range(200)], model="fake-one")
    for _ in range(3):
        worker = kit.worker()
        before = kit.farm.status(batch.id).counts["succeeded"]
        until(lambda b=before: kit.farm.status(batch.id).counts["succeeded"] >= b + 20, 30)  # type: ignore[misc]
        for job in kit.farm.pictures(batch.id):
            assert job.object_key
            assert kit.farm.blobs.stat(job.object_key)
        worker.kill()
        worker.wait(30)
    kit.worker()
    assert kit.farm.wait(batch.id, 60).counts["succeeded"] == 200


def test_sigterm_drains_and_counts_no_failure(kit: FarmKit) -> None:
    worker = kit.worker()
    batch = kit.farm.submit([{"prompt": f"p{i}", "steps": 40} for i in range(200)],
                            model="fake-one")  # fmt: skip
    until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 8, 30)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    status = kit.farm.status(batch.id)
    assert status.counts["running"] == status.counts["failed"] == 0
    assert status.counts["queued"] > 0
    assert all(job.failures == 0 for job in kit.farm.jobs(batch.id))
    assert kit.farm.workers() == []
    kit.assert_whole(batch.id)


def test_sigterm_longer_than_the_grace_gives_the_job_back(tmp_path: Path, redis_url: str) -> None:
    with FarmKit(tmp_path / "home", redis_url, shutdown_grace_s=0.5) as kit:
        worker = kit.worker("fake-slow")
        batch = kit.farm.submit([{"prompt": "long", "steps": 500}], model="fake-slow")
        until(lambda: kit.farm.job(f"{batch.id}/0").started_at is not None, 30)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        job = kit.farm.job(JobRef(batch.id, 0))
        assert (job.state, job.failures) == ("queued", 0)


def test_cancel_is_seen_between_steps(sqlite_kit: FarmKit) -> None:
    kit = sqlite_kit
    kit.worker("fake-slow")
    batch = kit.farm.submit([{"prompt": "long", "steps": 500}, "next"], model="fake-slow")
    until(lambda: kit.farm.job(f"{batch.id}/0").progress > 0, 30)
    began = time.monotonic()
    assert kit.farm.cancel(batch.id, 0) == (0, 1)
    until(lambda: kit.farm.job(f"{batch.id}/0").state == "cancelled", 30)
    assert time.monotonic() - began < 15, "50 s of steps were left"
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 1


def test_a_poison_job_is_failed_with_its_evidence_and_the_others_succeed(kit: FarmKit) -> None:
    kit.dispatcher()
    kit.worker()
    prompts = [f"good {i}" for i in range(10)]
    prompts.insert(3, "!crash")
    batch = kit.farm.submit(prompts, model="fake-one")
    status = kit.farm.wait(batch.id, 90)
    assert status.counts["succeeded"] == 10
    assert status.counts["failed"] == 1
    poison = kit.farm.job(f"{batch.id}/3")
    assert (poison.error_code, poison.failures) == ("ERR_ENGINE_CRASHED", 2)
    assert "SIGABRT" in (poison.error or "")
    assert kit.farm.retry(batch.id, code="ERR_RENDER_FAILED") == 0


def test_a_worker_whose_session_was_lost_records_nothing(sqlite_kit: FarmKit) -> None:
    """A ghost: stopped for longer than its lease, then awake again."""
    kit = sqlite_kit
    kit.dispatcher()
    ghost = kit.worker("fake-slow")
    batch = kit.farm.submit(["a"], model="fake-slow")
    until(lambda: kit.farm.job(f"{batch.id}/0").started_at is not None, 30)
    child = engine_child(ghost)

    def is_asleep() -> bool:
        """Stopped, but not within a transaction: SQLite has one writer, the farm would wait."""
        for process in (ghost, child):
            process.send_signal(signal.SIGSTOP)
        with closing(sqlite3.connect(kit.home / "farm.db", timeout=1)) as probe:
            try:
                probe.execute("BEGIN IMMEDIATE")
                return True
            except sqlite3.OperationalError:
                for process in (child, ghost):
                    process.send_signal(signal.SIGCONT)
                return False

    until(is_asleep, 30)
    until(lambda: kit.farm.job(f"{batch.id}/0").state == "queued", 30)
    kit.worker("fake-slow")
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 1
    done = kit.farm.job(f"{batch.id}/0")
    for process in (child, ghost):
        process.send_signal(signal.SIGCONT)
    until(lambda: ghost.pid in kit.live(), 30)
    until(lambda: "given to another" in kit.log("worker-fake-slow")
         or "was lost" in kit.log("worker-fake-slow"), 20)  # fmt: skip
    assert kit.farm.job(f"{batch.id}/0") == done
    kit.assert_whole(batch.id)


def test_redis_away_loses_nothing_and_says_so(
    sqlite_kit: FarmKit, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    kit = sqlite_kit
    kit.dispatcher()
    kit.worker()
    assert kit.farm.wait(kit.farm.submit("before", model="fake-one").id, 30).counts["succeeded"]
    redis_server.kill()
    try:
        batch = kit.farm.submit(["during"], model="fake-one")
        assert "does not answer" in caplog.text
        until(lambda: "does not answer" in kit.log("dispatcher"), 30)
        assert kit.farm.wait(batch.id, 60).counts["succeeded"] == 1, "its worker looks for itself"
    finally:
        redis_server.start()
    after = kit.farm.submit(["after"], model="fake-one")
    assert kit.farm.wait(after.id, 60).counts["succeeded"] == 1


def test_database_away_loses_nothing(
    tmp_path: Path, redis_url: str, pg_url: str, postgres_server: PostgresServer
) -> None:
    with FarmKit(tmp_path / "home", redis_url, database_url=pg_url, session_ttl_s=30.0) as kit:
        kit.dispatcher()
        kit.worker()
        batch = kit.farm.submit(
            [{"prompt": f"p{i}", "steps": 40} for i in range(60)], model="fake-one"
        )
        until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 4, 30)
        postgres_server.stop()
        try:
            until(lambda: "does not answer" in kit.log("dispatcher"), 30)
            away = subprocess.run(
                [sys.executable, "-m", "farm", "status"], env=kit.env, capture_output=True,
                text=True, timeout=60, check=False,
            )  # fmt: skip
            assert away.returncode == 1
            assert "does not answer" in away.stderr
        finally:
            postgres_server.start()
        status = kit.farm.wait(batch.id, 90)
        assert status.counts["succeeded"] == 60
        assert all(job.failures == 0 for job in kit.farm.jobs(batch.id))
        kit.assert_whole(batch.id)


def test_s3_away_holds_the_pictures_and_goes_on(
    tmp_path: Path, redis_url: str, s3_server: S3Server, s3_bucket: str
) -> None:
    with FarmKit(
        tmp_path / "home", redis_url, blobs_url=f"s3://{s3_bucket}/farm", s3=s3_server.options()
    ) as kit:
        kit.dispatcher()
        kit.worker()
        batch = kit.farm.submit(
            [{"prompt": f"p{i}", "steps": 40} for i in range(60)], model="fake-one"
        )
        until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 4, 30)
        s3_server.stop()
        try:
            until(lambda: "cannot write" in kit.log("worker-fake-one"), 30)
        finally:
            s3_server.start()
        status = kit.farm.wait(batch.id, 90)
        assert status.counts["succeeded"] == 60
        kit.assert_whole(batch.id)


def test_a_worker_without_its_model_says_which_file_and_takes_no_job(
    tmp_path: Path, redis_url: str
) -> None:
    models = '[models.gone]\nlicence = "none"\n[models.gone.engines.diffusers]\npath = "nowhere"\n'
    with FarmKit(tmp_path / "home", redis_url, models=models) as kit:
        batch = kit.farm.submit("x", model="gone")
        worker = kit.worker("gone", "diffusers", wait_s=0)
        assert worker.wait(60) == 1
        assert "nowhere" in kit.log("worker-gone")
        assert "ERR_MODEL_NOT_LOADED" in kit.log("worker-gone")
        assert "Traceback" not in kit.log("worker-gone")
        assert kit.farm.status(batch.id).counts["queued"] == 1


@pytest.mark.parametrize("away", ["s3", "postgres"])
def test_sigterm_while_something_is_away_ends_in_time(
    tmp_path: Path,
    redis_url: str,
    pg_url: str,
    postgres_server: PostgresServer,
    s3_server: S3Server,
    s3_bucket: str,
    away: str,
) -> None:
    server = s3_server if away == "s3" else postgres_server
    with FarmKit(
        tmp_path / "home",
        redis_url,
        database_url=pg_url,
        blobs_url=f"s3://{s3_bucket}/farm",
        s3=s3_server.options(),
        shutdown_grace_s=2.0,
    ) as kit:
        worker = kit.worker()
        batch = kit.farm.submit(
            [{"prompt": f"p{i}", "steps": 40} for i in range(60)], model="fake-one"
        )
        until(lambda: kit.farm.status(batch.id).counts["succeeded"] >= 4, 30)
        server.stop()
        try:
            worker.send_signal(signal.SIGTERM)
            worker.wait(2 + 8 + 5)
        finally:
            server.start()
        kit.dispatcher()
        until(lambda: kit.farm.status(batch.id).counts["running"] == 0, 30)
        if away == "s3":
            assert all(job.failures == 0 for job in kit.farm.jobs(batch.id))
        kit.worker()
        assert kit.farm.wait(batch.id, 60).counts["succeeded"] == 60
        # left behind: what was stored when the answer was lost or no record could be written
        kit.assert_whole(batch.id, orphans=True)
