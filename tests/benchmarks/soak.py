"""`make soak`: a whole farm at full speed for a while, and whether its processes grow.

A worker with the fake engine renders as fast as the farm can; a worker with the demo model renders
real pictures beside it; a dispatcher rings, the HTTP server is asked all the time, and batches that
have ended are pruned, as in a farm that runs for weeks. Each process' resident memory and open
descriptors are sampled; the slope is that of a least-squares line after the warm-up.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx
import numpy as np
import psutil

from farm.retention import prune
from tests.farm_kit import FarmKit, until
from tests.servers import PostgresServer, RedisServer, free_port

FAST = """
[models.fast]
licence = "none"
defaults = { width = 16, height = 16, steps = 1, guidance_scale = 1.0 }
[models.fast.engines.fake]
micro_batch = 64
"""
EVERY_S = 5.0  # between samples
WARM_UP = 0.5  # of the time: the allocator takes some 400,000 jobs to find its size
KEPT = 2  # batches of each model that have ended and are not pruned yet
BATCH = {"fast": 10_000, "shapes": 100}
BLOCKS = 10
COLUMNS = (
    "process", "RSS after the warm-up", "at the end", "slope a minute", "noise", "descriptors",
    "slope a minute",
)  # fmt: skip


@dataclass
class Series:
    """One process' samples: minutes since the start, bytes, descriptors."""

    minutes: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trend:
    """`slope` a minute; `noise`: how far single blocks of samples lie from the line."""

    first: float
    last: float
    slope: float
    noise: float
    minutes: float

    @property
    def flat(self) -> bool:
        """The line rises by less than thrice the noise, or by less than a hundredth in all."""
        rise = self.slope * self.minutes
        return rise <= max(3 * self.noise, 0.01 * self.first)


def trend(minutes: list[float], values: list[float]) -> Trend:
    """The line through the medians of BLOCKS stretches of the samples after the warm-up."""
    begin = int(len(minutes) * WARM_UP)
    x = np.array([b.mean() for b in np.array_split(np.array(minutes[begin:]), BLOCKS)])
    y = np.array([np.median(b) for b in np.array_split(np.array(values[begin:]), BLOCKS)])
    line = np.polyfit(x, y, 1)
    noise = float(np.std(y - np.polyval(line, x)))
    return Trend(float(y[0]), float(y[-1]), float(line[0]), noise, float(x[-1] - x[0]))


class Soak:
    """A farm under load; `minutes` and `renders` are the least of each."""

    def __init__(self, kit: FarmKit, minutes: float, renders: int) -> None:
        self._kit, self._minutes, self._renders = kit, minutes, renders
        self._port = free_port()
        self._over = threading.Event()
        self._open: dict[str, deque[str]] = {model: deque() for model in BATCH}
        self.series: dict[str, Series] = {}
        self.asked = self.pruned = 0
        self.faults: list[BaseException] = []

    def run(self) -> None:
        """Raises what a helping thread met."""
        kit = self._kit
        roles = {
            "dispatcher": kit.dispatcher(),
            "HTTP server": kit.run("-m", "farm", "serve", "--port", str(self._port), name="serve"),
            "worker, fake": kit.worker("fast"),
            "worker, diffusers": kit.worker("shapes", "diffusers", wait_s=120),
        }
        threads = [
            threading.Thread(target=self._keep_on, args=(do,)) for do in (self._feed, self._ask)
        ]
        for thread in threads:
            thread.start()
        try:
            self._sample(roles)
        finally:
            self._over.set()
            for thread in threads:
                thread.join()
        if self.faults:
            raise self.faults[0]

    def rendered(self, model: str) -> int:
        return sum(w.rendered for w in self._kit.farm.workers() if w.model == model)

    def _keep_on(self, do: Callable[[], None]) -> None:
        try:
            while not self._over.is_set():
                do()
        except BaseException as error:
            self.faults.append(error)

    def _feed(self) -> None:
        """Two batches of each model are open at any time; older ones are pruned."""
        farm = self._kit.farm
        for model, n in BATCH.items():
            mine = self._open[model]
            left = [batch for batch in mine if not farm.status(batch).done]
            if len(left) < 2:
                made = farm.submit((f"picture {i}" for i in range(n)), model=model, reuse=False)
                mine.append(made.id)
            while len(mine) > KEPT + 2 and farm.status(mine[0]).done:
                self.pruned += prune(farm.db, farm.blobs, [mine.popleft()]).jobs
        self._over.wait(0.2)

    def _ask(self) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=30) as http:
            until(lambda: _answers(http), 60)
            while not self._over.is_set():
                for path in ("/v1/batches", "/metrics", "/v1/workers", "/v1/models"):
                    http.get(path).raise_for_status()
                    self.asked += 1
                for batch in [b for mine in self._open.values() for b in list(mine)]:
                    for path in (f"/v1/batches/{batch}", f"/v1/batches/{batch}/jobs?limit=20"):
                        http.get(path)
                        self.asked += 1
                self._over.wait(0.05)

    def _sample(self, roles: dict[str, subprocess.Popen[bytes]]) -> None:
        began = time.monotonic()
        while True:
            minutes = (time.monotonic() - began) / 60
            for name, process in _with_engines(roles).items():
                series = self.series.setdefault(name, Series())
                series.minutes.append(minutes)
                series.rss.append(process.memory_info().rss)
                series.descriptors.append(process.num_fds())
            done = self.rendered("shapes")
            if sys.stderr.isatty():
                print(f"\r{minutes:5.1f} min, {done} real pictures ", end="", file=sys.stderr)
            if minutes >= self._minutes and done >= self._renders:
                return
            if self._over.wait(EVERY_S) or self.faults:
                return


def _answers(http: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return http.get("/healthz").is_success
    return False


def _with_engines(roles: dict[str, subprocess.Popen[bytes]]) -> dict[str, psutil.Process]:
    """The processes and the engines of the workers. Raises if one has ended."""
    found = {}
    for name, process in roles.items():
        assert process.poll() is None, f"the {name} has ended"
        found[name] = psutil.Process(process.pid)
        for child in found[name].children():
            if "spawn_main" in " ".join(child.cmdline()):
                found[name.replace("worker", "engine")] = child
    return found


def table(series: dict[str, Series]) -> tuple[list[str], bool]:
    """Lines of a table, and whether all are flat."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    flat = True
    for name, one in series.items():
        rss, open_files = trend(one.minutes, one.rss), trend(one.minutes, one.descriptors)
        flat &= rss.flat and open_files.flat
        word = "" if rss.flat and open_files.flat else " GROWS"
        lines.append(
            f"| {name}{word} | {rss.first / 2**20:.1f} MiB | {rss.last / 2**20:.1f} MiB "
            f"| {rss.slope / 2**10:+.1f} KiB | {rss.noise / 2**10:.1f} KiB "
            f"| {open_files.first:.0f} .. {open_files.last:.0f} | {open_files.slope:+.2f} |"
        )
    return [*lines, "", *_courses(series)], flat


def _courses(series: dict[str, Series]) -> list[str]:
    """The whole course of each process' memory, the warm-up too: medians of BLOCKS stretches."""
    lines = []
    for name, one in series.items():
        medians = [np.median(block) / 2**20 for block in np.array_split(one.rss, BLOCKS)]
        lines.append(f"{name}, MiB: {' '.join(f'{rss:.0f}' for rss in medians)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="at least; default 20")
    parser.add_argument("--renders", type=int, default=1000, help="real pictures; default 1,000")
    parser.add_argument("--postgres", action="store_true", help="instead of SQLite")
    args = parser.parse_args()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory("-soak")))
        redis = stack.enter_context(RedisServer())
        url = stack.enter_context(PostgresServer()).create_database() if args.postgres else None
        kit = stack.enter_context(
            FarmKit(home, redis.url, database_url=url, models=FAST, session_ttl_s=30.0)
        )
        soak = Soak(kit, args.minutes, args.renders)
        soak.run()
        fast, real = soak.rendered("fast"), soak.rendered("shapes")
    lines, flat = table(soak.series)
    took = max(one.minutes[-1] for one in soak.series.values())
    database = "PostgreSQL" if args.postgres else "SQLite"
    print(
        f"{database}, {took:.0f} minutes: {fast:,} pictures by the fake engine, {real:,} by the "
        f"demo model, {soak.asked:,} HTTP requests, {soak.pruned:,} jobs pruned\n"
    )
    print("\n".join(lines))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
