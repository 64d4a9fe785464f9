"""Submitting a large prompt file: beside the raw rows, and beside plain Celery, a message a prompt.

A process of its own reads, checks, inserts and counts a jsonl of prompts and seeds, and tells its
peak memory. The raw way is COPY on PostgreSQL and executemany on SQLite, of the same rows into the
same table in the same chunks, and reads and checks nothing. Celery is `apply_async` in a loop, of
fewer prompts, scaled. The first job of an eager submit is timed from the start of its process, on a
farm with a worker that waits.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from celery import Celery

from farm.catalog import load_catalog
from farm.config import Settings
from farm.prompt_files import read_rows
from farm.prompts import Defaults, make_jobs
from farm.service import Farm
from farm.spec import NewJob
from farm.store import batches
from farm.store.intake import COLUMNS as JOB_COLUMNS
from farm.submitting import CHUNK
from tests.farm_kit import FarmKit, until
from tests.servers import PostgresServer, RedisServer

COLUMNS = (
    "submit of a jsonl", "the farm", "raw rows", "ratio", "Celery, scaled", "times faster",
    "peak memory", "eager: the first job after",
)  # fmt: skip
CELERY_PROMPTS = 20_000
MODEL = "fake-fast"


def submit(home: Path, rows: int) -> list[tuple[str, ...]]:
    """A row of the table for SQLite and one for PostgreSQL."""
    home.mkdir(parents=True)
    path = home / "prompts.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            row = {"prompt": f"a photo of a small red house number {i} by the sea", "seed": i}
            file.write(json.dumps(row) + "\n")
    with ExitStack() as stack:
        broker = stack.enter_context(RedisServer())
        postgres = stack.enter_context(PostgresServer())
        return [
            _row(home / name, name, path, rows, broker, url)
            for name, url in (("SQLite", None), ("PostgreSQL", postgres.create_database()))
        ]


def _row(
    home: Path, name: str, path: Path, rows: int, broker: RedisServer, url: str | None
) -> tuple[str, ...]:
    with FarmKit(home, broker.url, database_url=url) as kit:
        farm_s, peak = _submitted(kit, path, rows)
        raw_s = _raw(kit.farm, path)
        celery_s = _celery(broker, path, rows)
        eager_s = _eager(kit, path)
    return (
        f"{rows:,} rows, {name}", f"{farm_s:.1f} s", f"{raw_s:.1f} s", f"{farm_s / raw_s:.2f}",
        f"{celery_s:.0f} s", f"{celery_s / farm_s:.0f}", f"{peak / 2**20:.0f} MiB",
        f"{eager_s:.2f} s",
    )  # fmt: skip


def _submitted(kit: FarmKit, path: Path, rows: int) -> tuple[float, int]:
    """Seconds in the submitting process, and its peak memory in bytes."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.submit", str(path)],
        env=kit.env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(told.stdout)
    assert found["total"] == rows
    return found["seconds"], found["peak"]


def main(path: str) -> None:
    """In the submitting process."""
    with Farm(Settings()) as farm:
        began = time.monotonic()
        total = farm.submit_file(path, model=MODEL).total
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"total": total, "seconds": seconds, "peak": peak}))


def _raw(farm: Farm, path: Path) -> float:
    """The rows stand ready in memory; only their way into the table is timed, chunk by chunk."""
    catalog = load_catalog(farm.settings.catalog_path)
    with farm.db.write() as connection:
        batch = batches.create(connection, {}, name="raw", owner="", priority=0)
    names, seconds, first = ", ".join(JOB_COLUMNS), 0.0, 0
    with path.open("rb") as file:
        jobs = make_jobs(read_rows(file, "jsonl"), Defaults({"model": MODEL}), catalog)
        while chunk := list(islice(jobs, CHUNK)):
            rows = [_raw_row(batch, first + i, job) for i, job in enumerate(chunk)]
            text = "".join("\t".join(map(_cell, row)) + "\n" for row in rows)
            began = time.monotonic()
            with farm.db.write() as connection:
                driver: Any = connection.connection.driver_connection
                if farm.db.dialect == "postgresql":
                    statement = f"COPY jobs ({names}) FROM STDIN"
                    with driver.cursor() as cursor, cursor.copy(statement) as copy:
                        copy.write(text)
                else:
                    marks = ", ".join("?" * len(JOB_COLUMNS))
                    driver.executemany(f"INSERT INTO jobs ({names}) VALUES ({marks})", rows)
            seconds += time.monotonic() - began
            first += len(chunk)
    return seconds


def _raw_row(batch: str, idx: int, job: Any) -> tuple[Any, ...]:
    assert isinstance(job, NewJob)
    return (batch, idx, MODEL, "", job.shape.key, job.prompt, "", job.seed, None)


def _cell(value: Any) -> str:
    return "\\N" if value is None else str(value)


def _celery(broker: RedisServer, path: Path, rows: int) -> float:
    """`apply_async` of the first prompts, one by one; seconds for all rows at that pace."""
    app = Celery(broker=broker.url, set_as_current=False)
    app.conf.task_ignore_result = True

    @app.task(name="render")
    def render(**row: Any) -> None:
        pass

    with path.open() as file:
        wanted = [json.loads(line) for line in islice(file, CELERY_PROMPTS)]
    render.apply_async(kwargs=wanted[0])
    began = time.monotonic()
    for row in wanted:
        render.apply_async(kwargs=row)
    seconds = time.monotonic() - began
    app.close()
    broker.flushall()
    return seconds * rows / len(wanted)


def _eager(kit: FarmKit, path: Path) -> float:
    """From the start of `farm submit --eager` until its first job has begun to render."""
    for batch in kit.farm.batches():
        kit.farm.pause(batch.id)
    kit.dispatcher()
    kit.worker(MODEL)
    kit.farm.wait(kit.farm.submit("warm", model=MODEL).id, 60)
    known = {batch.id for batch in kit.farm.batches()}
    began = time.time()
    argv = ["-m", "farm", "submit", "--file", str(path), "--eager", "--model", MODEL]
    process = kit.run(*argv, name="eager")
    found: list[float] = []

    def started() -> bool:
        new = [batch for batch in kit.farm.batches() if batch.id not in known]
        found.extend(batch.started_at for batch in new if batch.started_at)
        return bool(found)

    until(started, 60)
    process.kill()
    process.wait()
    return found[0] - began


if __name__ == "__main__":
    main(sys.argv[1])
