"""Out of memory in real workers: what a lane gives up and remembers, and who takes the rest."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from farm.catalog import Weights
from farm.spec import JobSpec
from farm.store.sessions import Worker
from tests.farm_kit import FarmKit, engine_child, until
from workers.child import Child
from workers.engine import EngineConfig, Pixels
from workers.messages import Eased, Event, Lesson, Rendered

MODELS = """
[models.tight]
licence = "none"
defaults = { width = 64, height = 64, steps = 2 }
[models.tight.engines.fake]
micro_batch = 4
options = { bytes_per_pixel = 1, rungs = 2, seconds_per_step = 0.001 }

[models.slow-to-ease]
licence = "none"
defaults = { width = 64, height = 64, steps = 2 }
[models.slow-to-ease.engines.fake]
options = { bytes_per_pixel = 1, rungs = 2, seconds_per_rung = 3.0 }

[models.huge]
licence = "none"
memory_gb = 24
defaults = { width = 64, height = 64, steps = 2 }
[models.huge.engines.fake]
"""
PICTURE = 64 * 64  # bytes that one needs, without a rung


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[FarmKit]:
    with FarmKit(tmp_path / "home", redis_url, models=MODELS) as kit:
        yield kit


def limit(memory: float) -> tuple[str, str]:
    return "--memory-limit", f"{int(memory)}B"


def worker_of(kit: FarmKit, pid: int) -> Worker:
    until(lambda: pid in kit.live(), 30)
    return next(worker for worker in kit.farm.workers() if worker.pid == pid)


def test_a_worker_gives_up_what_it_must_shows_it_and_the_next_begins_with_it(kit: FarmKit) -> None:
    kit.dispatcher()
    first = kit.worker("tight", "fake", *limit(PICTURE / 2))
    batch = kit.farm.submit(["a cat"], n=12, model="tight")
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 12
    kit.assert_whole(batch.id)
    log = kit.log("worker-tight")
    assert log.count("micro-batches of at most 2") == log.count("micro-batches of at most 1") == 1
    assert log.count("rung 1 from now on") == 1
    assert "rung 2" not in log
    note = "short of memory: micro-batches of 1, rung 1"
    until(lambda: worker_of(kit, first.pid).note == note, 30)
    assert worker_of(kit, first.pid).memory == PICTURE // 2
    first.kill()
    first.wait(30)
    second = kit.worker("tight", "fake", *limit(PICTURE / 2))
    until(lambda: worker_of(kit, second.pid).note == note, 30)
    batch = kit.farm.submit(["a dog"], n=6, model="tight")
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 6
    assert kit.log("worker-tight").count("out of memory") == 3, "it learnt nothing anew"


def test_what_one_worker_cannot_hold_another_renders(kit: FarmKit) -> None:
    kit.dispatcher()
    small = kit.worker("tight", "fake", *limit(PICTURE))
    large = kit.worker("tight", "fake", *limit(64 * PICTURE))
    rows = [
        {"prompt": f"{n}", "width": side, "height": side} for n in range(6) for side in (64, 256)
    ]
    batch = kit.farm.submit(rows, model="tight")
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 12
    assert [job.failures for job in kit.farm.jobs(batch.id)] == [0] * 12
    kit.assert_whole(batch.id)
    until(lambda: sum(w.rendered for w in kit.farm.workers()) == 12, 30)
    assert worker_of(kit, large.pid).rendered >= 6, "the six large ones fit nowhere else"
    told = [event for job in kit.farm.jobs(batch.id) for event in kit.farm.history(job.ref)]
    # five too large ones in a row, and the small worker tests itself: the rest it gives back
    assert {event["code"] for event in told} <= {"ERR_OUT_OF_MEMORY", "ERR_GIVEN_BACK"}
    assert small.poll() is None


def test_what_fits_nowhere_fails_with_all_that_was_tried(kit: FarmKit) -> None:
    kit.dispatcher()
    worker = kit.worker("tight", "fake", *limit(4 * PICTURE))
    batch = kit.farm.submit([{"prompt": "big", "width": 512, "height": 512}], n=5, model="tight")
    assert kit.farm.wait(batch.id, 30).counts["failed"] == 5
    first, *others = kit.farm.jobs(batch.id)
    assert first.error_code == "ERR_OUT_OF_MEMORY"
    assert first.error
    assert "512x512 does not fit even alone (tried: rung 1; rung 2)" in first.error
    assert all("512x512 is too large" in (job.error or "") for job in others)
    batch = kit.farm.submit(["small"], n=4, model="tight")
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 4
    until(lambda: "nothing of 262144 pixels or more" in worker_of(kit, worker.pid).note, 30)
    assert "micro-batches" not in worker_of(kit, worker.pid).note, "given up in vain"


def test_a_kill_on_the_ladder_costs_one_failure_and_no_picture(kit: FarmKit) -> None:
    kit.dispatcher()
    worker = kit.worker("slow-to-ease", "fake", *limit(PICTURE / 4))
    batch = kit.farm.submit(["a cat", "a dog"], model="slow-to-ease")
    until(lambda: "rung 1 from now on" in kit.log("worker-slow-to-ease"), 30)
    engine_child(worker).send_signal(signal.SIGKILL)
    assert kit.farm.wait(batch.id, 30).counts["succeeded"] == 2
    kit.assert_whole(batch.id)
    log = kit.log("worker-slow-to-ease")
    assert log.count("rung 1 from now on") == log.count("rung 2 from now on") == 1
    assert [job.failures for job in kit.farm.jobs(batch.id)] == [1, 0]


def test_a_model_that_never_fits_is_refused_at_the_start(kit: FarmKit) -> None:
    refused = kit.worker("huge", "fake", "--memory-limit", "8GB", wait_s=0)
    assert refused.wait(30) == 1
    log = kit.log("worker-huge")
    assert "ERR_MODEL_NOT_LOADED" in log
    assert "needs 24 GB of memory" in log
    assert "may use 8 GB" in log
    assert kit.live() == set()
    kit.worker("huge", "fake", "--memory-limit", "24GB")


def test_a_memory_limit_that_is_no_size_is_said(kit: FarmKit) -> None:
    refused = kit.worker("tight", "fake", "--memory-limit", "much", wait_s=0)
    assert refused.wait(30) == 1
    assert "'much' is no size; such as 8GB, 512MB or 1.5GiB" in kit.log("worker-tight")


def test_a_real_engine_takes_its_rung_under_a_real_limit(tmp_path: Path) -> None:
    """512x512 by diffusers, with little more than it has anyway: in tiles only."""
    pytest.importorskip("diffusers")
    from tests import models

    def job(side: int) -> JobSpec:
        told = {"prompt": "a cat", "seed": 1, "steps": 1, "guidance_scale": 1.0}
        return JobSpec.model_validate({"model": "tiny", "width": side, "height": side, **told})

    weights = Weights(path=models.tiny("sd15"), dtype="float32")
    config = EngineConfig("diffusers", "tiny", weights, device="cpu", threads=1)
    free = Child(config)
    free.start()
    whole = list(free.render([job(64)]))
    assert free.pid
    used = psutil.Process(free.pid).memory_info().data
    free.close()

    tiled = [Eased("the VAE works picture by picture and in tiles", 1)]
    for room in (64, 96, 80, 48, 128):  # MiB; how much an allocator takes beforehand differs
        limit = used + room * 2**20
        limited = Child(replace(config, memory_limit=limit), log=tmp_path / "engine.log")
        assert limited.start().memory == limit
        events = list(limited.render([job(512)]))
        lessons = [e for e in events if isinstance(e, Lesson)]
        if lessons == tiled and isinstance(events[-1], Rendered):
            break
        limited.close()
    else:
        pytest.fail(f"tiles helped at no limit; the last time {lessons}, then {events[-1]}")
    again = list(limited.render([job(64)]))
    limited.close()
    for one, other in zip(pixels(whole), pixels(again), strict=True):
        assert np.array_equal(one, other), "one tile holds a small picture"


def pixels(events: list[Event]) -> list[Pixels]:
    return [event.pixels for event in events if isinstance(event, Rendered)]
