"""Submitting a prompt file, against a raw executemany of the same rows into the same table."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from farm.config import Settings
from farm.service import Farm
from farm.spec import JobSpec
from farm.store import batches, schema
from farm.store.tables import jobs
from tests.servers import PostgresServer, RedisServer


def submit(home: Path, rows: int, rounds: int) -> list[tuple[str, str, str, str]]:
    """Rows of the table: jobs a second, read, validated, inserted and counted."""
    home.mkdir(parents=True)
    path = home / "prompts.jsonl"
    with path.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"a picture of number {i}", "seed": i}) + "\n")
    table = []
    with ExitStack() as stack:
        broker = stack.enter_context(RedisServer())
        postgres = stack.enter_context(PostgresServer())
        for name, url in (
            ("SQLite", f"sqlite:///{home / 'farm.db'}"),
            ("PostgreSQL", postgres.create_database()),
        ):
            settings = Settings(home=home, database_url=url, broker_url=broker.url)  # type: ignore[arg-type]
            with Farm(settings) as farm:
                schema.upgrade(farm.db)
                table.append(_compare(farm, name, path, rows, rounds))
    return table


def _compare(
    farm: Farm, name: str, path: Path, rows: int, rounds: int
) -> tuple[str, str, str, str]:
    ours, raw = [], []
    for _ in range(rounds):
        began = time.monotonic()
        assert farm.submit_file(path).total == rows
        ours.append(time.monotonic() - began)
        raw.append(_raw(farm, path))
    a, b = rows / statistics.median(ours), rows / statistics.median(raw)
    what = f"submit a jsonl of {rows:,} rows, {name}"
    return what, f"{a:,.0f} jobs/s", f"raw executemany {b:,.0f} rows/s", f"{b / a:.1f}"


def _raw(farm: Farm, path: Path) -> float:
    spec = JobSpec(model="shapes", prompt="x", width=64, height=64, steps=20,
                   guidance_scale=4.0, seed=0)  # fmt: skip
    with farm.db.write() as connection:
        batch = batches.create(connection, {}, name="raw", owner="", priority=0)
    values = [
        {"batch_id": batch, "idx": i, "model": "shapes", "key": spec.key, **json.loads(line)}
        for i, line in enumerate(path.read_text().splitlines())
    ]
    began = time.monotonic()
    with farm.db.write() as connection:
        connection.execute(jobs.insert(), values)
    return time.monotonic() - began
