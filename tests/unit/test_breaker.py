"""When a worker stops taking work, and what brings it back."""

from __future__ import annotations

import random

import pytest

from farm.errors import (
    BadImage,
    EngineCrashed,
    FarmError,
    InvalidParameter,
    JobCancelled,
    ModelNotLoaded,
    OutOfMemory,
    RenderFailed,
    StorageUnavailable,
)
from farm.store.ids import JobRef
from workers.breaker import MAX_REST_S, MOST_FAILURES, REST_S, Breaker
from workers.stall import Stall

WHITE = BadImage("all pixels have the same value, 255")


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def ref(n: int) -> JobRef:
    return JobRef("batch", n)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Breaker:
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    return Breaker(clock)


def fail(breaker: Breaker, n: int, error: FarmError = WHITE, first: int = 0) -> None:
    for i in range(first, first + n):
        breaker.failed(ref(i), error)


def opened(breaker: Breaker) -> Breaker:
    fail(breaker, MOST_FAILURES)
    assert breaker.is_open
    return breaker


def test_it_opens_after_different_jobs_in_a_row(breaker: Breaker) -> None:
    fail(breaker, MOST_FAILURES - 1)
    assert not breaker.is_open
    assert breaker.note == ""
    fail(breaker, 1, first=MOST_FAILURES - 1)
    assert breaker.is_open
    assert breaker.rest_s() == 0, "the first test comes at once"
    assert "tests itself now: 5 jobs in a row failed here, the last with ERR_BAD" in breaker.note


def test_a_picture_between_and_one_job_again_and_again_do_not_open_it(breaker: Breaker) -> None:
    fail(breaker, MOST_FAILURES - 1)
    breaker.succeeded()
    fail(breaker, MOST_FAILURES - 1)
    for _ in range(20):
        breaker.failed(ref(0), WHITE)
    assert not breaker.is_open


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (RenderFailed("odd"), True),
        (OutOfMemory("none"), True),
        (EngineCrashed("SIGABRT"), True),
        (ModelNotLoaded("no file"), True),
        (InvalidParameter("steps"), False),
        (StorageUnavailable("away"), False),
        (JobCancelled(), False),
    ],
)
def test_what_a_worker_is_blamed_for(breaker: Breaker, error: FarmError, blamed: bool) -> None:
    fail(breaker, MOST_FAILURES, error)
    assert breaker.is_open is blamed


def test_an_engine_that_dies_before_any_job_counts(breaker: Breaker) -> None:
    for _ in range(MOST_FAILURES):
        breaker.failed(None, EngineCrashed("SIGSEGV"))
    assert breaker.is_open


def test_rests_double_up_to_a_bound_while_tests_fail(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    rests = []
    for _ in range(8):
        breaker.tested(WHITE)
        rests.append(breaker.rest_s())
        clock.at += breaker.rest_s()
    assert rests[:3] == [REST_S, 2 * REST_S, 4 * REST_S]
    assert rests[-1] == MAX_REST_S
    assert "its self-test failed, ERR_BAD_IMAGE" in breaker.note
    breaker.tested(None)
    assert not breaker.is_open
    assert breaker.is_half_open
    assert breaker.note.startswith("takes single jobs until a picture is stored: its self-test")
    breaker.succeeded()
    assert not breaker.is_half_open
    opened(breaker).tested(WHITE)
    assert breaker.rest_s() == REST_S, "all is forgotten"


def test_half_open_one_failure_opens_it_again(breaker: Breaker) -> None:
    opened(breaker).tested(None)
    fail(breaker, 1, first=77)
    assert breaker.is_open
    assert breaker.rest_s() == 0, "with bad jobs only, it comes back as often as it is well"
    assert "a job alone failed here" in breaker.note


def test_who_fails_what_others_render_rests_though_its_test_passes(
    breaker: Breaker, clock: Clock
) -> None:
    opened(breaker).tested(None, done_elsewhere=3)
    assert breaker.is_open
    assert breaker.rest_s() == REST_S
    assert "tests itself in 10 s: others rendered 3 of the jobs that failed here" in breaker.note
    clock.at += REST_S
    breaker.tested(None, done_elsewhere=4)
    assert breaker.is_half_open
    fail(breaker, 1, first=77)
    breaker.tested(None, done_elsewhere=5)
    assert breaker.rest_s() == 2 * REST_S, "longer each time"


def test_jobs_that_need_more_memory_are_no_evidence(breaker: Breaker) -> None:
    fail(breaker, 2, OutOfMemory("none"))
    fail(breaker, 2, first=10)
    assert breaker.blamable() == [ref(10), ref(11)]


def test_a_picture_from_before_does_not_close_it(breaker: Breaker) -> None:
    opened(breaker).succeeded()
    assert breaker.is_open


def test_an_engine_that_does_not_start_is_waited_for(breaker: Breaker) -> None:
    breaker.trip(ModelNotLoaded("weights.safetensors is not there"))
    assert breaker.is_open
    assert breaker.rest_s() == REST_S
    assert "ERR_MODEL_NOT_LOADED: weights.safetensors is not there" in breaker.note


def test_a_stall_is_noticed_but_not_one_that_the_whole_process_slept_through(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", clock)
    stall = Stall(limit_s=60.0)

    def looks(n: int, every_s: float = 1.0) -> bool:
        hangs = False
        for _ in range(n):
            clock.at += every_s
            hangs = stall.look()
        return hangs

    assert not looks(100), "nothing is under way"
    stall.sign()
    assert not looks(59)
    stall.sign()
    assert not looks(1, every_s=3600.0), "stopped, and woken"
    assert not looks(50)
    assert looks(1)
    stall.pause()
    assert not looks(100)
