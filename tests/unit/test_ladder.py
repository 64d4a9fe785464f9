"""Out of memory in the engine's process: each rung in its order, and what is kept of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.errors import EngineCrashed, EngineKilled, ModelNotLoaded
from farm.spec import JobSpec
from tests.unit.test_child import config, ends, error_of, spec, started
from workers.child import Child
from workers.messages import (
    Cap,
    Eased,
    Event,
    Lesson,
    Rendered,
    TooLarge,
)

MEMORY = 16 * 16 * 4  # one picture of 16x16, one byte a pixel, four times
Make = Callable[..., Child]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A child of MEMORY bytes; what is still there is killed in the end."""
    children: list[Child] = []

    def start(*, micro_batch: int = 4, strict: bool = False, **options: Any) -> Child:
        told = {"memory": MEMORY, "bytes_per_pixel": 1, "rungs": 2, **options}
        conf = config(micro_batch=micro_batch, strict=strict, **told)
        children.append(Child(conf, log=tmp_path / "engine.log"))
        assert children[-1].start().memory == MEMORY
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.close()


def jobs(n: int, side: int, **params: Any) -> list[JobSpec]:
    return [spec(seed=seed, width=side, height=side, **params) for seed in range(n)]


def lessons(events: list[Event]) -> list[Lesson]:
    return [event for event in events if isinstance(event, Lesson)]


# ------------------------------------------------------------------ the rungs, in their order
def test_what_fits_teaches_nothing(make: Make) -> None:
    events = list(make().render(jobs(8, 16)))
    assert ends(events) == dict.fromkeys(range(8), "rendered")
    assert lessons(events) == []


def test_first_smaller_micro_batches_then_the_engine_s_rungs(make: Make) -> None:
    child = make()
    events = list(child.render(jobs(4, 48)))  # each needs 2.25 of MEMORY
    assert ends(events) == dict.fromkeys(range(4), "rendered")
    assert lessons(events) == [Cap(2), Cap(1), Eased("rung 1", 1), Eased("rung 2", 2)]
    assert started(events) == [(0, 1, 2, 3), (0, 1), (0,), (0,), (0,), (1,), (2,), (3,)]
    again = list(child.render(jobs(4, 48)))
    assert lessons(again) == []
    assert started(again) == [(0,), (1,), (2,), (3,)]


def test_no_rung_more_than_needed(make: Make) -> None:
    events = list(make().render(jobs(1, 40)))  # needs 1.6 of MEMORY
    assert ends(events) == {0: "rendered"}
    assert lessons(events) == [Eased("rung 1", 1)]


def test_a_picture_that_never_fits_fails_and_its_size_is_refused_at_once(make: Make) -> None:
    child = make()
    events = list(child.render(jobs(3, 128)))  # each needs 16 of MEMORY
    assert ends(events) == dict.fromkeys(range(3), "ERR_OUT_OF_MEMORY")
    assert started(events)[-1] == (0,), "the other two are not tried"
    assert error_of(events, 0) == (
        "128x128 does not fit even alone (tried: rung 1; rung 2): 4096 bytes are more than 1024"
    )
    assert "128x128 is too large for this worker's memory" in error_of(events, 1)
    larger = list(child.render([spec(width=256, height=64, seed=1)]))
    assert ends(larger) == {0: "ERR_OUT_OF_MEMORY"}
    assert started(larger) == []
    assert ends(list(child.render(jobs(2, 16)))) == {0: "rendered", 1: "rendered"}


def test_what_did_not_help_is_not_kept(make: Make) -> None:
    child = make()
    list(child.render(jobs(1, 40)))
    first = child.pid
    events = list(child.render(jobs(4, 128)))
    assert lessons(events) == [
        Cap(2), Cap(1), Eased("rung 2", 2), Cap(4), TooLarge(128 * 128, 1),
    ]  # fmt: skip
    after = list(child.render(jobs(8, 16)))
    assert child.pid != first, "the process that was eased in vain is replaced"
    assert started(after) == [(0, 1, 2, 3), (4, 5, 6, 7)], "the cap is as it was"
    assert lessons(list(child.render(jobs(1, 40)))) == [], "one rung is kept, it was of use"
    assert lessons(list(child.render(jobs(1, 56)))) == [Eased("rung 2", 2)], "the other is not"
    refused = list(child.render(jobs(1, 128)))
    assert (ends(refused), started(refused)) == ({0: "ERR_OUT_OF_MEMORY"}, [])


def test_a_size_that_did_fit_is_tried_again_later(make: Make) -> None:
    """The memory was short for another reason: others may hold it for a while."""
    child = make(micro_batch=1, rungs=0, oom_above=0)
    assert ends(list(child.render(jobs(1, 16)))) == {0: "rendered"}
    short = list(child.render([spec("!oom", width=16, height=16)]))
    assert (ends(short), lessons(short)) == ({0: "ERR_OUT_OF_MEMORY"}, [])
    assert ends(list(child.render(jobs(1, 16)))) == {0: "rendered"}


def test_an_engine_that_always_knows_one_more_rung_is_not_asked_for_ever(make: Make) -> None:
    child = make(rungs=10**9, bytes_per_pixel=10**12)
    events = list(child.render(jobs(1, 16)))
    assert ends(events) == {0: "ERR_OUT_OF_MEMORY"}
    assert len(lessons(events)) == 16 + 1


# ------------------------------------------------------------------------------ strict
def test_strict_mode_walks_the_same_ladder_with_its_padding(make: Make) -> None:
    child = make(strict=True)
    events = list(child.render(jobs(1, 40)))  # four at once: 6.25 of MEMORY
    assert ends(events) == {0: "rendered"}
    assert lessons(events) == [Cap(2), Cap(1), Eased("rung 1", 1)]
    assert [event.batch for event in events if isinstance(event, Rendered)] == [1]


# --------------------------------------------------------------- kills, stops and cancels
def test_a_kill_on_the_ladder_loses_nothing_learnt(make: Make) -> None:
    child = make(seconds_per_step=0.05)
    events = child.render(jobs(2, 64, steps=20))  # each needs 4 of MEMORY
    seen: list[Event] = []

    def until_eased() -> None:
        for event in events:
            seen.append(event)
            if event == Eased("rung 1", 1):
                assert child.pid
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(EngineKilled, match="SIGKILL"):
        until_eased()
    assert ends(seen) == {}
    assert child.start().micro_batch == 1
    after = list(child.render(jobs(2, 64)))
    assert ends(after) == {0: "rendered", 1: "rendered"}
    assert lessons(after) in ([Eased("rung 2", 2)], []), "it goes on where it was"


@pytest.mark.parametrize("uninterruptible", [False, True])
def test_a_cancel_on_the_ladder(make: Make, uninterruptible: bool) -> None:
    child = make(seconds_per_step=0.02, uninterruptible=uninterruptible)
    events: list[Event] = []
    for event in child.render(jobs(2, 64, steps=50)):
        if event == Eased("rung 1", 1):
            child.cancel([0])
        events.append(event)
    assert ends(events) == {0: "ERR_CANCELLED", 1: "rendered"}
    assert ends(list(child.render(jobs(1, 16)))) == {0: "rendered"}


def test_a_stop_on_the_ladder_gives_back(make: Make) -> None:
    child = make(seconds_per_step=0.05)
    events: list[Event] = []
    for event in child.render(jobs(4, 64, steps=10)):
        if event == Cap(2):
            child.stop_after_current()
        events.append(event)
    found = set(ends(events).values())
    assert len(ends(events)) == 4
    assert found <= {"given back", "rendered"}
    assert "given back" in found


@pytest.mark.parametrize(
    ("how", "match"), [("ease_fails", "asked to fail while easing"), ("ease_crashes", "SIGABRT")]
)
def test_a_rung_that_breaks_the_engine_is_a_crash(make: Make, how: str, match: str) -> None:
    child = make(**{how: True})
    with pytest.raises(EngineCrashed, match=match):
        list(child.render(jobs(1, 64)))
    child.start()
    assert ends(list(child.render(jobs(1, 16)))) == {0: "rendered"}


# ------------------------------------------------------------------- refused up front
@pytest.mark.parametrize("limit", [None, 10**9])
def test_a_model_that_never_fits_is_not_loaded(limit: int | None) -> None:
    conf = config(memory=10**9, crash_in_load=limit is not None)
    conf = replace(conf, needs_memory=24 * 10**9, memory_limit=limit)
    match = r"needs 24 GB of memory .* may use 1 GB: start it on a larger device or .* memory_gb"
    with pytest.raises(ModelNotLoaded, match=match):
        Child(conf).start()


def test_a_model_that_fits_and_one_of_unknown_memory_are_loaded() -> None:
    for conf in (config(memory=10**9), config()):
        child = Child(replace(conf, needs_memory=10**9))
        assert child.start().memory in (10**9, None)
        child.close()


def test_the_memory_limit_counts() -> None:
    child = Child(replace(config(memory=10**9, bytes_per_pixel=1), memory_limit=MEMORY))
    assert child.start().memory == MEMORY
    assert ends(list(child.render(jobs(1, 64)))) == {0: "ERR_OUT_OF_MEMORY"}
    child.close()
