"""A finished batch submitted again: its pictures are linked, none is rendered."""

from __future__ import annotations

import time
from pathlib import Path

from tests.runner_kit import LoneRunner
from tests.servers import PostgresServer

Row = tuple[str, str, str, str]


def reuse(home: Path, jobs: int = 20_000) -> list[Row]:
    """Rows of the table: jobs a second of a batch on the fake engine, and of the same again."""
    with PostgresServer() as server:
        urls = {"SQLite": None, "PostgreSQL": server.create_database()}
        return [_compared(home / name, name, url, jobs) for name, url in urls.items()]


def _compared(home: Path, name: str, url: str | None, jobs: int) -> Row:
    told = {"database_url": url} if url else {}
    rows = [{"prompt": f"p{i}", "seed": i, "width": 16, "height": 16} for i in range(jobs)]
    with LoneRunner(home, **told) as lone:
        first_s = _run(lone, rows)
        assert lone.rendered == jobs
        again_s = _run(lone, rows)
        assert lone.rendered == jobs, "nothing is rendered twice"
    return (
        f"{jobs:,} finished jobs again, 0 renders, {name}",
        f"{jobs / again_s:,.0f} jobs/s",
        f"rendered by the fake engine {jobs / first_s:,.0f} jobs/s",
        f"{first_s / again_s:.1f}",
    )


def _run(lone: LoneRunner, rows: list[dict[str, object]]) -> float:
    batch = lone.farm.submit(rows, model="fake-fast")
    began = time.monotonic()
    done = lone.work(batch, timeout_s=600)
    assert done.counts["succeeded"] == len(rows)
    return time.monotonic() - began
