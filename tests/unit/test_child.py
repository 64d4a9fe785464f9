"""The engine's own process: what it tells, what it survives, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from farm.catalog import Weights
from farm.errors import (
    EngineCrashed,
    EngineHung,
    EngineKilled,
    InvalidConfig,
    InvalidParameter,
    ModelNotLoaded,
)
from farm.spec import JobSpec
from tests.servers import has_ended, poll
from workers import deaths
from workers.child import Child
from workers.engine import EngineConfig
from workers.messages import Cap, Event, Failed, GivenBack, Progress, Rendered, Shipped, Started

SOON_S = 10.0
"""What must come at once comes within this, also on a busy machine; else it takes a minute."""

Make = Callable[..., Child]


def spec(prompt: str = "a cat", seed: int = 1, **params: Any) -> JobSpec:
    size = {"width": 16, "height": 24, "steps": 2, "guidance_scale": 1.0}
    return JobSpec(model="fake", prompt=prompt, seed=seed, **{**size, **params})


def config(micro_batch: int = 4, strict: bool = False, **options: Any) -> EngineConfig:
    return EngineConfig(
        "fake", "fake", Weights(options=options), micro_batch=micro_batch, strict=strict
    )


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Start a child; what is still there is killed in the end."""
    children: list[Child] = []

    def start(timeout_s: float = 60.0, decode_s: float = 60.0, **settings: Any) -> Child:
        limits = {"step_timeout_s": timeout_s, "decode_timeout_s": decode_s}
        children.append(Child(config(**settings), **limits, log=tmp_path / "engine.log"))
        children[-1].start()
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.close()


def ends(events: list[Event]) -> dict[int, str]:
    """Each job's end: "rendered", "given back" or an error's code; exactly one a job."""
    found: dict[int, str] = {}
    for event in events:
        if isinstance(event, Rendered | Failed | GivenBack):
            assert event.id not in found
            found[event.id] = {Rendered: "rendered", GivenBack: "given back"}.get(
                type(event), getattr(getattr(event, "error", None), "code", "")
            )
    return found


def error_of(events: list[Event], job: int) -> str:
    return next(e.error.message for e in events if isinstance(e, Failed) and e.id == job)


def started(events: list[Event]) -> list[tuple[int, ...]]:
    return [event.ids for event in events if isinstance(event, Started)]


def pictures(events: list[Event]) -> dict[int, bytes]:
    return {event.id: event.pixels.tobytes() for event in events if isinstance(event, Rendered)}


# --------------------------------------------------------------------- the plain way
def test_a_bundle_is_rendered_in_micro_batches_of_the_cap(make: Make) -> None:
    child = make(micro_batch=4)
    events = list(child.render([spec(seed=n) for n in range(10)]))
    assert ends(events) == dict.fromkeys(range(10), "rendered")
    assert started(events) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    rendered = [event for event in events if isinstance(event, Rendered)]
    assert {event.pixels.shape for event in rendered} == {(24, 16, 3)}
    assert {event.pixels.dtype for event in rendered} == {np.dtype(np.uint8)}
    assert [event.batch for event in rendered] == [4] * 8 + [2] * 2
    assert len(set(pictures(events).values())) == 10


def test_small_and_large_pictures_cross_the_pipe_whole(make: Make) -> None:
    child = make(micro_batch=3)
    for side in (16, 512, 1024):  # together, one by one, more than the pipe holds
        specs = [spec(seed=i, width=side, height=side, steps=1) for i in range(3)]
        together = pictures(list(child.render(specs)))
        alone = [pictures(list(child.render([one])))[0] for one in specs]
        assert [together[i] for i in range(3)] == alone
        assert len(set(alone)) == 3


def test_info_pid_and_the_same_bytes_in_a_new_process(make: Make) -> None:
    child = make()
    before = pictures(list(child.render([spec(seed=n) for n in range(3)])))
    first = child.pid
    assert child.alive
    info = child.start()
    assert (info.device, info.micro_batch, len(info.weights_sha256)) == ("cpu", 4, 64)
    assert child.pid != first
    assert pictures(list(child.render([spec(seed=n) for n in range(3)]))) == before


def test_strict_mode_runs_each_micro_batch_in_one_size(make: Make) -> None:
    events = list(make(micro_batch=4, strict=True).render([spec(seed=n) for n in range(5)]))
    assert ends(events) == dict.fromkeys(range(5), "rendered")
    assert {event.batch for event in events if isinstance(event, Rendered)} == {4}


def test_progress_is_a_few_times_a_second(make: Make) -> None:
    child = make(seconds_per_step=0.01)
    begun = time.monotonic()
    events = list(child.render([spec(steps=100)]))
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    assert fractions == sorted(fractions)
    assert 2 <= len(fractions) <= 2 + 5 * (time.monotonic() - begun)
    assert all(0 < fraction <= 1 for fraction in fractions)


def test_jobs_of_two_keys_are_no_bundle(make: Make) -> None:
    with pytest.raises(InvalidParameter, match="one compatibility key"):
        make().render([spec(), spec(steps=3)])


def test_an_empty_bundle(make: Make) -> None:
    child = make()
    assert list(child.render([])) == []
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_events_left_unread_do_not_reach_the_next_bundle(make: Make) -> None:
    child = make(micro_batch=1, seconds_per_step=0.02)
    events = child.render([spec(seed=n) for n in range(50)])
    next(events)
    assert ends(list(child.render([spec("next")]))) == {0: "rendered"}
    assert list(events) == []


# ------------------------------------------------------------------ failures of a job
def test_only_the_guilty_job_of_a_micro_batch_fails(make: Make) -> None:
    events = list(make().render([spec(), spec("!fail"), spec(seed=3), spec(seed=4)]))
    assert ends(events) == {0: "rendered", 1: "ERR_RENDER_FAILED", 2: "rendered", 3: "rendered"}
    assert error_of(events, 1) == "ValueError: asked to fail"


def test_a_uniform_picture_fails_alone(make: Make) -> None:
    events = list(make().render([spec(), spec("!white"), spec(seed=3)]))
    assert ends(events) == {0: "rendered", 1: "ERR_BAD_IMAGE", 2: "rendered"}
    assert started(events) == [(0, 1, 2)]


def test_out_of_memory_halves_the_cap_and_keeps_it(make: Make) -> None:
    child = make(micro_batch=8, oom_above=2)
    jobs = [spec("!oom", seed=n) for n in range(8)]
    events = list(child.render(jobs))
    assert ends(events) == dict.fromkeys(range(8), "rendered")
    assert [event.size for event in events if isinstance(event, Cap)] == [4, 2]
    again = list(child.render(jobs))
    assert [len(ids) for ids in started(again)] == [2, 2, 2, 2]
    child.kill()
    assert child.start().micro_batch == 2


def test_out_of_memory_alone_is_the_jobs_end(make: Make) -> None:
    events = list(make(micro_batch=2, oom_above=0).render([spec("!oom"), spec("!oom", seed=2)]))
    assert ends(events) == dict.fromkeys(range(2), "ERR_OUT_OF_MEMORY")


def test_out_of_memory_in_strict_mode_counts_the_padding(make: Make) -> None:
    child = make(micro_batch=4, strict=True, oom_above=2)
    events = list(child.render([spec("!oom")]))
    assert [event.size for event in events if isinstance(event, Cap)] == [2]
    assert [event.batch for event in events if isinstance(event, Rendered)] == [2]


# ----------------------------------------------------------------- cancel and stop
def test_a_cancelled_job_leaves_the_others_of_its_micro_batch(make: Make) -> None:
    child = make(micro_batch=2, seconds_per_step=0.05)
    events: list[Event] = []
    for event in child.render([spec(seed=n, steps=20) for n in range(4)]):
        if isinstance(event, Started):
            child.cancel([1, 2])
        events.append(event)
    assert ends(events) == {
        0: "rendered",
        1: "ERR_CANCELLED",
        2: "ERR_CANCELLED",
        3: "rendered",
    }
    assert started(events) == [(0, 1), (3,)]


def test_a_wholly_cancelled_micro_batch_stops_between_steps(make: Make) -> None:
    child = make(micro_batch=2, seconds_per_step=0.05)
    events: list[Event] = []
    begun = time.monotonic()
    for event in child.render([spec(seed=n, steps=500) for n in range(3)]):
        if isinstance(event, Started):
            child.cancel(range(3))
        events.append(event)
    assert ends(events) == dict.fromkeys(range(3), "ERR_CANCELLED")
    assert started(events) == [(0, 1)]
    assert time.monotonic() - begun < 5
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_stop_gives_back_what_is_not_begun(make: Make) -> None:
    child = make(micro_batch=2, seconds_per_step=0.05)
    events: list[Event] = []
    for event in child.render([spec(seed=n, steps=20) for n in range(6)]):
        if isinstance(event, Started):
            child.stop_after_current()
        events.append(event)
    given = dict.fromkeys(range(2, 6), "given back")
    assert ends(events) == {0: "rendered", 1: "rendered", **given}
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_a_stop_between_two_bundles_gives_the_next_back(make: Make) -> None:
    child = make()
    list(child.render([spec()]))
    child.stop_after_current()
    assert ends(list(child.render([spec(), spec(seed=2)]))) == {0: "given back", 1: "given back"}
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_a_cancel_between_two_bundles_touches_none(make: Make) -> None:
    child = make()
    list(child.render([spec()]))
    child.cancel([0])
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_orders_to_no_one_are_harmless() -> None:
    child = Child(config())
    child.cancel([1])
    child.stop_after_current()
    child.kill()
    child.close()
    assert (child.pid, child.alive) == (None, False)
    with pytest.raises(EngineCrashed, match="not running"):
        list(child.render([spec()]))


# ------------------------------------------------ renders that cannot be stopped inside
def test_an_uninterruptible_render_is_cancelled_by_a_new_process(make: Make) -> None:
    child = make(micro_batch=1, seconds_per_step=0.02, uninterruptible=True)
    first, events = child.pid, []
    for event in child.render([spec(steps=40, seed=n) for n in range(4)]):
        if isinstance(event, Started) and event.ids == (0,):
            child.cancel([0, 2])
        events.append(event)
    assert ends(events) == {
        0: "ERR_CANCELLED",
        1: "rendered",
        2: "ERR_CANCELLED",
        3: "rendered",
    }
    assert started(events) == [(0,), (1,), (3,)]
    assert child.pid != first
    assert child.alive
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_a_wanted_neighbour_keeps_an_uninterruptible_render_alive(make: Make) -> None:
    child = make(micro_batch=2, seconds_per_step=0.02, uninterruptible=True)
    first, events = child.pid, []
    for event in child.render([spec(steps=50, seed=n) for n in range(2)]):
        if isinstance(event, Started):
            child.cancel([0])
        events.append(event)
    assert ends(events) == {0: "ERR_CANCELLED", 1: "rendered"}
    assert child.pid == first


def test_stop_and_cancel_of_an_uninterruptible_render(make: Make) -> None:
    child = make(micro_batch=1, seconds_per_step=0.02, uninterruptible=True)
    events: list[Event] = []
    for event in child.render([spec(steps=500, seed=n) for n in range(3)]):
        if isinstance(event, Started):
            child.stop_after_current()
            child.cancel([0])
        events.append(event)
    assert ends(events) == {0: "ERR_CANCELLED", 1: "given back", 2: "given back"}
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_an_uninterruptible_render_given_up_does_not_hold_the_next(make: Make) -> None:
    child = make(micro_batch=1, seconds_per_step=0.2, uninterruptible=True)
    events = child.render([spec(steps=500, seed=n) for n in range(2)])
    next(events)
    begun = time.monotonic()
    assert ends(list(child.render([spec("next")]))) == {0: "rendered"}
    assert time.monotonic() - begun < 30, "100 s of steps were left"
    assert list(events) == []


def test_a_crash_after_a_replacement_is_still_told(make: Make) -> None:
    child = make(micro_batch=1, seconds_per_step=0.02, uninterruptible=True)
    events: list[Event] = []

    def run() -> None:
        for event in child.render([spec(steps=50), spec("!crash", steps=50)]):
            if isinstance(event, Started) and event.ids == (0,):
                child.cancel([0])
            events.append(event)

    with pytest.raises(EngineCrashed, match="SIGABRT"):
        run()
    assert ends(events) == {0: "ERR_CANCELLED"}


# ------------------------------------------------------------ deaths of the process
def test_an_abort_is_told_at_once_and_a_new_process_serves(make: Make) -> None:
    child = make(micro_batch=1)
    events = child.render([spec(), spec("!crash")])
    seen = [next(events) for _ in range(3)]  # started, rendered, started
    since = time.monotonic()
    with pytest.raises(EngineCrashed) as caught:
        next(events)
    assert time.monotonic() - since < SOON_S
    assert ends(seen) == {0: "rendered"}
    assert started(seen) == [(0,), (1,)]
    assert "SIGABRT" in caught.value.message
    assert "asked to crash" in caught.value.message
    assert not child.alive
    child.start()
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_a_kill_from_outside_is_told_at_once(make: Make) -> None:
    child = make()
    events = child.render([spec("!hang")])
    assert isinstance(next(events), Started)
    assert child.pid
    os.kill(child.pid, signal.SIGKILL)
    since = time.monotonic()
    with pytest.raises(EngineKilled, match="SIGKILL during a render: by the kernel"):
        next(events)
    assert time.monotonic() - since < SOON_S


def test_an_exit_is_a_crash(make: Make) -> None:
    with pytest.raises(EngineCrashed, match="status 3"):
        list(make().render([spec("!exit")]))


def test_a_broken_device_ends_the_process(make: Make) -> None:
    child = make()
    with pytest.raises(EngineCrashed, match="the device is broken"):
        list(child.render([spec(), spec("!device")]))
    assert not child.alive


@pytest.mark.parametrize("how", ["!hang", "!grip"])
def test_silence_is_a_hang(make: Make, how: str) -> None:
    child = make(timeout_s=0.5)
    pid = child.pid
    assert pid
    told = r"silent for 0\.5 s during a render, the most that step_timeout_s"
    with pytest.raises(EngineHung, match=told):
        list(child.render([spec(how)]))
    assert not psutil.pid_exists(pid)
    child.start()
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


def test_a_long_render_with_steps_is_no_hang(make: Make) -> None:
    child = make(timeout_s=2.0, seconds_per_step=0.3)
    assert ends(list(child.render([spec(steps=8)]))) == {0: "rendered"}


def test_decoding_has_a_limit_of_its_own(make: Make) -> None:
    slow = {"seconds_per_step": 0.25, "seconds_to_decode": 2.5}
    assert ends(list(make(timeout_s=2.0, **slow).render([spec(steps=2)]))) == {0: "rendered"}
    child = make(timeout_s=60.0, decode_s=0.5, **slow)
    events = child.render([spec(steps=2)])
    told = r"silent for 0\.5 s while it decoded pictures, the most that decode_timeout_s"
    with pytest.raises(EngineHung, match=told):
        list(events)


def test_a_process_that_stops_within_a_message_is_ended(make: Make) -> None:
    child = make(timeout_s=0.5)
    events = child.render([spec("!hang")])
    assert isinstance(next(events), Started)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    assert child._pipe
    child._pipe.close()
    child._pipe = ours
    theirs.send(Shipped((0,), 0.1, 1, (64, 64, 3)))  # and no pixels
    process = child._process
    assert process

    def heart() -> None:
        while process.is_alive():
            child.end_if_frozen()
            process.join(0.05)
        theirs.close()

    thread = threading.Thread(target=heart)
    thread.start()
    with pytest.raises(EngineHung, match=r"stopped within a message for 0\.5 s during a render"):
        next(events)
    thread.join()


def test_a_process_that_reads_no_bundle_is_ended(make: Make) -> None:
    child = make(timeout_s=0.5)
    process = child._process
    assert process
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)

    def heart() -> None:
        while process.is_alive():
            child.end_if_frozen()
            process.join(0.05)

    thread = threading.Thread(target=heart)
    thread.start()
    with pytest.raises(EngineHung, match=r"stopped within a message for 0\.5 s during a render"):
        list(child.render([spec()], {"inputs/large": bytes(2**22)}))  # more than a pipe holds
    thread.join()


def test_the_log_of_an_engine_that_talks_for_weeks_is_bounded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaths, "MOST_BYTES", 1000)
    child, log = make(), tmp_path / "engine.log"
    log.write_text("what it said before\n" * 100)
    assert ends(list(child.render([spec()]))) == {0: "rendered"}
    assert log.stat().st_size < 1000
    with pytest.raises(EngineCrashed, match=r"its last words: .*[Aa]bort"):
        list(child.render([spec("!crash")]))


def test_a_model_that_was_changed_is_not_loaded_again(make: Make) -> None:
    child = make()
    child._files = ("another hash", {})
    with pytest.raises(InvalidConfig, match="others now than when this worker began"):
        child.start()
    assert not child.alive


def test_interruptions_are_left_to_the_worker(make: Make) -> None:
    child = make()
    assert child.pid
    for interruption in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, interruption)
    assert ends(list(child.render([spec()]))) == {0: "rendered"}


# --------------------------------------------------------------------------- loading
def test_load_crashes(tmp_path: Path) -> None:
    child = Child(config(crash_in_load=True), log=tmp_path / "log")
    with pytest.raises(EngineCrashed, match="SIGABRT while it loaded the model"):
        child.start()


def test_load_hangs() -> None:
    child = Child(config(hang_in_load=True), load_timeout_s=3)
    with pytest.raises(EngineHung, match="while it loaded"):
        child.start()
    assert not child.alive


def test_unknown_engine() -> None:
    with pytest.raises(InvalidConfig, match="no engine 'abacus', there are: diffusers, fake"):
        Child(EngineConfig("abacus", "m", Weights())).start()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from workers import engine

    monkeypatch.setitem(engine.ENGINES, "sdcpp", "no_such_package:Engine")
    with pytest.raises(ModelNotLoaded, match=r"pip install 'renderfarm\[sdcpp\]'"):
        engine.create(EngineConfig("sdcpp", "m", Weights()))


# ------------------------------------------------------- the child never outlives it
PARENT = """
import sys
from tests.unit.test_child import Child, config, spec
if __name__ == "__main__":
    child = Child(config())
    child.start()
    events = child.render([spec(sys.argv[1], steps=400)])
    next(events)
    print(child.pid, flush=True)
    if sys.argv[2] == "wait":
        list(events)
"""


@pytest.mark.parametrize("how", ["!hang", "!grip"])
def test_a_killed_parent_takes_the_child_along(tmp_path: Path, how: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script, how, "wait"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    with parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        poll(lambda: has_ended(child), "the child's end", SOON_S)


def test_a_parent_that_ends_takes_the_child_along(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, script, "!hang", "leave"],
        stdout=subprocess.PIPE,
        env=env,
        timeout=60,
        check=True,
    )
    with suppress(psutil.NoSuchProcess):
        assert has_ended(psutil.Process(int(done.stdout)))


def test_the_parent_imports_no_torch() -> None:
    code = "import sys, workers.child; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
