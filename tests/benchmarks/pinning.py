"""Which worker pins what: the farm's rule beside static pins and a plain one, on a simulated clock.

    python -m tests.benchmarks pinning

A night of batches for more models than there are workers; every policy gets the same ones. The
plain rule is `queued * 10 + seconds waiting`, asked again after each bundle.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from farm.catalog import Lane
from farm.pinning import Demand, Rule, pick

BUNDLE_S = 4.0
LANES = [Lane(f"model-{n}", "diffusers") for n in range(8)]
Policy = Callable[[list[Demand], Lane | None, float, int], Lane | None]


@dataclass
class Queue:
    """The waiting jobs of one lane, as (time, jobs) in order."""

    picture_s: float
    load_s: float
    waiting: list[list[float]] = field(default_factory=list)
    served_until: float = -1e9

    @property
    def queued(self) -> int:
        return int(sum(n for _, n in self.waiting))

    def take(self, now: float, most: int) -> tuple[int, float]:
        """(jobs taken, the longest that one of them had waited)."""
        taken, longest = 0, 0.0
        while self.waiting and taken < most:
            at, n = self.waiting[0]
            part = min(int(n), most - taken)
            taken, longest = taken + part, max(longest, now - at)
            self.waiting[0][1] -= part
            if not self.waiting[0][1]:
                self.waiting.pop(0)
        return taken, longest


@dataclass(frozen=True)
class Outcome:
    """`makespan_s`: until the last picture. `longest_s`: that a model waited without a worker."""

    makespan_s: float
    loads: int
    longest_s: float
    mean_s: float


def simulate(
    arrivals: Sequence[tuple[float, int, int]], queues: list[Queue], workers: int, policy: Policy
) -> Outcome:
    """`arrivals`: (time, lane, jobs), in order of time. Workers render bundles of BUNDLE_S."""
    coming = list(arrivals)
    pinned: list[Lane | None] = [None] * workers
    since = [0.0] * workers
    loads, longest, end, total, waited = 0, 0.0, 0.0, 0, 0.0
    turns = [(0.0, number) for number in range(workers)]
    while turns:
        now, number = heapq.heappop(turns)
        while coming and coming[0][0] <= now:
            at, lane, jobs = coming.pop(0)
            queues[lane].waiting.append([at, jobs])
        others = [p for i, p in enumerate(pinned) if i != number]
        demands = [_demand(lane, q, now, others) for lane, q in zip(LANES, queues, strict=False)]
        chosen = policy(demands, pinned[number], now - since[number], number)
        if chosen is not None and chosen != pinned[number]:
            left = pinned[number]
            if left is not None:
                queues[LANES.index(left)].served_until = now
            pinned[number], since[number], loads = chosen, now, loads + 1
            queue = queues[LANES.index(chosen)]
            if not others.count(chosen):
                longest = max(longest, _waiting(queue, now) + queue.load_s)
            heapq.heappush(turns, (now + queue.load_s, number))
            continue
        if chosen is not None:
            queue = queues[LANES.index(chosen)]
            most = max(1, int(BUNDLE_S / queue.picture_s))
            taken, oldest = queue.take(now, most)
            if taken:
                end = max(end, now + taken * queue.picture_s)
                total, waited = total + taken, waited + taken * oldest
                heapq.heappush(turns, (now + taken * queue.picture_s, number))
                continue
        if coming or any(q.waiting for q in queues):
            heapq.heappush(turns, (max(now + 1.0, coming[0][0] if _idle(queues) else 0.0), number))
    return Outcome(end, loads, longest, waited / max(total, 1))


def _idle(queues: list[Queue]) -> bool:
    return not any(q.waiting for q in queues)


def _waiting(queue: Queue, now: float) -> float:
    return now - max(queue.waiting[0][0], queue.served_until) if queue.waiting else 0.0


def _demand(lane: Lane, queue: Queue, now: float, others: list[Lane | None]) -> Demand:
    waiting = _waiting(queue, now)
    served = others.count(lane)
    return Demand(lane, queue.queued, waiting, 0, queue.picture_s, queue.load_s, served)


def by_rule(rule: Rule) -> Policy:
    return lambda demands, current, served_s, number: pick(demands, current, served_s, rule)


def static(workers: int) -> Policy:
    """Each worker its lanes, one after the other as they have work; a lane has one worker."""

    def policy(
        demands: list[Demand], current: Lane | None, served_s: float, number: int
    ) -> Lane | None:
        mine = [d for place, d in enumerate(demands) if place % workers == number and d.queued]
        if any(d.lane == current for d in mine):
            return current
        return mine[0].lane if mine else current

    return policy


def plain(demands: list[Demand], current: Lane | None, served_s: float, number: int) -> Lane | None:
    waiting = [d for d in demands if d.queued]
    best = max(waiting, key=lambda d: d.queued * 10 + d.waiting_s, default=None)
    return best.lane if best else current


def night(seed: int) -> tuple[list[tuple[float, int, int]], list[Queue]]:
    """Eight hours of batches: few large, many small, models of unlike speed and load."""
    draw = random.Random(seed)
    queues = [Queue(draw.choice([0.2, 0.5, 1, 4]), draw.uniform(10, 120)) for _ in LANES]
    arrivals = []
    for lane, queue in enumerate(queues):
        for _ in range(draw.randint(1, 6)):
            seconds = draw.choice([30, 60, 300, 1200, 3600])
            arrivals.append(
                (draw.uniform(0, 6 * 3600), lane, max(1, int(seconds / queue.picture_s)))
            )
    return sorted(arrivals), queues


def run() -> str:
    """The table, over twenty nights with three workers."""
    workers, nights = 3, 20
    policies = {
        "the farm's rule": by_rule(Rule()),
        "static pins": static(workers),
        "queued * 10 + seconds waiting": plain,
    }
    lines = [
        "| policy | makespan, h | loads | longest wait of a model, s | mean wait of a job, s |",
        "|---|---|---|---|---|",
    ]
    for name, policy in policies.items():
        found = [simulate(*night(seed), workers, policy) for seed in range(nights)]
        makespan = sum(o.makespan_s for o in found) / nights / 3600
        loads, mean = (
            sum(v) / nights for v in zip(*[(o.loads, o.mean_s) for o in found], strict=True)
        )
        longest = max(o.longest_s for o in found)
        lines.append(f"| {name} | {makespan:.2f} | {loads:.0f} | {longest:.0f} | {mean:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(run())
