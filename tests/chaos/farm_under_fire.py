"""A farm of real processes whose workers and dispatchers are started again when they die.

As systemd, Kubernetes or `farm up` would; everything that a fault may strike hangs here. They reach
their servers through proxies that break connections; the harness itself looks past these.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from sqlalchemy import func, make_url, select

from farm.catalog import Lane
from farm.children import spawn
from farm.errors import BrokerUnavailable, DatabaseUnavailable
from farm.store.tables import jobs
from tests.farm_kit import FarmKit
from tests.proxy import Proxy
from tests.servers import PostgresServer, RedisServer, S3Server

LANE = Lane("paced", "fake")
MODELS = """
[models.paced]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 4 }}
[models.paced.engines.fake]
micro_batch = 4
options = {{ seconds_per_step = {seconds_per_step} }}
"""
LOOK_S = 0.05


class FarmUnderFire(FarmKit):
    """3 workers of one lane, 2 dispatchers, and the servers that they need.

    `postgres`: None for SQLite. `envs`: more environment for a role. Settings are FARM_* ones.
    """

    def __init__(
        self,
        home: Path,
        redis: RedisServer,
        s3: S3Server,
        postgres: PostgresServer | None,
        *,
        workers: int = 3,
        seconds_per_step: float = 0.05,
        envs: Mapping[str, Mapping[str, str]] | None = None,
        **settings: object,
    ) -> None:
        told = {"session_ttl_s": 3.0, "max_failures": 20, "bundle_seconds": 1.0}
        told |= {"blobs_url": f"s3://{s3.create_bucket()}/farm"} | settings
        database_url = postgres.create_database() if postgres else None
        super().__init__(
            home,
            redis.url,
            database_url=database_url,
            s3=s3.options(),
            models=MODELS.format(seconds_per_step=seconds_per_step),
            **told,
        )
        self.redis, self.s3, self.postgres = redis, s3, postgres
        self.envs = envs or {}
        self.lines: dict[str, Proxy] = {}
        self._through("Redis", redis.socket_path, FARM_BROKER_URL="redis://{}/0")
        self._through("S3", ("127.0.0.1", s3.port), FARM_S3_ENDPOINT_URL="http://{}")
        if postgres:
            name = make_url(str(database_url)).database
            url = f"postgresql+psycopg://postgres@{{}}/{name}"
            self._through("database", postgres.socket_path, FARM_DATABASE_URL=url)
        self.tick_s = self.farm.settings.tick_s
        self.ttl_s = float(str(told["session_ttl_s"]))
        self.roles = {f"worker-{n}": worker_words() for n in range(workers)}
        self.roles |= {f"dispatcher-{n}": ["-m", "farm", "dispatcher"] for n in range(2)}
        self.alive: dict[str, subprocess.Popen[bytes]] = {}
        self.starts = 0
        self.tokens_seen = 0
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._witness = threading.Thread(target=self._sample, name="witness")

    def _through(self, server: str, target: Path | tuple[str, int], **env: str) -> None:
        """The processes, but not the harness, reach this server through a proxy."""
        proxy = self.lines[server] = Proxy(target)
        self.env |= {name: url.format(f"127.0.0.1:{proxy.port}") for name, url in env.items()}

    def run(self, *args: str, name: str) -> subprocess.Popen[bytes]:
        """As in FarmKit; it dies with this process, however this one ends."""
        env = {**self.env, **self.envs.get(name, {})}
        process = spawn([sys.executable, *args], self.home / f"{name}.log", env=env)
        self.processes.append(process)
        return process

    def start(self) -> None:
        """All processes up; returns when every worker has a session."""
        self._supervisor.start()
        self._witness.start()
        self.wait_for(lambda: len(self.live()) >= self.size, "the workers", 120)

    @property
    def size(self) -> int:
        """Workers that there should be."""
        return sum(name.startswith("worker") for name in self.roles)

    def _supervise(self) -> None:
        while not self._over.wait(LOOK_S):
            for name, words in self.roles.items():
                process = self.alive.get(name)
                if process is None or process.poll() is not None:
                    self.alive[name] = self.run(*words, name=name)
                    self.starts += 1

    def _sample(self) -> None:
        while not self._over.wait(LOOK_S):
            with suppress(BrokerUnavailable):
                self.tokens_seen = max(self.tokens_seen, self.farm.broker.length(LANE))

    # ---- look

    def done(self) -> int | None:
        """Jobs that have succeeded; None while the database is away."""
        try:
            with self.farm.db.read() as connection:
                query = select(func.count()).where(jobs.c.state == "succeeded")
                return int(connection.scalar(query) or 0)
        except DatabaseUnavailable:
            return None

    def wait_for(self, ready: Callable[[], object], what: str, timeout_s: float) -> None:
        """Wait until `ready()`; the database may be away meanwhile. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(DatabaseUnavailable):
                if ready():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: nothing within {timeout_s:g} s")
            time.sleep(LOOK_S)

    def wait_done(self, n: int, what: str, timeout_s: float) -> None:
        """Wait until `n` jobs have succeeded."""
        self.wait_for(lambda: (self.done() or 0) >= n, what, timeout_s)

    def serving(self, rng: random.Random) -> subprocess.Popen[bytes]:
        """A worker with a session and an engine, drawn by chance."""
        found: list[subprocess.Popen[bytes]] = []

        def look() -> bool:
            live = self.live()
            workers = [p for name, p in sorted(self.alive.items()) if name.startswith("worker")]
            found[:] = [p for p in workers if p.pid in live and p.poll() is None and engine_of(p)]
            return bool(found)

        self.wait_for(look, "a worker that serves", 90)
        return rng.choice(found)

    def dispatcher(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError("they are roles here")

    def lose_redis_data(self) -> None:
        """Redis must be down."""
        shutil.rmtree(self.redis.dir / "appendonlydir", ignore_errors=True)

    def stop_all(self) -> None:
        """End the supervisor, then ask every process to end in good order."""
        self._over.set()
        for thread in (self._supervisor, self._witness):
            if thread.is_alive():
                thread.join()
        for process in self.alive.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.alive.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)

    def __exit__(self, *error: object) -> None:  # type: ignore[override]
        self._over.set()
        for server in (self.redis, self.s3, self.postgres):
            if server:
                server.start()  # a fault that was cut short leaves it down
        for thread in (self._supervisor, self._witness):
            if thread.is_alive():
                thread.join()
        super().__exit__(*error)  # type: ignore[arg-type]
        for line in self.lines.values():
            line.close()


def worker_words() -> list[str]:
    return ["-m", "workers", "--model", LANE.model, "--engine", LANE.engine]


def engine_of(worker: subprocess.Popen[bytes]) -> psutil.Process | None:
    """The engine's process of a worker, if it has one just now."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(worker.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "spawn_main" in " ".join(child.cmdline()):
                    return child
    return None
