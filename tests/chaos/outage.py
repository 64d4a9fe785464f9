"""An outage of the blob store in the middle of a run: how much is rendered twice, and what fails.

python -m tests.chaos.outage 60 [postgres] [sqlite]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy import func, select

from farm.store.tables import events, jobs, sessions
from tests.chaos.audit import audit
from tests.chaos.farm_under_fire import LANE, LOOK_S, FarmUnderFire
from tests.servers import PostgresServer, RedisServer, S3Server, Server

A_SECOND = 30  # pictures that three workers render in one, or fewer on a busy machine
BEFORE = 20  # pictures that are stored when the outage begins


@dataclass
class Outage:
    """Times in seconds."""

    database: str
    kind: str
    seconds: float
    jobs: int
    rendered: int = 0  # by the engines, as the workers' sessions tell
    during: int = 0  # of these in the outage
    most_held: int = 0
    drained_s: float = 0.0  # from the store's return until nothing was held
    claims: int = 0
    failures: int = 0
    given_back: int = 0
    says: str = ""  # the note of a worker
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [
            f"blob store {self.kind} for {self.seconds:g} s, {self.database}: {self.jobs} jobs, "
            f"{self.rendered} renders, {self.claims} claims, {self.failures} failures, "
            f"{self.given_back} given back",
            f"  rendered meanwhile: {self.during}; most held at once: {self.most_held}; "
            f"all stored {self.drained_s:.1f} s after its return",
            f"  workers said: {self.says}",
        ]
        return "\n".join(lines + [f"  WRONG: {what}" for what in self.wrong])


def s3_outage_run(
    seconds: float,
    home: Path,
    redis: RedisServer,
    s3: S3Server,
    postgres: PostgresServer | None,
    kind: Literal["down", "silent"] = "down",
    **settings: object,
) -> Outage:
    """Render with three workers, take the store away for `seconds`, and look at what became of it.

    `silent`: it takes connections and answers nothing. Servers must be running.
    """
    told = Outage(
        "postgres" if postgres else "sqlite", kind, seconds, int(A_SECOND * seconds * 1.3)
    )
    with FarmUnderFire(home, redis, s3, postgres, seconds_per_step=0.1, **settings) as farm:
        farm.start()
        batch = farm.farm.submit([f"picture {i}" for i in range(told.jobs)], model=LANE.model)
        farm.wait_done(BEFORE, "the first pictures", 60)
        before = _rendered(farm)
        with _away(s3, kind):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                _look(farm, told)
                time.sleep(LOOK_S)
            told.during = _rendered(farm) - before
        back = time.monotonic()
        farm.wait_for(lambda: _held(farm) == 0, "what was held", 120)
        told.drained_s = time.monotonic() - back
        farm.wait_for(lambda: farm.farm.status(batch.id).done, "the rest", 300)
        farm.stop_all()
        told.rendered = _rendered(farm)
        _count(farm, told)
        told.wrong = audit(farm.farm, [batch.id], {}, LANE).wrong
    return told


@contextmanager
def _away(server: Server, kind: str) -> Iterator[None]:
    if kind == "down":
        server.kill()
    elif server.pid:
        os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if kind == "down":
            server.start()
        elif server.pid:
            os.kill(server.pid, signal.SIGCONT)


def _look(farm: FarmUnderFire, told: Outage) -> None:
    held = 0
    for worker in farm.farm.workers():
        held += worker.spooled
        if worker.state == "waiting":
            told.says = worker.note
    told.most_held = max(told.most_held, held)


def _held(farm: FarmUnderFire) -> int:
    return sum(worker.spooled for worker in farm.farm.workers())


def _rendered(farm: FarmUnderFire) -> int:
    with farm.farm.db.read() as connection:
        return int(connection.scalar(select(func.sum(sessions.c.rendered))) or 0)


def _count(farm: FarmUnderFire, told: Outage) -> None:
    with farm.farm.db.read() as connection:
        counted = select(func.sum(jobs.c.claim_no), func.sum(jobs.c.failures))
        told.claims, told.failures = map(int, connection.execute(counted).one())
        went_back = select(func.count()).where(events.c.kind == "requeued")
        told.given_back = connection.scalar(went_back) or 0


def main() -> int:
    seconds, *databases = sys.argv[1:]
    wrong = False
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory("-outage")))
        redis, s3 = stack.enter_context(RedisServer()), stack.enter_context(S3Server())
        for database in databases or ("postgres", "sqlite"):
            server = stack.enter_context(PostgresServer()) if database == "postgres" else None
            told = s3_outage_run(float(seconds), home / database, redis, s3, server)
            wrong = wrong or bool(told.wrong) or told.rendered != told.jobs
            print(told.text(), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
