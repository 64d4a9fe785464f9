"""One chaos run: jobs, faults in an order drawn from a seed, then an audit of what is left.

Faults are paced by work, not by time: before each one the farm must have finished its share of the
jobs, so a farm that has stopped is found at the fault that stopped it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from farm.store.reads import Job
from tests.chaos import faults
from tests.chaos.audit import Audit, audit
from tests.chaos.farm_under_fire import LANE, FarmUnderFire
from tests.chaos.faults import Fault
from tests.servers import PostgresServer, RedisServer, S3Server

OWNERS = ("", "ada", "grace")
FORMATS = ("png", "webp", "jpeg")


@dataclass(frozen=True)
class Plan:
    """How many jobs, and how often each fault strikes; `outage_s` is the length of S3's."""

    jobs: int = 2000  # at least; as many as the faults take
    batch: int = 120  # jobs of one; with fewer open, another is submitted
    seconds_per_step: float = 0.2
    outage_s: float = 10.0
    stuck_s: float = 120.0  # without a job done in so long the farm has stopped
    idle: tuple[str, ...] = ("Redis restarted, all data lost", "Redis silent")  # strike idle farms
    times: dict[str, int] = field(
        default_factory=lambda: {
            "worker killed": 30,
            "engine killed": 20,
            "worker stopped longer than its lease": 10,
            "Redis restarted": 5,
            "Redis restarted, all data lost": 5,
            "Redis silent": 3,
            "database restarted": 5,
            "S3 away or silent": 5,
            "database silent": 3,
            "connections to the database reset": 5,
            "connections to Redis reset": 5,
            "connections to S3 reset": 5,
            "answers of the database lost": 20,
            "answers of Redis lost": 5,
            "answers of S3 lost": 5,
            "upload to S3 cut off": 5,
            "S3 slow": 3,
            "dispatcher killed": 5,
            "dispatcher stopped longer than its lead": 5,
            "token doubled": 50,
            "foreign message": 10,
        }
    )

    def without_a_database_server(self) -> Plan:
        """SQLite has none."""
        return replace(self, times={k: n for k, n in self.times.items() if "database" not in k})


FULL = Plan()
SHORT = Plan(
    jobs=160,
    batch=60,
    idle=("Redis restarted, all data lost",),
    seconds_per_step=0.1,
    outage_s=3.0,
    stuck_s=60.0,
    times={
        "worker killed": 3,
        "engine killed": 2,
        "worker stopped longer than its lease": 1,
        "Redis restarted": 1,
        "Redis restarted, all data lost": 1,
        "Redis silent": 1,
        "database restarted": 1,
        "S3 away or silent": 1,
        "connections to the database reset": 1,
        "answers of the database lost": 2,
        "answers of Redis lost": 1,
        "answers of S3 lost": 1,
        "upload to S3 cut off": 1,
        "dispatcher killed": 1,
        "dispatcher stopped longer than its lead": 1,
        "token doubled": 5,
        "foreign message": 4,
    },
)
FAULTS: dict[str, Fault] = {
    "worker killed": faults.kill_worker,
    "engine killed": faults.kill_engine,
    "worker stopped longer than its lease": faults.stop_worker,
    "Redis restarted": faults.restart_redis,
    "Redis restarted, all data lost": faults.lose_redis,
    "Redis silent": faults.silence_redis,
    "database restarted": faults.restart_database,
    "database silent": faults.silence_database,
    "connections to the database reset": faults.reset("database"),
    "connections to Redis reset": faults.reset("Redis"),
    "connections to S3 reset": faults.reset("S3"),
    "answers of the database lost": faults.lose_answer("database"),
    "answers of Redis lost": faults.lose_answer("Redis"),
    "answers of S3 lost": faults.lose_answer("S3"),
    "upload to S3 cut off": faults.cut_upload,
    "S3 slow": faults.slow_s3,
    "dispatcher killed": faults.kill_dispatcher,
    "dispatcher stopped longer than its lead": faults.stop_dispatcher,
    "token doubled": faults.forge,
    "foreign message": faults.forge_foreign,
}
BESIDE = ("worker killed", "engine killed", "Redis restarted", "dispatcher killed")


def schedule(plan: Plan, rng: random.Random) -> list[tuple[str, str]]:
    """Faults in the order in which they strike, each with one that strikes beside it or ''.

    Beside an outage of S3 another fault of the plan strikes, so that held pictures meet kills.
    """
    left = Counter(plan.times)
    outages = left.pop("S3 away or silent", 0)
    drawn: list[tuple[str, str]] = []
    for _ in range(outages):
        beside = rng.choice([name for name in ("", *BESIDE) if not name or left[name] > 0])
        left[beside] -= 1 if beside else 0
        drawn.append(("S3 away or silent", beside))
    drawn += [(name, "") for name in left.elements()]
    rng.shuffle(drawn)
    return drawn


@dataclass
class Report:
    """What a run did and found. Times in seconds."""

    seed: int
    database: str
    jobs: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    recovered: dict[str, list[float]] = field(default_factory=dict)
    mustered: list[float] = field(default_factory=list)
    seconds: float = 0.0
    starts: int = 0
    tokens: int = 0
    audit: Audit = field(default_factory=Audit)

    def text(self) -> str:
        lines = [
            f"chaos, seed {self.seed}, {self.database}: {self.jobs} jobs in {self.seconds:.0f} s"
        ]
        lines += [f"  {'fault':<40}{'times':>6}   next picture after, median / worst"]
        for name, n in sorted(self.struck.items()):
            times = self.recovered.get(name, [])
            took = f"{statistics.median(times):.1f} s / {max(times):.1f} s" if times else "-"
            lines.append(f"  {name:<40}{n:>6}   {took}")
        lines += [f"  processes started: {self.starts}; most tokens in Redis: {self.tokens}"]
        if self.mustered:
            lines += [
                f"  Redis away from an idle farm, {len(self.mustered)} times: every worker renders "
                f"again after {max(self.mustered):.1f} s at worst"
            ]
        return "\n".join([*lines, *self.audit.lines()])


def run(
    home: Path,
    plan: Plan,
    seed: int,
    redis: RedisServer,
    s3: S3Server,
    postgres: PostgresServer | None,
    *,
    say: bool = False,
) -> Report:
    """Play the plan and audit what it left. Raises TimeoutError where the farm has stopped."""
    if postgres is None:
        plan = plan.without_a_database_server()
    rng = random.Random(seed)
    report = Report(seed, "PostgreSQL" if postgres else "SQLite")
    began = time.monotonic()
    with FarmUnderFire(home, redis, s3, postgres, seconds_per_step=plan.seconds_per_step) as farm:
        farm.start()
        work = Work(farm, plan, random.Random(seed))
        drawn = schedule(plan, rng)
        for i, (name, beside) in enumerate(drawn):
            before = sum(report.struck.values())
            work.go_on(plan.jobs // len(drawn), f"after {before} faults", plan.stuck_s)
            if say:
                took = time.monotonic() - began
                print(f"{took:7.1f} s {farm.done():>6} done  {name}  {beside}", flush=True)
            _strike(farm, rng, plan, report, work, name, beside)
            if i % 8 == 0:
                work.witness()
        work.submit(max(0, plan.jobs - work.submitted))
        work.muster(plan.stuck_s)
        work.finish(plan.stuck_s)
        farm.stop_all()
        report.jobs, report.starts, report.tokens = work.submitted, farm.starts, farm.tokens_seen
        report.seconds = time.monotonic() - began
        report.audit = audit(farm.farm, work.batches, work.witnessed, LANE)
        report.audit.wrong += _mended_on_the_way(farm)
    return report


def _mended_on_the_way(farm: FarmUnderFire) -> list[str]:
    """What the dispatchers repaired although nothing may break it: a fault of the farm's own."""
    logs = (farm.log(name) for name in farm.roles if name.startswith("dispatcher"))
    return [line for log in logs for line in log.splitlines() if "put right" in line]


class Work:
    """Keeps the farm in work while faults strike, with batches of several kinds."""

    def __init__(self, farm: FarmUnderFire, plan: Plan, rng: random.Random) -> None:
        self._farm, self._batch, self._rng = farm, plan.batch, rng
        self.batches: list[str] = []
        self.submitted = 0
        self.witnessed: dict[str, Job] = {}

    def submit(self, n: int) -> None:
        """One more batch of `n` jobs; no two jobs of a run are the same picture."""
        if not n:
            return
        number = len(self.batches)
        rows = [
            {
                "prompt": f"batch {number} picture {j}",
                "seed": j,
                "format": self._rng.choice(FORMATS),
            }
            for j in range(n)
        ]
        owner, priority = self._rng.choice(OWNERS), self._rng.randrange(3)
        batch = self._farm.farm.submit(rows, model=LANE.model, owner=owner, priority=priority)
        self.batches.append(batch.id)
        self.submitted += n

    def go_on(self, n: int, when: str, stuck_s: float) -> None:
        """Return when `n` more jobs have succeeded and enough wait for what comes next."""
        self._farm.wait_for(lambda: self._farm.done() is not None, "the database", stuck_s)
        done = self._farm.done() or 0
        if self.submitted - done < self._batch:
            self.submit(self._batch)
        self._farm.wait_done(done + n, when, stuck_s)

    def muster(self, stuck_s: float) -> None:
        """Return when each worker has rendered something: none is deaf, none has given up.

        While there is work no worker listens for tokens, so this begins with an empty lane.
        """
        self.finish(stuck_s)
        farm = self._farm
        farm.wait_for(lambda: len(farm.live()) == farm.size, "all workers", stuck_s)
        before = {worker.pid: worker.rendered for worker in farm.farm.workers()}

        def all_did() -> bool:
            if self._ended():
                self.submit(self._batch // 2)
            return all(w.rendered > before.get(w.pid, 0) for w in farm.farm.workers())

        farm.wait_for(all_did, "a picture of each worker", stuck_s)

    def witness(self) -> None:
        """Keep what is recorded as succeeded now; nothing may ever change it."""
        for batch_id in self.batches:
            for job in self._farm.farm.pictures(batch_id):
                self.witnessed.setdefault(job.id, job)

    def finish(self, stuck_s: float) -> None:
        """Wait until all is done; each time that takes long, something must have succeeded."""
        while not self._ended():
            done = self._farm.done() or 0
            self._farm.wait_for(
                lambda done=done: self._ended() or (self._farm.done() or 0) > done,  # type: ignore[misc]
                f"the rest, {done} of {self.submitted} are done", stuck_s,
            )  # fmt: skip

    def _ended(self) -> bool:
        return all(self._farm.farm.status(batch_id).done for batch_id in self.batches)


def _strike(
    farm: FarmUnderFire,
    rng: random.Random,
    plan: Plan,
    report: Report,
    work: Work,
    name: str,
    beside: str,
) -> None:
    """Strike, and wait for the next picture; on an idle farm, for one of each worker."""
    fault = FAULTS.get(name) or faults.s3_outage(plan.outage_s, FAULTS.get(beside))
    if name in plan.idle:
        work.finish(plan.stuck_s)
    fault(farm, rng)
    report.struck.update(part for part in (name, beside) if part)
    let_go = time.monotonic()
    if name in plan.idle:
        work.muster(plan.stuck_s)
        report.mustered.append(time.monotonic() - let_go)
    else:
        work.go_on(1, f"after: {name} {beside}", plan.stuck_s)
        report.recovered.setdefault(name, []).append(time.monotonic() - let_go)
