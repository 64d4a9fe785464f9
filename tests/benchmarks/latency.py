"""A single job on an idle warm farm, and how many tokens Redis holds while the farm works.

The farm is a dispatcher and a worker in processes of their own. The overhead is from submit to
`succeeded` by the database's clock, less the render; the client's wait, from its call of `submit`
until it reads the end, is beside it. The tokens are counted every few milliseconds, also while a
batch is rendered.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from farm.broker import Broker
from farm.catalog import Lane
from farm.store.ids import JobRef
from tests.benchmarks.throughput import INSTANT, MODELS, SPEC
from tests.farm_kit import FarmKit
from tests.servers import PostgresServer, RedisServer

COLUMNS = (
    "one job, submit to succeeded", "overhead p50", "p99", "client p50", "p99",
    "most tokens of the lane",
)  # fmt: skip
WARM_UP = 20
SAMPLE_S = 0.005


def latency(home: Path, looks: int, jobs: int) -> list[tuple[str, ...]]:
    """Rows of the table, for SQLite and PostgreSQL: milliseconds."""
    with ExitStack() as stack:
        broker = stack.enter_context(RedisServer())
        postgres = stack.enter_context(PostgresServer())
        table = []
        for name, url in (("SQLite", None), ("PostgreSQL", postgres.create_database())):
            settings = {"database_url": url, "models": MODELS, "tick_s": 1.0, "session_ttl_s": 30.0}
            with FarmKit(home / name, broker.url, **settings) as kit:  # type: ignore[arg-type]
                kit.dispatcher()
                kit.worker(INSTANT.model)
                with _most_tokens(kit, INSTANT) as most:
                    overhead, client = _lone(kit, looks)
                    _batch(kit, jobs)
            tokens = f"{most[0]} in {most[1]:,} samples, with a batch of {jobs:,}"
            table.append((f"{looks} times, {name}", *_shown(overhead), *_shown(client), tokens))
    return table


def _lone(kit: FarmKit, looks: int) -> tuple[list[float], list[float]]:
    """Seconds of overhead by the database's clock, and seconds that the client waits."""
    overhead, client = [], []
    for i in range(WARM_UP + looks):
        began = time.monotonic()
        batch = kit.farm.submit([f"{SPEC.prompt} {i}, alone"], model=INSTANT.model, reuse=False)
        *_, status = kit.farm.watch(batch.id, poll_s=0.005)
        seconds = time.monotonic() - began
        assert status.counts["succeeded"] == 1, status
        job = kit.farm.job(JobRef(batch.id, 0))
        assert job.finished_at is not None
        if i >= WARM_UP:
            client.append(seconds)
            overhead.append(job.finished_at - status.created_at - (job.render_s or 0.0))
    return overhead, client


def _batch(kit: FarmKit, jobs: int) -> None:
    prompts = [f"{SPEC.prompt} {i}" for i in range(jobs)]
    batch = kit.farm.submit(prompts, model=INSTANT.model, reuse=False)
    *_, status = kit.farm.watch(batch.id, poll_s=0.05)
    assert status.counts["succeeded"] == jobs, status


@contextmanager
def _most_tokens(kit: FarmKit, lane: Lane) -> Iterator[list[int]]:
    """[the most tokens seen at once, samples] so far."""
    most, stop, broker = [0, 0], threading.Event(), Broker(kit.farm.settings.broker)

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            most[:] = max(most[0], broker.length(lane)), most[1] + 1

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
        broker.close()


def _shown(seconds: list[float]) -> tuple[str, str]:
    hundredths = statistics.quantiles(seconds, n=100)
    return f"{hundredths[49] * 1000:.1f} ms", f"{hundredths[98] * 1000:.1f} ms"
