"""How long `GET /v1/batches/ID` takes while workers record pictures, at 1,000 jobs and at many.

The jobs are inserted raw; eight writers claim and record bundles of both batches all the while.
The server is a process of its own, as `farm serve` is; the client is in this one.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx2 as httpx

from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.service import Farm
from farm.spec import JobSpec
from farm.store import batches, jobs, schema, sessions
from farm.store.db import Database
from farm.store.jobs import Picture
from farm.store.tables import counts
from farm.store.tables import jobs as jobs_table
from tests.http_kit import SHAPES
from tests.servers import PostgresServer

COLUMNS = ("status over HTTP, 8 writers", "p50", "p99", "in process p50", "p99")
WRITERS = 8
FEW = 1_000
BUNDLE = 64
PICTURE = Picture("pictures/x.png", "0" * 64, 10, 0.5, "f" * 64)
CHUNK = 50_000
ROOT = Path(__file__).parents[2]


def http(home: Path, many: int, looks: int) -> list[tuple[str, ...]]:
    """Rows of the table, on SQLite and on PostgreSQL."""
    home.mkdir(parents=True)
    rows: list[tuple[str, ...]] = []
    with PostgresServer() as postgres:
        for name, url in (
            ("SQLite", f"sqlite:///{home / 'farm.db'}"),
            ("PostgreSQL", postgres.create_database()),
        ):
            for n, figures in _measured(home, url, (FEW, many), looks).items():
                rows.append((f"{name}, {n:,} jobs", *figures))
    return rows


def _measured(
    home: Path, database_url: str, sizes: tuple[int, ...], looks: int
) -> dict[int, list[str]]:
    """Figures by the batch's size; the looks at one and the other alternate."""
    env = os.environ | {"FARM_HOME": str(home), "FARM_DATABASE_URL": database_url,
                        "FARM_HTTP_RATE": "0"}  # fmt: skip
    settings = Settings(home=home, database_url=database_url)  # type: ignore[arg-type]
    with Farm(settings) as farm, ExitStack() as stack:
        schema.upgrade(farm.db)
        made = {n: _insert(farm, n) for n in sizes}
        if farm.db.dialect == "postgresql":  # else it cleans up after the insert meanwhile
            with farm.db.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.exec_driver_sql("VACUUM ANALYZE")
        http = stack.enter_context(httpx.Client(base_url=stack.enter_context(_served(env))))
        stack.enter_context(_writing(database_url))

        def ask(batch_id: str) -> object:
            return http.get(f"/v1/batches/{batch_id}").raise_for_status()

        told: dict[int, list[str]] = {n: [] for n in sizes}
        for look in (ask, farm.status):
            for n, times in _times(look, made, looks).items():
                told[n] += [f"{times[len(times) // 2] * 1000:.1f} ms"]
                told[n] += [f"{times[int(len(times) * 0.99)] * 1000:.1f} ms"]
    return told


def _times(
    look: Callable[[str], object], made: dict[int, str], looks: int
) -> dict[int, list[float]]:
    """Seconds of each look by the batch's size, sorted; with little pauses, as pollers make."""
    took: dict[int, list[float]] = {n: [] for n in made}
    for _ in range(looks):
        for n, batch_id in made.items():
            began = time.perf_counter()
            look(batch_id)
            took[n].append(time.perf_counter() - began)
            time.sleep(0.002)
    return {n: sorted(times) for n, times in took.items()}


def _insert(farm: Farm, n: int) -> str:
    spec = JobSpec(model="shapes", prompt="x", width=64, height=64, steps=6, guidance_scale=2.0,
                   seed=0)  # fmt: skip
    own = ("prompt", "negative_prompt", "seed", "engine")
    shared = {k: v for k, v in spec.model_dump().items() if k not in own}
    with farm.db.write() as connection:
        batch_id = batches.create(connection, shared, name="", owner="", priority=0)
        connection.execute(counts.insert().values(batch_id=batch_id, model="shapes", queued=n))
    row = {"batch_id": batch_id, "model": "shapes", "key": spec.key, "prompt": "x", "seed": 0}
    for begin in range(0, n, CHUNK):
        with farm.db.write() as connection:
            rows = [row | {"idx": i} for i in range(begin, min(n, begin + CHUNK))]
            connection.execute(jobs_table.insert(), rows)
    with farm.db.write() as connection:
        batches.release(connection, batch_id, n)
    return batch_id


@contextmanager
def _served(env: dict[str, str]) -> Iterator[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "farm", "serve", "--port", "0"],
        cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "farm serve did not start"
            found = re.search(r"http://[\d.]+:\d+", line)
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        yield found[0]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@contextmanager
def _writing(database_url: str) -> Iterator[None]:
    """Writers in a process of their own, so that they hold up no look here."""
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    writers = spawn.Process(target=_write_all, args=(database_url, stop))
    writers.start()
    try:
        yield
    finally:
        stop.set()
        writers.join(60)


def _write_all(database_url: str, stop: Event) -> None:
    """Claim and record ten bundles a second and writer: about 5,000 jobs a second."""
    db = Database(database_url)

    def write() -> None:
        with db.write() as connection:
            session = sessions.open_session(
                connection, SHAPES, 600, host="h", pid=1, device="cpu", info={}
            )
        while not stop.wait(0.1):
            held = claim_bundle(db, session, SHAPES, BUNDLE)
            with db.write() as connection:
                jobs.succeed(connection, [(one, PICTURE) for one in held])

    threads = [threading.Thread(target=write) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
