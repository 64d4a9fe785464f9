"""The farm's own cost a job, from claim to recorded, beside plain Celery doing the same.

One worker, its threads and its engine's process, renders with the fake engine in no time. Discarded
pictures are encoded and hashed as others are, then dropped. Celery's worker does the same work with
one message and two commits a job (`plain_celery`); rounds alternate. At 50 ms a picture what counts
is how much of the time the engine renders.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from farm.catalog import Lane, load_catalog
from farm.spec import JobSpec
from tests.benchmarks import plain_celery
from tests.benchmarks.plain_celery import Discard
from tests.farm_kit import FarmKit
from tests.servers import PostgresServer, RedisServer
from workers.child import Child
from workers.engine import NO_INPUTS, EngineConfig, Inputs
from workers.messages import Event, Rendered, Started
from workers.runner import Runner

COLUMNS = ("one worker", "the farm", "plain Celery", "ratio")
MODELS = """
[models.fake-instant]
licence = "none"
defaults = { width = 16, height = 16, steps = 1, guidance_scale = 1.0 }
[models.fake-instant.engines.fake]
micro_batch = 64

[models.fake-50ms]
licence = "none"
defaults = { width = 512, height = 512, steps = 1, guidance_scale = 1.0 }
[models.fake-50ms.engines.fake]
micro_batch = 1
options = { seconds_per_step = 0.05 }
"""
INSTANT, SLOW = Lane("fake-instant", "fake"), Lane("fake-50ms", "fake")
SPEC = JobSpec(model=INSTANT.model, prompt="a picture of number", width=16, height=16, steps=1,
               guidance_scale=1.0, seed=0)  # fmt: skip


def throughput(home: Path, jobs: int, rounds: int) -> list[tuple[str, ...]]:
    """Rows of the table: jobs a second, and the engine's share of the time at 50 ms a picture."""
    with ExitStack() as stack:
        broker = stack.enter_context(RedisServer())
        postgres = stack.enter_context(PostgresServer())
        table = []
        for name, url, keeps in (
            ("SQLite, pictures discarded", None, False),
            ("PostgreSQL, pictures discarded", postgres.create_database(), False),
            ("SQLite, pictures in a local directory", None, True),
        ):
            place = home / name.replace(" ", "-")
            with FarmKit(place, broker.url, database_url=url, models=MODELS) as kit:
                table.append(_row(kit, name, jobs // 4 if keeps else jobs, rounds, keeps))
        with FarmKit(home / "busy", broker.url, models=MODELS) as kit:
            share = _rendered(kit, SLOW, 200, keeps=True).busy
        table.append(("50 ms a picture of 512x512, kept", f"{share:.1%} of the time", "", ""))
    return table


def _row(kit: FarmKit, name: str, jobs: int, rounds: int, keeps: bool) -> tuple[str, ...]:
    settings = kit.farm.settings
    blobs_url = settings.blobs if keeps else ""
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(jobs / _rendered(kit, INSTANT, jobs, keeps=keeps).seconds)
        few = jobs // 4
        seconds = plain_celery.run(settings.broker, settings.database, blobs_url, SPEC, few)
        plain.append(few / seconds)
    a, b = statistics.median(ours), statistics.median(plain)
    return f"{jobs:,} jobs, {name}", f"{a:,.0f} jobs/s", f"{b:,.0f} jobs/s", f"{a / b:.1f}"


class _Timed(Child):
    """Notes how much of the time from the first render to the last picture was rendering."""

    began, ended, rendering = 0.0, 0.0, 0.0

    def render(self, specs: Sequence[JobSpec], inputs: Inputs = NO_INPUTS) -> Iterator[Event]:
        for event in super().render(specs, inputs):
            if isinstance(event, Started):
                self.began = self.began or time.monotonic()
            elif isinstance(event, Rendered):
                self.rendering += event.seconds
                self.ended = time.monotonic()
            yield event

    @property
    def busy(self) -> float:
        return self.rendering / (self.ended - self.began)


class _Run:
    def __init__(self, seconds: float, busy: float) -> None:
        self.seconds, self.busy = seconds, busy


def _rendered(kit: FarmKit, lane: Lane, jobs: int, *, keeps: bool) -> _Run:
    """One worker renders a batch: from its first claim until the last job is recorded."""
    settings, farm = kit.farm.settings, kit.farm
    weights = load_catalog(settings.catalog_path, settings.models_path).weights(lane)
    config = EngineConfig(lane.engine, lane.model, weights)
    child = _Timed(config, log=kit.home / "engine.log")
    blobs: Any = farm.blobs if keeps else Discard()
    runner = Runner(config, child, settings, farm.db, farm.broker, blobs)
    runner.start()
    try:
        warm_up = farm.submit(
            [f"to begin with {i}" for i in range(64)], model=lane.model, reuse=False
        )
        runner.work()
        _await(kit, warm_up.id)
        child.began = child.rendering = 0.0
        prompts = [f"{SPEC.prompt} {i}" for i in range(jobs)]
        batch = farm.submit(prompts, model=lane.model, reuse=False)
        began = time.monotonic()
        runner.work()
        _await(kit, batch.id)
        return _Run(time.monotonic() - began, child.busy)
    finally:
        runner.close()


def _await(kit: FarmKit, batch_id: str) -> None:
    """`work` returns when nothing is left to claim; the last records are on their way."""
    *_, status = kit.farm.watch(batch_id, poll_s=0.005)
    assert status.counts["succeeded"] == status.total, status
