"""FarmClient on a served farm: it does what Farm does, and raises what Farm raises."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from farm import client as client_room
from farm.client import FarmClient
from farm.errors import (
    AccessDenied,
    BlobNotFound,
    EnvironmentFault,
    InvalidParameter,
    InvalidPromptFile,
    NotFound,
)
from tests.http_kit import HttpKit, png, serving


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[HttpKit]:
    with serving(tmp_path / "home", redis_url, guarded=True) as kit:
        yield kit


@pytest.fixture
def client(kit: HttpKit) -> Iterator[FarmClient]:
    with FarmClient(kit.url, kit.token("admin")) as client:
        yield client


def test_it_submits_as_farm_does(kit: HttpKit, client: FarmClient, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,seed\na,1\nb,2\n")
    made = [
        client.submit("a", n=3, name="x", steps=2),
        client.submit((f"number {i}" for i in range(700)), priority=3),
        client.submit([{"prompt": "a", "seed": 5}, "b"], owner="ada"),
        client.submit_file(path),
        client.submit_file(io.BytesIO(b"a\nb\n"), form="txt", n=2),
    ]
    assert [batch.total for batch in made] == [3, 700, 2, 2, 4]
    assert made == [kit.farm.status(batch.id) for batch in made]
    assert client.batches() == kit.farm.batches()
    assert list(client.jobs(made[1].id)) == list(kit.farm.jobs(made[1].id))
    chosen: Any = {"states": ["queued"], "after": 650}
    found = list(client.jobs(made[1].id, **chosen))
    assert found == list(kit.farm.jobs(made[1].id, **chosen))
    assert len(found) == 49
    assert not list(client.jobs(made[1].id, code="ERR_CANCELLED", within_s=60))
    assert client.job(f"{made[3].id}/1").spec["seed"] == 2


def test_its_failures_are_farms_own(client: FarmClient, kit: HttpKit) -> None:
    with pytest.raises(InvalidPromptFile) as refused:
        client.submit(["a", {"prompt": "b", "width": 3}])
    [fault] = refused.value.errors
    assert (fault.line, fault.field) == (2, "width")
    with pytest.raises(InvalidParameter, match="colour"):
        client.submit("a", colour="red")
    with pytest.raises(NotFound):
        client.status("zzzzzzzzzzzzzzzz")
    with FarmClient(kit.url, "farm_x_y") as stranger, pytest.raises(AccessDenied):
        stranger.batches()


def test_it_waits_watches_and_downloads(kit: HttpKit, client: FarmClient, tmp_path: Path) -> None:
    batch = client.submit(["a", "b", "c"]).id
    with pytest.raises(TimeoutError):
        client.wait(batch, timeout_s=0)
    seen = []
    for status in client.watch(batch):
        seen.append(status.counts["succeeded"])
        kit.render(batch, limit=1)
    assert seen == [0, 1, 2, 3]
    assert client.wait(batch).done
    assert client.download(batch, tmp_path / "out") == 3
    files = sorted((tmp_path / "out").glob("*.png"))
    assert [file.read_bytes() for file in files] == [png(0), png(1), png(2)]
    rows = (tmp_path / "out" / f"{batch}.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["a", "b", "c"]
    kit.farm.blobs.delete(["pictures/" + batch + "/1.png"])
    with pytest.raises(BlobNotFound):
        client.fetch(client.job(f"{batch}/1"))
    assert [worker.model for worker in client.workers()] == ["shapes"] * 4
    assert client.models()[0]["served"]


def test_it_changes_batches(kit: HttpKit, client: FarmClient) -> None:
    batch = client.submit(["a", "b", "c"]).id
    client.pause(batch)
    assert kit.farm.status(batch).paused
    client.pause(batch, False)
    assert client.cancel(batch, 1) == (1, 0)
    assert client.cancel(batch) == (2, 0)
    assert client.retry(batch) == 0
    assert client.retry(batch, cancelled=True) == 3
    key = client.add_input(png(1))
    assert client.submit("a", init_image=f"blob:{key}", strength=0.5).total == 1


def test_an_answer_that_was_lost_makes_no_second_batch(
    kit: HttpKit, client: FarmClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request arrives and its answer does not, twice."""
    monkeypatch.setattr(client_room, "_PAUSES_S", (0, 0, 0))
    plain = client._http.request
    lost = 2

    def request(*args: object, **told: object) -> httpx.Response:
        nonlocal lost
        answer = plain(*args, **told)  # type: ignore[arg-type]
        if lost:
            lost -= 1
            raise httpx.ReadError("connection reset")
        return answer

    monkeypatch.setattr(client._http, "request", request)
    assert client.submit("a").total == 1
    assert lost == 0
    assert len(kit.farm.batches()) == 1


def test_a_server_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_room, "_PAUSES_S", (0,))
    with FarmClient("http://127.0.0.1:9") as client, pytest.raises(EnvironmentFault, match="9"):
        client.batches()


def test_many_threads_share_one_client(client: FarmClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: client.submit(f"number {i}").id, range(24)))
    assert len(set(made)) == 24
