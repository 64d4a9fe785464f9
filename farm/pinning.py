"""Which lane a worker should serve, when it may choose: the rule, over what is known of each lane.

Loading a model is time in which nothing is rendered, so a lane is worth the part of the time that
would go into pictures: w / (w + load), where w is the worker's share of the lane's waiting work,
seen at most `horizon_s` ahead; the lane that is loaded has no load to pay. Nobody's waiting makes a
lane worth more, and past `longest_wait_s` it comes first. What is gained must be worth the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farm.catalog import Lane


@dataclass(frozen=True)
class Demand:
    """What is known of a lane. Times in seconds.

    `queued`: jobs that it may take; `waiting_s`: since the oldest of them was queued, or since a
    worker last served the lane; `workers`: others that serve it now.
    """

    lane: Lane
    queued: int
    waiting_s: float
    priority: int
    picture_s: float
    load_s: float
    workers: int


@dataclass(frozen=True)
class Rule:
    """The farm's preferences. Times in seconds.

    `hysteresis`: how many times better another lane must be. `stay`: the least time on a lane
    that has work, in times of its load.
    """

    horizon_s: float = 600.0
    longest_wait_s: float = 900.0
    hysteresis: float = 1.3
    stay: float = 3.0


def pick(
    demands: Sequence[Demand], current: Lane | None, served_s: float, rule: Rule | None = None
) -> Lane | None:
    """The lane to serve next; the current one where no other is worth the change.

    `served_s`: how long the current one is served now. None: nothing is loaded, nothing waits.
    """
    rule = rule or Rule()
    here = next((d for d in demands if d.lane == current), None)
    best = max(
        (d for d in demands if d.queued),
        key=lambda d: _rank(d, current, rule),
        default=None,
    )
    if best is None or best is here:
        return current
    if here is None or not here.queued:
        return best.lane
    if served_s < rule.stay * here.load_s:
        return current
    if best.priority > here.priority or _overdue(best, rule):
        return best.lane
    worth = _worth(best, current, rule) > rule.hysteresis * _worth(here, current, rule)
    return best.lane if worth else current


def _rank(demand: Demand, current: Lane | None, rule: Rule) -> tuple[bool, int, float]:
    """Overdue ones first, then by priority where one more worker helps, then by worth."""
    helps = not demand.workers or _share(demand, rule) > demand.load_s
    priority = demand.priority if helps else -(2**31)
    return _overdue(demand, rule), priority, _worth(demand, current, rule)


def _overdue(demand: Demand, rule: Rule) -> bool:
    return not demand.workers and demand.waiting_s + demand.load_s > rule.longest_wait_s


def _share(demand: Demand, rule: Rule) -> float:
    """Seconds of the lane's waiting work that would be this worker's."""
    return min(demand.queued * demand.picture_s / (demand.workers + 1), rule.horizon_s)


def _worth(demand: Demand, current: Lane | None, rule: Rule) -> float:
    share = _share(demand, rule)
    load = 0.0 if demand.lane == current else demand.load_s
    alone = 1.0 + (0.0 if demand.workers else demand.waiting_s / rule.longest_wait_s)
    return alone * share / max(share + load, 1e-9)
