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
    small = _fill(kit, max(1_000, (looks + 1) * BUNDLE), "small")
    alone = _times(kit, session, looks, small)
    told[f"claim {BUNDLE} of a thousand"] = _show(alone)
    big = _fill(kit, million, "big", priority=1)
    many = _times(kit, session, looks, big)
    told[f"claim {BUNDLE} of {million:,}"] = _against(many, alone)
    _end_most(kit, big, million * 9 // 10)
    few = _times(kit, session, looks, big)
    told[f"claim {BUNDLE} of the last tenth of {million:,}"] = _against(few, alone)
    urgent = _fill(kit, max(1_000, (looks + 1) * BUNDLE), "urgent", priority=2)
    told[f"an urgent {BUNDLE}, those in front"] = _against(
        _times(kit, session, looks, urgent), alone
    )
    _crowd(kit)
    told[f"the same with {OPEN:,} more open batches"] = _against(
        _times(kit, session, looks, _fill(kit, (looks + 1) * BUNDLE, "last", priority=3)), alone
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
                "UPDATE jobs SET state = 'cancelled', finished_at = 1 WHERE batch_id = :batch "
                "AND idx < :until AND state = 'queued'"
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


def _times(kit: Kit, session: str, looks: int, batch: str) -> list[float]:
    """Seconds of each claim; all must come from the batch, which is first in line."""
    spent = []
    for _ in range(looks):
        began = time.perf_counter()
        bundle = claim_bundle(kit.db, session, LANE, BUNDLE)
        spent.append(time.perf_counter() - began)
        assert {one.ref.batch_id for one in bundle} == {batch}
    return sorted(spent)


def _show(spent: list[float]) -> str:
    p99 = spent[min(len(spent) - 1, int(len(spent) * 0.99))]
    return f"{statistics.median(spent) * 1e3:.1f} ms (p99 {p99 * 1e3:.1f})"


def _against(spent: list[float], alone: list[float]) -> str:
    return f"{_show(spent)}, {statistics.median(spent) / statistics.median(alone):.2f} times"


def _share(kit: Kit, million: int) -> str:
    """Four workers with bundles of ten; the second owner comes when all of them are busy."""
    _fill(kit, million // 10, "first", priority=5)
    session, held, served = kit.session(), deque[list[Claim]](), list[bool]()
    second, found = "", 0
    while found < 100:
        if len(held) == 4:
            if not second:
                second = _fill(kit, 100, "second", priority=5)
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
