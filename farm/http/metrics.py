"""The farm in figures for Prometheus, read from SQL at each scrape at a bounded cost.

Nothing here counts rows of jobs: states come from the counters, waits from the batches that have
something queued, workers from their sessions. Failures are counted from the events that were added
since the last scrape, so they begin at 0 with each process, as counters do; with several servers,
scrape one for them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farm.store import figures, sessions
from farm.store.db import Database
from farm.store.sessions import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LANE = ("model", "engine")
Key = tuple[str, ...]


class Metrics(Collector):
    """A farm's figures, as prometheus-client wants them. Raises DatabaseUnavailable when asked."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._failures: dict[tuple[str, str], int] = {}
        self._last_event: int | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            with self._db.read() as connection:
                states = figures.by_state(connection)
                waiting = figures.waiting(connection)
                workers = sessions.live(connection)
                self._count_failures(figures.new_failures(connection, self._last_event))
            yield _gauge("farm_jobs", "Jobs by state", ("state",), {(k,): n for k, n in states})
            yield from _backlog(waiting)
            yield from _workers(workers)
            yield self._failed()

    def _count_failures(self, new: figures.NewFailures) -> None:
        self._last_event = new.last_event
        for key, n in new.counted.items():
            self._failures[key] = self._failures.get(key, 0) + n

    def _failed(self) -> Metric:
        family = CounterMetricFamily(
            "farm_failures", "Renders that failed, by code and what followed", labels=("code", "to")
        )
        for (code, kind), n in sorted(self._failures.items()):
            family.add_metric((code, kind), n)
        return family


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Key, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _backlog(waiting: list[figures.Waiting]) -> Iterator[Metric]:
    """By lane; `engine` is empty where any engine of the model may take the jobs."""
    queued: dict[Key, float] = {(w.model, w.engine): w.queued for w in waiting}
    oldest: dict[Key, float] = {(w.model, w.engine): w.oldest_s for w in waiting}
    yield _gauge("farm_backlog_jobs", "Queued jobs that may be claimed", LANE, queued)
    text = "Age of the oldest batch with queued jobs"
    yield _gauge("farm_oldest_wait_seconds", text, LANE, oldest)


def _workers(workers: list[Worker]) -> Iterator[Metric]:
    states: dict[Key, float] = {}
    rendered: dict[Key, float] = {}
    stored: dict[Key, float] = {}
    spooled: dict[Key, float] = {}
    speeds: dict[Key, list[float]] = {}
    for worker in workers:
        states[*worker.lane, worker.state] = states.get((*worker.lane, worker.state), 0) + 1
        rendered[*worker.lane, worker.id[:8]] = worker.rendered
        stored[*worker.lane, worker.id[:8]] = worker.stored_bytes
        spooled[*worker.lane, worker.id[:8]] = worker.spooled
        if worker.seconds_per_picture:
            speeds.setdefault(tuple(worker.lane), []).append(worker.seconds_per_picture)
    yield _gauge("farm_workers", "Live workers", (*LANE, "state"), states)
    mean = {lane: sum(found) / len(found) for lane, found in speeds.items()}
    text = "Mean of the live workers of a lane"
    yield _gauge("farm_seconds_per_picture", text, LANE, mean)
    text = "Finished pictures that each live worker holds until the blob store takes them"
    yield _gauge("farm_worker_spooled_pictures", text, (*LANE, "session"), spooled)
    for name, text, values in (
        ("farm_worker_pictures", "Pictures of each live worker", rendered),
        ("farm_worker_stored_bytes", "Bytes of pictures that each live worker stored", stored),
    ):
        family = CounterMetricFamily(name, text, labels=(*LANE, "session"))
        for key, n in sorted(values.items()):
            family.add_metric(key, n)
        yield family
