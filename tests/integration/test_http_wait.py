"""Waiting over HTTP: conditional and long polls, server-sent events, a stop in between."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.http_kit import HttpKit, serving

WAITING = 400


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[HttpKit]:
    with serving(tmp_path, redis_url) as kit:
        yield kit


def test_an_etag_changes_with_the_batch_alone(kit: HttpKit) -> None:
    batch = kit.submit("a", "b")
    path = f"/v1/batches/{batch}"
    etag = kit.http.get(path).headers["etag"]
    same = kit.http.get(path, headers={"If-None-Match": f'"x", {etag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    kit.render(batch, limit=1)
    changed = kit.http.get(path, headers={"If-None-Match": etag})
    assert changed.json()["counts"]["succeeded"] == 1
    job = kit.http.get(f"/v1/jobs/{batch}/0")
    unchanged = {"If-None-Match": job.headers["etag"]}
    assert kit.http.get(f"/v1/jobs/{batch}/0", headers=unchanged).status_code == 304


def test_a_poll_waits_for_a_change_and_no_longer_than_asked(kit: HttpKit) -> None:
    batch = kit.submit("a", "b")
    path = f"/v1/batches/{batch}"
    etag = kit.http.get(path).headers["etag"]
    began = time.monotonic()
    quiet = kit.http.get(path, params={"wait": 0.6}, headers={"If-None-Match": etag})
    assert quiet.status_code == 304
    assert time.monotonic() - began >= 0.6
    with ThreadPoolExecutor(2) as pool:
        change = pool.submit(
            kit.http.get, path, params={"wait": 60}, headers={"If-None-Match": etag}
        )
        end = pool.submit(kit.http.get, path, params={"wait": 60})
        kit.render(batch, limit=1)
        assert change.result().json()["counts"]["queued"] == 1
        assert not end.done()
        kit.render(batch, limit=1)
        assert end.result().json()["done"] is True
    assert time.monotonic() - began < 20
    problem = kit.http.get(path, params={"wait": 61})
    assert problem.status_code == 422


def test_a_job_is_waited_for(kit: HttpKit) -> None:
    batch = kit.submit("a")
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(kit.http.get, f"/v1/jobs/{batch}/0", params={"wait": 20})
        kit.render(batch)
        assert end.result().json()["state"] == "succeeded"


def test_hundreds_wait_and_hold_nobody_up(kit: HttpKit) -> None:
    """More than there are threads (40) and connections (15); looks answer meanwhile."""
    made = [kit.submit("a") for _ in range(20)]

    async def run() -> None:
        limits = httpx.Limits(max_connections=WAITING + 10)
        async with httpx.AsyncClient(base_url=kit.url, timeout=60, limits=limits) as http:
            waiting = [
                asyncio.create_task(http.get(f"/v1/batches/{made[i % 20]}", params={"wait": 50}))
                for i in range(WAITING)
            ]
            took = []
            for _ in range(20):
                began = time.monotonic()
                assert (await http.get(f"/v1/batches/{made[0]}")).status_code == 200
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
            assert sorted(took)[10] < 2
            assert not any(task.done() for task in waiting)
            for batch in made:
                await http.post(f"/v1/batches/{batch}/cancel")
            answers = await asyncio.gather(*waiting)
            assert all(answer.json()["done"] for answer in answers)

    asyncio.run(run())


def test_events_tell_each_change_then_the_end(kit: HttpKit) -> None:
    batch = kit.submit("a", "b")
    path = f"/v1/batches/{batch}/events"
    told = []
    with kit.http.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                told.append(value)
            elif key == "data":
                seen = json.loads(value)["counts"]["succeeded"]
                if told[-1] == "status" and seen < 2:
                    kit.render(batch, limit=1)
            elif key == "id":
                last = value
    assert set(told[:-1]) == {"status"}
    assert len(told) >= 4
    assert (told[-1], seen) == ("done", 2)
    again = kit.http.get(path, headers={"Last-Event-ID": last}).text
    assert again.startswith("event: done")
    assert kit.http.get("/v1/batches/zzzzzzzzzzzzzzzz/events").status_code == 404


def test_a_stop_ends_waits_and_streams(kit: HttpKit) -> None:
    batch = kit.submit("a")
    first = threading.Event()

    def follow() -> str:
        with httpx.stream("GET", f"{kit.url}/v1/batches/{batch}/events", timeout=60) as stream:
            lines = []
            for line in stream.iter_lines():
                lines.append(line)
                first.set()
            return "\n".join(lines)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        wait = pool.submit(kit.http.get, f"/v1/batches/{batch}", params={"wait": 60})
        stream = pool.submit(follow)
        assert first.wait(30)
        kit.server.stop()
        assert wait.result().json()["done"] is False
        assert "event: done" not in stream.result()
    assert time.monotonic() - began < 20
