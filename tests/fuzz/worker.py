"""A worker under bad messages, bad rows and hostile jobs: it lives, and each job ends as it should.

The worker and its engine are real processes, with Redis and SQL. Each case asks for something bad,
then waits until its jobs are in a final state: `succeeded` with a picture of the right name, size
and hash, or `failed` with a code.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import redis
from PIL import Image
from sqlalchemy import text

from farm.broker import TASK
from farm.catalog import Lane
from farm.errors import Invalid
from farm.results import file_name
from farm.states import JobState
from farm.store import batches
from tests import servers
from tests.farm_kit import FarmKit
from tests.fuzz import jobs as submits
from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.store_kit import Kit, spec

LANE = Lane("fake-fast", "fake")
DONE_S = 15.0
SLOW_S = 20.0  # other processes have a part in it


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    with servers.RedisServer() as server, FarmKit(data, server.url, tick_s=0.1) as kit:
        kit.dispatcher()
        (data / "list.txt").write_text("red\nblue\n")
        link = redis.Redis.from_url(server.client_url)
        worker = [kit.worker(*LANE)]

        def judge(case: Case) -> str:
            kind = case.rng.choice((_message, _message, _row, _row, _row, _jobs))
            outcome = kind(case, kit, link, data)
            if worker[0].poll() is not None:
                told = kit.log("worker-fake-fast")[-3_000:]
                worker[0] = kit.worker(*LANE)
                raise Finding(f"the worker ended:\n{told}")
            return outcome

        yield judge
        link.close()
        _ended_well(worker[0])


def _ended_well(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    if code := worker.wait(60):
        raise Finding(f"the worker ended with {code}")


# ---- messages


def _message(case: Case, kit: FarmKit, link: Any, data: Path) -> str:
    """A message that no farm sends; the job after it is rendered."""
    sent = message(case.rng)
    case.told = f"the message {sent[:2_000]!r}"
    link.lpush(f"farm:{LANE.queue}", *([sent] * case.rng.choice((1, 1, 5))))
    batch = kit.farm.submit([f"after case {case.rng.random()}"], model=LANE.model)
    _settle(kit, batch.id)
    if kit.farm.status(batch.id).counts["succeeded"] != 1:
        raise Finding("a good job was not rendered")
    return "message dropped"


def message(rng: Random) -> bytes:
    """A message as kombu makes them, with parts changed, taken away or put in; or broken bytes."""
    body: Any = [[], dict(LANE._asdict()), {"callbacks": None, "errbacks": None}]
    if rng.randrange(2):
        body = (
            words.value(rng)
            if rng.randrange(2)
            else [[words.value(rng)], words.row(rng), words.value(rng)]
        )
    raw = json.dumps(body).encode()
    made: dict[str, Any] = {
        "body": base64.b64encode(raw if rng.randrange(8) else words.broken(rng, raw)).decode(),
        "headers": {"task": TASK, "id": "1", "argsrepr": "()", "lang": "py"},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": "a",
            "body_encoding": "base64",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": LANE.queue},
        },
    }
    for _ in range(rng.randrange(3)):
        place = rng.choice((made, made, made.get("headers"), made.get("properties")))
        if not isinstance(place, dict):
            continue
        name = rng.choice((*place, *_HEADERS, words.text(rng)[:50]))
        if rng.randrange(4):
            place[name] = words.value(rng)
        else:
            place.pop(name, None)
    sent = json.dumps(made).encode()
    return words.broken(rng, sent) if rng.randrange(4) == 0 else sent


_HEADERS = (
    "task", "id", "eta", "expires", "retries", "timelimit", "group", "root_id", "compression",
    "shadow", "ignore_result", "replaced_task_nesting", "stamps", "origin", "reply_to",
    "correlation_id", "priority",
)  # fmt: skip


# ---- rows


def _row(case: Case, kit: FarmKit, link: Any, data: Path) -> str:
    """A job whose parameters somebody has changed in SQL: failed with a code, never rendered."""
    store = Kit(kit.farm.db)
    good = spec("a red circle", model=LANE.model, seed=case.rng.randrange(2**31))
    batch = store.batch(good, good.model_copy(update={"width": 128}), ready=False)
    changes = changed(case.rng)
    case.told = f"{batch}: {changes}"
    with kit.farm.db.write() as connection:
        for table, value in changes.items():
            change = f"UPDATE {table} SET params = :value WHERE {_ID[table]} = :batch"
            connection.execute(text(change), {"value": value, "batch": batch})
        batches.release(connection, batch, 2)
    _settle(kit, batch)
    counts = kit.farm.status(batch).counts
    return f"row: {counts['failed']} of 2 failed"


_ID = {"jobs": "batch_id", "batches": "id"}


def changed(rng: Random) -> dict[str, str]:
    """What the JSON columns of jobs and batch become."""
    found = {}
    for table in rng.sample(list(_ID), rng.randrange(1, 3)):
        kind = rng.randrange(3)
        if kind == 0:
            value = words.value(rng)
        elif kind == 1:
            value = {n: v for n, v in words.row(rng, 0.8).items() if n not in ("prompt", "n")}
        else:
            value = spec().model_dump(mode="json", exclude={"prompt", "seed", "engine", "model"})
            value[rng.choice((*value, words.text(rng)[:50]))] = words.value(rng)
            value.pop(rng.choice((*value, "")), None)
        found[table] = json.dumps(value)
    return found


# ---- jobs


def _jobs(case: Case, kit: FarmKit, link: Any, data: Path) -> str:
    """Whatever may be submitted is rendered, or fails with a code."""
    try:
        items, options = submits.asked(case.rng, data)
        options |= {"model": LANE.model, "width": 64, "height": 64, "steps": 1, "expires_s": None}
        case.told = f"{items!r} {options!r}"
        batch = kit.farm.submit(items, **options)
    except Invalid as error:
        return f"refused {error.code}"
    if batch.total > 64 or any(name != LANE.model for name in batch.by_model):
        kit.farm.cancel(batch.id)
        return "cancelled"
    _settle(kit, batch.id)
    return "rendered"


# ---- what must hold


def _settle(kit: FarmKit, batch_id: str) -> None:
    """Soon the batch is done, and its pictures and errors are as they should be."""
    try:
        kit.farm.wait(batch_id, DONE_S)
    except TimeoutError as error:
        kit.farm.cancel(batch_id)  # the next case begins without it
        raise Finding(f"{error}\n{kit.log('worker-fake-fast')[-3_000:]}") from None
    Kit(kit.farm.db).states(batch_id)
    for job in kit.farm.jobs(batch_id):
        if job.state == JobState.FAILED:
            if not (job.error_code or "").startswith("ERR_") or not job.error:
                raise Finding(f"{job.id} failed with {job.error_code!r}, {job.error!r}")
            continue
        with Image.open(io.BytesIO(kit.farm.fetch(job))) as picture:
            size, form = (job.spec["width"], job.spec["height"]), job.spec["format"].upper()
            if (picture.size, picture.format) != (size, form):
                raise Finding(f"{job.id}: {picture.format} of {picture.size}")
        if Path(file_name(job)).name != file_name(job):
            raise Finding(f"{job.id} would be downloaded as {file_name(job)!r}")
