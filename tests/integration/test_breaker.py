"""A worker that fails what it should not: it rests, tests itself, and comes back. And one that does
not rest, for the jobs are to blame."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from farm.catalog import Lane
from farm.cli.follow import tell_unserved
from farm.errors import JobCancelled, JobGivenBack, StorageRefused
from farm.store import sessions
from farm.store.batches import BatchStatus
from farm.store.ids import JobRef
from tests.farm_kit import until
from tests.runner_kit import LANE, LoneRunner
from workers import breaker, runner

MODELS = """
[models.fake-fast]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 1 }}
[models.fake-fast.engines.fake]
options = {{ mood = "{mood}", seconds_per_step = 0.03 }}
"""
UNDER_WAY = 5  # pictures, of 0.03 s, that the engine has begun when its worker stops it
FAST = {"max_failures": 3, "retry_delay_s": 0.0, "session_ttl_s": 2.0}


@contextmanager
def worker(tmp_path: Path, **told: Any) -> Iterator[tuple[LoneRunner, Path]]:
    mood = tmp_path / "mood"
    models = MODELS.format(mood=mood)
    with LoneRunner(tmp_path / "home", models=models, **FAST, **told) as lone:
        yield lone, mood


@contextmanager
def at_work(lone: LoneRunner, batch: BatchStatus) -> Iterator[None]:
    """The worker works in a thread, as long as the body goes on, and until the batch is done."""
    thread = threading.Thread(target=lone.work, args=(batch,))
    thread.start()
    try:
        yield
    except BaseException:
        lone.runner.stop()
        raise
    thread.join(60)
    assert not thread.is_alive()


def told(lone: LoneRunner) -> sessions.Worker:
    """The worker as others see it; they see none for a moment when its beat is late."""
    found: list[sessions.Worker] = []

    def looked() -> bool:
        found[:] = lone.farm.workers()
        return bool(found)

    until(looked, 30)
    (one,) = found
    return one


@pytest.mark.parametrize("mood_word", ["!white", "!fail", "!crash", "!oom"])
def test_a_bad_worker_rests_and_comes_back_when_it_is_well(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, mood_word: str
) -> None:
    monkeypatch.setattr(breaker, "REST_S", 0.5)
    with worker(tmp_path, database_url=database_url) as (lone, mood):
        lone.work(lone.farm.submit(["well"], model="fake-fast"))
        mood.write_text(mood_word)
        batch = lone.farm.submit([f"p{i}" for i in range(30)], model="fake-fast")
        with at_work(lone, batch):
            until(lambda: told(lone).state == "resting", 30)
            until(lambda: "its self-test failed" in told(lone).note, 30)
            until(
                lambda: lone.farm.unserved() == {"fake-fast": lone.farm.status(batch.id).open}, 10
            )
            with lone.farm.db.read() as connection:
                assert sessions.live_lanes(connection) == {}
            mood.unlink()
        done = lone.farm.status(batch.id).counts
        failures = sum(job.failures for job in lone.farm.jobs(batch.id))
        assert 0 < failures <= breaker.MOST_FAILURES + UNDER_WAY
        lost = failures if mood_word == "!oom" else 0  # no worker has more memory
        assert (done["succeeded"], done["failed"]) == (30 - lost, lost)
        until(lambda: told(lone).state == "idle", 30)

        def is_alone() -> bool:
            with lone.farm.db.read() as connection:
                return sessions.live_lanes(connection) == {LANE: 1}

        until(is_alone, 30)


def test_no_healthy_worker_is_lost_to_a_batch_of_bad_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "REST_S", 3600.0)
    with worker(tmp_path) as (lone, _):
        bad = lone.farm.submit([f"!fail {i}" for i in range(20)], model="fake-fast")
        good = lone.farm.submit([f"p{i}" for i in range(20)], model="fake-fast", priority=-1)
        lone.work(good)
        lone.work(bad)
        assert lone.farm.status(bad.id).counts["failed"] == 20
        assert lone.farm.status(good.id).counts["succeeded"] == 20
        lone.work(lone.farm.submit(["well"], model="fake-fast"))  # a picture after the last failure
        until(lambda: told(lone).state == "idle" and not told(lone).note, 30)
        assert {job.failures for job in lone.farm.jobs(bad.id)} == {FAST["max_failures"]}


def test_a_model_that_does_not_load_now_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "REST_S", 0.2)
    with worker(tmp_path) as (lone, mood):
        batch = lone.farm.submit(["!crash", "p1", "p2"], model="fake-fast")
        mood.write_text("!load")
        with at_work(lone, batch):
            until(lambda: "asked not to load" in told(lone).note, 30)
            assert told(lone).state == "resting"
            mood.unlink()
        done = lone.farm.status(batch.id).counts
        assert (done["succeeded"], done["failed"]) == (2, 1)
        assert not lone.runner.broken.is_set()


def test_a_model_whose_files_were_changed_ends_the_worker(tmp_path: Path) -> None:
    with worker(tmp_path) as (lone, _):
        lone.runner._child._files = ("another hash", {})
        batch = lone.farm.submit(["!crash", "p1", "p2"], model="fake-fast")
        lone.runner.work()
        assert lone.runner.broken.is_set()
        until(lambda: lone.farm.status(batch.id).counts["queued"] == 3, 30)


def test_a_rest_is_told_and_a_stop_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(breaker, "REST_S", 3600.0)
    with worker(tmp_path) as (lone, mood):
        mood.write_text("!white")
        lone.farm.submit([f"p{i}" for i in range(30)], model="fake-fast")
        thread = threading.Thread(target=lone.runner.work)
        thread.start()
        until(lambda: lone.farm.unserved() and "its self-test failed" in told(lone).note, 30)
        tell_unserved(lone.farm)
        assert "rests, tests itself in" in " ".join(capsys.readouterr().err.split())
        lone.runner.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_a_worker_whose_upload_hangs_claims_no_more_and_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, first = threading.Event(), threading.Lock()
    with worker(tmp_path, upload_timeout_s=0.3) as (lone, _):
        put = lone.farm.blobs.put

        def hangs_once(*args: Any) -> None:
            if first.acquire(blocking=False):
                assert gate.wait(30)
            put(*args)

        monkeypatch.setattr(lone.farm.blobs, "put", hangs_once)
        lone.runner.work()
        one = lone.farm.submit(["p"], model="fake-fast")
        lone.runner.work()
        until(lambda: "an upload has taken" in told(lone).note, 30)
        assert told(lone).state == "waiting"
        more = lone.farm.submit([f"p{i}" for i in range(5)], model="fake-fast")
        with at_work(lone, more):
            until(lambda: "no more is claimed" in told(lone).note, 30)
            assert lone.farm.status(more.id).counts["queued"] == 5
            gate.set()
        until(lambda: lone.farm.status(one.id).counts["succeeded"] == 1, 30)


def test_a_worker_whom_the_store_refuses_claims_no_more_until_it_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_in = threading.Event()
    with worker(tmp_path) as (lone, _):
        put = lone.farm.blobs.put

        def refuses(*args: Any) -> None:
            if not let_in.is_set():
                raise StorageRefused("wrong credentials")
            put(*args)

        monkeypatch.setattr(lone.farm.blobs, "put", refuses)
        one = lone.farm.submit(["p"], model="fake-fast")
        lone.runner.work()
        until(lambda: "wrong credentials; no more is claimed" in told(lone).note, 30)
        assert told(lone).state == "waiting"
        more = lone.farm.submit([f"p{i}" for i in range(5)], model="fake-fast")
        with at_work(lone, more):
            until(lambda: told(lone).spooled == 1, 30)
            assert lone.farm.status(more.id).counts["queued"] == 5
            let_in.set()
        until(lambda: lone.farm.status(one.id).counts["succeeded"] == 1, 30)


def test_a_lost_session_is_told_once_and_no_job_is_called_cancelled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Lane("fake-slow", "fake")
    with LoneRunner(tmp_path / "home", lane=slow, session_ttl_s=2.0) as lone:
        batch = lone.farm.submit([{"prompt": "p", "steps": 200}], model=slow.model)
        with at_work(lone, batch):
            until(lambda: lone.farm.status(batch.id).counts["running"] == 1, 30)
            until(lambda: told(lone).state == "rendering", 30)
            with lone.farm.db.write() as connection:
                sessions.close(connection, told(lone).id)
        codes = [event["code"] for event in lone.farm.history(JobRef(batch.id, 0))]
        assert codes == [JobGivenBack.code]
    assert JobCancelled.code not in caplog.text
    assert caplog.text.count("was lost; what it held") == 1


def test_a_worker_whose_render_loop_hangs_ends_hard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(runner, "hard_stop", ended.set)
    with worker(tmp_path) as (lone, _):
        lone.runner._stall._limit_s = 0.5
        gate = threading.Event()

        def hangs(*_: object) -> None:
            gate.wait(30)

        monkeypatch.setattr(lone.runner._recorder, "started", hangs)
        batch = lone.farm.submit(["p"], model="fake-fast")
        with at_work(lone, batch):
            assert ended.wait(20)
            gate.set()
