"""What a claim of 64 jobs costs, whatever else is queued: a thousand, a million, many batches.

And two owners, one with a million jobs and one with a hundred, on a simulated farm.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import text

from farm.dispatch import claim_bundle
from farm.spec import NewJob
from farm.store import batches, intake, jobs
from farm.store.jobs import Claim
from tests.servers import PostgresServer
from tests.store_kit import LANE, PICTURE, Kit, spec

COLUMNS = ("what", "SQLite", "PostgreSQL")
BUNDLE = 64
OPEN = 5_000  # other open batches
CHUNK = 20_000


def claims(home: Path, million: int, looks: int) -> list[tuple[str, str, str]]:
    """Rows of the table: milliseconds of a claim, median and 99th percentile of `looks`."""
    home.mkdir(parents=True)
    with ExitStack() as stack:
        postgres = stack.enter_context(PostgresServer())
        columns = [
            _measure(url, million, looks)
            for url in (f"sqlite:///{home / 'farm.db'}", postgres.create_database())
        ]
    return [(what, columns[0][what], columns[1][what]) for what in columns[0]]


def _measure(url: str, million: int, looks: int) -> dict[str, str]:
    kit = Kit.at(url)
    session = kit.session()
    told = {}
    control = _fill(kit, (4 * looks + 1) * BUNDLE, "control", priority=9)
    big = _fill(kit, million, "big", priority=1)
    told[f"claim {BUNDLE} of {million:,}"] = _compare(kit, session, looks, control, big)
    _end_most(kit, big, million * 9 // 10)
    told[f"of the last tenth of {million:,}"] = _compare(kit, session, looks, control, big)
    urgent = _fill(kit, (looks + 1) * BUNDLE, "urgent", priority=2)
    told["of an urgent batch, those in front"] = _compare(kit, session, looks, control, urgent)
    _crowd(kit)
    told[f"of a small batch, {OPEN:,} others open"] = _show(
        sorted(_claim(kit, session, control) for _ in range(looks))
    )
    told["two owners, a hundred jobs behind many"] = _share(kit, million)
    told[f"stop the claims of {million:,}"] = _stop(kit, big)
    kit.db.close()
    return told


def _fill(kit: Kit, n: int, owner: str, *, priority: int = 0) -> str:
    """A batch of n jobs of one key."""
    one = NewJob.of(spec("a red circle"))
    shared = one.shape.spec.model_dump(mode="json", exclude={"prompt", "seed", "engine"})
    with kit.db.write() as connection:
        batch = batches.create(connection, shared, name="", owner=owner, priority=priority)
    for start in range(0, n, CHUNK):
        with kit.db.write() as connection:
            intake.insert(connection, batch, start, [one] * min(CHUNK, n - start), shared)
    with kit.db.write() as connection:
        batches.release(connection, batch, n)
    return batch


def _crowd(kit: Kit) -> None:
    """Many small batches of fifty owners."""
    one = NewJob.of(spec("a red circle"))
    with kit.db.write() as connection:
        for i in range(OPEN):
            batch = batches.create(connection, {}, name="", owner=f"crowd {i % 50}", priority=0)
            intake.insert(connection, batch, 0, [one], {})
            batches.release(connection, batch, 1)


def _end_most(kit: Kit, batch: str, until: int) -> None:
    """The queued jobs up to a place are cancelled, long after PostgreSQL looked at the table."""
    if kit.db.dialect == "postgresql":
        with kit.db.write() as connection:
            connection.execute(text("ANALYZE jobs"))
    place = {"batch": batch, "until": until}
    with kit.db.write() as connection:
        ended = connection.execute(
            text(
                "UPDATE jobs SET state = 'cancelled', finished_at = 1, error_code = 'ERR_X' "
                "WHERE batch_id = :batch AND idx < :until AND state = 'queued'"
            ),
            place,
        ).rowcount
        connection.execute(
            text(
                "UPDATE batch_counts SET queued = queued - :n, cancelled = cancelled + :n "
                "WHERE batch_id = :batch"
            ),
            {"batch": batch, "n": ended},
        )


def _compare(kit: Kit, session: str, looks: int, control: str, batch: str) -> str:
    """Claims of a batch beside those of a small one, in turns; both first in line."""
    small, other = [], []
    for _ in range(looks):
        small.append(_claim(kit, session, control))
        _pause(kit, control, True)
        other.append(_claim(kit, session, batch))
        _pause(kit, control, False)
    ratio = statistics.median(other) / statistics.median(small)
    return f"{_show(sorted(other))}, {ratio:.2f} times a small batch"


def _pause(kit: Kit, batch: str, paused: bool) -> None:
    with kit.db.write() as connection:
        batches.set_paused(connection, batch, paused)


def _claim(kit: Kit, session: str, batch: str) -> float:
    """Seconds of a claim, which must come from the batch."""
    began = time.perf_counter()
    bundle = claim_bundle(kit.db, session, LANE, BUNDLE)
    spent = time.perf_counter() - began
    assert {one.ref.batch_id for one in bundle} == {batch}
    return spent


def _show(spent: list[float]) -> str:
    p99 = spent[min(len(spent) - 1, int(len(spent) * 0.99))]
    return f"{statistics.median(spent) * 1e3:.1f} ms (p99 {p99 * 1e3:.1f})"


def _share(kit: Kit, million: int) -> str:
    """Four workers with bundles of ten; the second owner comes when all of them are busy."""
    _fill(kit, million // 10, "first", priority=10)
    session, held, served = kit.session(), deque[list[Claim]](), list[bool]()
    second, found = "", 0
    while found < 100:
        if len(held) == 4:
            if not second:
                second = _fill(kit, 100, "second", priority=10)
            with kit.db.write() as connection:
                jobs.succeed(connection, [(one, PICTURE) for one in held.popleft()])
        bundle = claim_bundle(kit.db, session, LANE, 10)
        held.append(bundle)
        if second:
            mine = bundle[0].ref.batch_id == second
            served.append(mine)
            found += len(bundle) if mine else 0
    first = served.index(True)
    return f"{sum(served) / len(served):.0%} of the bundles, the first after {first} others"


def _stop(kit: Kit, batch: str) -> str:
    began = time.perf_counter()
    with kit.db.write() as connection:
        batches.set_cancelled(connection, batch)
    stopped = time.perf_counter() - began
    steps, moved = _walk(lambda: _step(kit, batch))
    return f"{stopped * 1e3:.1f} ms; all {moved:,} cancelled in steps of at most {steps:.2f} s"


def _step(kit: Kit, batch: str) -> int:
    with kit.db.write() as connection:
        return sum(jobs.request_cancel(connection, batch))


def _walk(step: Callable[[], int]) -> tuple[float, int]:
    """(the longest step in seconds, jobs moved in all)."""
    longest, total = 0.0, 0
    while True:
        began = time.perf_counter()
        n = step()
        longest = max(longest, time.perf_counter() - began)
        if not n:
            return longest, total
        total += n
