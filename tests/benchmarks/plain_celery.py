"""Plain Celery for the same pictures: one message a job, two commits a job, one worker.

What one writes in an afternoon: a row is marked running, the picture rendered, encoded and stored,
the row marked done. The worker is Celery's fastest kind, `solo`, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from typing import Any

from celery import Celery
from celery.worker import state as celery_state
from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text, bindparam, update

from farm.blobs import BlobStore, open_blobs
from farm.catalog import Weights
from farm.pictures import Origin, encode, sha256
from farm.spec import JobSpec
from farm.store.db import Database
from workers.engine import EngineConfig
from workers.engines.fake_engine import FakeEngine

QUEUE = "plain"
table = Table(
    "plain_jobs",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("prompt", Text, nullable=False),
    Column("state", String(9), nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("object_key", Text),
    Column("sha256", String(64)),
)
_mine = update(table).where(table.c.id == bindparam("job"))
BEGIN = _mine.values(state="running", started_at=bindparam("at"))
END = _mine.values(
    state="succeeded",
    finished_at=bindparam("at"),
    object_key=bindparam("key"),
    sha256=bindparam("digest"),
)


class Discard:
    """A blob store for benchmarks: what is put is gone."""

    def put(self, key: str, data: bytes, content_type: str) -> None:
        pass

    def close(self) -> None:
        pass


def run(broker_url: str, database_url: str, blobs_url: str, spec: JobSpec, jobs: int) -> float:
    """Seconds from the first job's start to the last one's end; the messages wait already."""
    db = Database(database_url)
    table.metadata.drop_all(db.engine)
    table.metadata.create_all(db.engine)
    rows = [{"id": i, "prompt": f"{spec.prompt} {i}", "state": "queued"} for i in range(jobs)]
    with db.write() as connection:
        connection.execute(table.insert(), rows)
    app = _app(broker_url)
    with app.producer_pool.acquire(block=True) as producer:
        for row in rows:
            app.send_task("plain.render", (row["id"],), queue=QUEUE, producer=producer)
    app.close()
    told = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.plain_celery", broker_url, database_url,
         blobs_url, spec.model_dump_json(), str(jobs)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    with db.read() as connection:
        done = connection.execute(table.select().where(table.c.state == "succeeded")).all()
    assert len(done) == jobs, told.stderr
    db.close()
    return float(json.loads(told.stdout.splitlines()[-1]))


def _app(broker_url: str) -> Celery:
    app = Celery("plain", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True, worker_prefetch_multiplier=16, worker_redirect_stdouts=False
    )
    return app


def main(broker_url: str, database_url: str, blobs_url: str, spec_json: str, jobs: str) -> None:
    """In the worker's process: work until all are done, then tell the seconds."""
    app, db = _app(broker_url), Database(database_url)
    blobs: Any = open_blobs(blobs_url) if blobs_url else Discard()
    work = _Work(db, blobs, JobSpec.model_validate_json(spec_json), int(jobs))
    app.task(work.render, name="plain.render", ignore_result=True)
    worker = app.Worker(
        queues=[QUEUE], pool="solo", loglevel="ERROR", without_gossip=True, without_mingle=True,
        without_heartbeat=True, quiet=True,
    )  # fmt: skip
    worker.start()


class _Work:
    def __init__(self, db: Database, blobs: BlobStore, spec: JobSpec, jobs: int) -> None:
        self._db, self._blobs, self._spec, self._left = db, blobs, spec, jobs
        config = EngineConfig("fake", spec.model, Weights())
        self._engine = FakeEngine(config)
        self._origin = Origin("fake", self._engine.load().weights_sha256)
        self._run = uuid.uuid4().hex
        self._began = 0.0

    def render(self, job: int) -> None:
        self._began = self._began or time.monotonic()
        with self._db.write() as connection:
            connection.execute(BEGIN, {"job": job, "at": time.time()})
        spec = self._spec.model_copy(update={"prompt": f"{self._spec.prompt} {job}", "seed": job})
        (pixels,) = self._engine.render([spec], self)
        data = encode(pixels.tobytes(), spec, self._origin)  # type: ignore[union-attr]
        key = f"pictures/{self._run}/{job:07d}.png"
        self._blobs.put(key, data, "image/png")
        told = {"job": job, "at": time.time(), "key": key, "digest": sha256(data)}
        with self._db.write() as connection:
            connection.execute(END, told)
        self._left -= 1
        if not self._left:
            print(json.dumps(time.monotonic() - self._began), flush=True)
            celery_state.should_stop = 0

    def step(self, done: int, total: int) -> None:
        """Nobody watches."""


if __name__ == "__main__":
    main(*sys.argv[1:])
