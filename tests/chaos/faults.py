"""The faults of a chaos run. Each strikes, and returns when what it struck has been let go."""

from __future__ import annotations

import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
from sqlalchemy import select

from farm.broker import TASK
from farm.dispatcher import TICKS
from farm.store.tables import sessions
from tests.chaos.farm_under_fire import LANE, LOOK_S, FarmUnderFire, engine_of
from tests.proxy import DOWN, UP, Proxy, Way
from tests.servers import Server

Fault = Callable[[FarmUnderFire, random.Random], None]
SILENT_S = 3.0
SLOW_BYTES_S = 20_000.0
CUT_S = 20.0  # until something passes where a cut was ordered
STOPPED_S = 45.0  # longest that a worker sleeps while its session is waited for


def kill_worker(farm: FarmUnderFire, rng: random.Random) -> None:
    farm.serving(rng).kill()


def kill_engine(farm: FarmUnderFire, rng: random.Random) -> None:
    engine = engine_of(farm.serving(rng))
    if engine:
        with suppress(psutil.NoSuchProcess):
            engine.kill()


def stop_worker(farm: FarmUnderFire, rng: random.Random) -> None:
    """SIGSTOP until its session is lost and others have its jobs, then it wakes as a ghost.

    Half of the time the engine sleeps too. On SQLite a worker that sleeps within a transaction
    holds up the whole farm; so it is woken after some leases whatever happened.
    """
    worker = farm.serving(rng)
    engine = engine_of(worker) if rng.random() < 0.5 else None
    asleep = [psutil.Process(worker.pid)] + ([engine] if engine else [])
    with farm.farm.db.read() as connection:
        query = select(sessions.c.id).where(sessions.c.pid == worker.pid)
        session = connection.scalar(query.where(sessions.c.closed_at.is_(None)))
    began = time.monotonic()
    for process in asleep:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    longest = STOPPED_S if farm.postgres else farm.ttl_s * 4
    with suppress(TimeoutError):
        farm.wait_for(lambda: _lost(farm, session), "a lost session", longest)
        n = farm.done() or 0
        farm.wait_done(n + 1, "the others' work", longest)
    _wait(farm.ttl_s * 1.2 - (time.monotonic() - began))  # whoever closed it
    for process in reversed(asleep):
        with suppress(psutil.NoSuchProcess):
            process.resume()


def _lost(farm: FarmUnderFire, session: str | None) -> bool:
    with farm.farm.db.read() as connection:
        query = select(sessions.c.closed_at).where(sessions.c.id == session)
        return connection.scalar(query) is not None


def restart_redis(farm: FarmUnderFire, rng: random.Random) -> None:
    (farm.redis.kill if rng.random() < 0.5 else farm.redis.stop)()
    farm.redis.start()


def lose_redis(farm: FarmUnderFire, rng: random.Random) -> None:
    farm.redis.kill()
    farm.lose_redis_data()
    farm.redis.start()


def restart_database(farm: FarmUnderFire, rng: random.Random) -> None:
    assert farm.postgres
    (farm.postgres.kill if rng.random() < 0.5 else farm.postgres.stop)()
    farm.postgres.start()


def kill_dispatcher(farm: FarmUnderFire, rng: random.Random) -> None:
    name = rng.choice(sorted(name for name in farm.alive if name.startswith("dispatcher")))
    farm.alive[name].kill()


def stop_dispatcher(farm: FarmUnderFire, rng: random.Random) -> None:
    """SIGSTOP of the leader, or of who watches, until its lease is over; then there are two."""
    name = rng.choice(sorted(name for name in farm.alive if name.startswith("dispatcher")))
    asleep = farm.alive[name]
    asleep.send_signal(signal.SIGSTOP)
    _wait(TICKS * farm.tick_s * 2)
    asleep.send_signal(signal.SIGCONT)


def forge(farm: FarmUnderFire, rng: random.Random) -> None:
    """One token delivered twice, with one id, as a broker does after a lost connection."""
    again = str(uuid.uuid4())
    for _ in range(2):
        farm.farm.broker.app.send_task(
            TASK, kwargs=LANE._asdict(), queue=LANE.queue, ignore_result=True, task_id=again
        )


def forge_foreign(farm: FarmUnderFire, rng: random.Random) -> None:
    """A message that no farm sent: another's task, another lane's token, wrong arguments, bytes."""
    what = rng.choice(
        [
            "garbage",
            ("os.system", {"command": "true"}),
            (TASK, {"model": "another", "engine": "fake"}),
            (TASK, {"model": LANE.model}),
            (TASK, {"model": ["x"] * 100, "engine": {"a": 1}, "more": None}),
        ]
    )
    if isinstance(what, str):
        farm.redis.command("LPUSH", f"farm:{LANE.queue}", what)
    else:
        name, kwargs = what
        app = farm.farm.broker.app
        app.send_task(name, kwargs=kwargs, queue=LANE.queue, ignore_result=True)


def silence_redis(farm: FarmUnderFire, rng: random.Random) -> None:
    """Its connections stay and nothing answers."""
    with _silent(farm.redis):
        _wait(SILENT_S)


def silence_database(farm: FarmUnderFire, rng: random.Random) -> None:
    """For longer than a lease; then all that was sent arrives late."""
    with farm.lines["database"].silent():
        _wait(farm.ttl_s * 1.5)


def slow_s3(farm: FarmUnderFire, rng: random.Random) -> None:
    with farm.lines["S3"].slow(SLOW_BYTES_S):
        _wait(SILENT_S)


def reset(server: str) -> Fault:
    """An RST on every connection to a server, whatever is under way there."""

    def strike(farm: FarmUnderFire, rng: random.Random) -> None:
        farm.lines[server].reset()

    return strike


def cut_upload(farm: FarmUnderFire, rng: random.Random) -> None:
    """A picture breaks off on its way to the store, within its headers or its bytes."""
    _cut(farm.lines["S3"], UP, rng.randrange(3000))


def lose_answer(server: str) -> Fault:
    """A server does what it was asked to, and its answer is lost; that of a commit too."""

    def strike(farm: FarmUnderFire, rng: random.Random) -> None:
        for _ in range(rng.randrange(1, 4)):
            _cut(farm.lines[server], DOWN, rng.randrange(400))

    return strike


def _cut(line: Proxy, way: Way, after: int) -> None:
    try:
        if not line.cut(way, after).wait(CUT_S):
            raise TimeoutError("nothing passed where a cut was ordered")
    finally:
        line.mend()


def s3_outage(seconds: float, beside: Fault | None) -> Fault:
    """The store is down, or takes requests and does not answer; meanwhile another fault strikes."""

    def strike(farm: FarmUnderFire, rng: random.Random) -> None:
        with rng.choice([_silent, _down])(farm.s3):
            until = time.monotonic() + seconds
            if beside:
                beside(farm, rng)
            _wait(until - time.monotonic())

    return strike


@contextmanager
def _silent(server: Server) -> Iterator[None]:
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def _down(server: Server) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


def _wait(seconds: float) -> None:
    """The length of a fault is the fault; nothing is waited for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(LOOK_S)
