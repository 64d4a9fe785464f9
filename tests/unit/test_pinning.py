from __future__ import annotations

from typing import Any

import pytest

from farm.catalog import Lane
from farm.pinning import Demand, Rule, pick
from tests.benchmarks.pinning import by_rule, night, plain, simulate, static

A, B, C = (Lane(name, "diffusers") for name in "abc")


def demand(lane: Lane, queued: int = 0, **more: Any) -> Demand:
    known = {"waiting_s": 0.0, "priority": 0, "picture_s": 1.0, "load_s": 30.0, "workers": 0}
    return Demand(lane, queued, **(known | more))


def test_nothing_waits_nothing_changes() -> None:
    assert pick([demand(A), demand(B)], None, 0.0) is None
    assert pick([demand(A), demand(B)], A, 1e6) == A


def test_an_idle_worker_takes_what_waits() -> None:
    assert pick([demand(A), demand(B, 5)], A, 0.0) == B
    assert pick([demand(A, 500), demand(B, 5)], None, 0.0) == A


def test_a_loaded_model_is_kept_while_it_has_work() -> None:
    assert pick([demand(A, 20), demand(B, 500)], A, 10.0) == A  # it has just been loaded
    assert pick([demand(A, 300), demand(B, 500)], A, 1e4) == A


def test_a_worker_is_drawn_to_where_nobody_serves() -> None:
    alone, served = demand(B, 400), demand(C, 500, workers=3)
    assert pick([served, alone], None, 0.0) == B


def test_what_waits_too_long_comes_first() -> None:
    waits = demand(B, 1, waiting_s=890.0)
    assert pick([demand(A, 5000), waits], A, 91.0) == B
    assert pick([demand(A, 5000), waits], A, 89.0) == A  # but a load pays for itself first
    assert pick([demand(A, 5000), demand(B, 1, waiting_s=890.0, workers=1)], A, 1e4) == A


def test_priority_goes_before_worth_where_one_more_worker_helps() -> None:
    assert pick([demand(A, 5000), demand(B, 60, priority=5)], A, 1e3) == B
    helped = demand(B, 60, priority=5, workers=4)
    assert pick([demand(A, 5000), helped], A, 1e3) == A


@pytest.mark.parametrize("seed", range(4))
def test_over_a_night_it_loads_little_and_lets_nobody_wait(seed: int) -> None:
    ours = simulate(*night(seed), 3, by_rule(Rule()))
    pinned = simulate(*night(seed), 3, static(3))
    naive = simulate(*night(seed), 3, plain)
    _, queues = night(seed)
    every_load = sum(queue.load_s for queue in queues)
    assert ours.longest_s < Rule().longest_wait_s + (1 + Rule().stay) * every_load
    assert ours.makespan_s <= min(pinned.makespan_s, naive.makespan_s) * 1.02
    assert ours.loads < naive.loads / 5
    assert ours.mean_s < pinned.mean_s
