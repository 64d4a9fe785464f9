"""Native code that aborts or hangs during a real render, through real workers and a real database.

The fault comes from outside, by a signal while the job's render is under way: SIGABRT is what
abort() in native code raises, and a stopped process is as silent as one that hangs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.engines import missing_packages
from farm.store.reads import Job
from tests import sdcpp_models
from tests.farm_kit import FarmKit, engine_child, until

if missing_packages("sdcpp"):
    pytest.skip("stable-diffusion.cpp is not installed", allow_module_level=True)

KLEIN = """
[models.klein]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 100, guidance_scale = 1.0 }}
[models.klein.engines.sdcpp]
path = "{path}"
"""
SILENCE_S = 3.0
FAULTS = {
    signal.SIGABRT: ("ERR_ENGINE_CRASHED", "was killed by SIGABRT during a render", 0.0),
    signal.SIGSTOP: ("ERR_ENGINE_HUNG", "was silent for 3 s during a render", SILENCE_S),
}  # fmt: skip
RENDERS_WITHIN_S = 15.0  # on a quiet machine it is less than 5


class Saboteur:
    """Hits the engine's process whenever a job of `wanted` (index -> times) renders in it."""

    def __init__(self, kit: FarmKit, fault: signal.Signals) -> None:
        self.kit, self._fault = kit, fault
        self.worker = kit.worker("klein", "sdcpp", "--threads", "1")
        self.hits: list[tuple[int, int]] = []  # index, claim_no
        self.seconds: list[float] = []  # from a hit to the next render's start

    def until_done(self, batch_id: str, wanted: dict[int, int]) -> None:
        def done() -> bool:
            for job in self._started(batch_id):
                times = sum(idx == job.idx for idx, _ in self.hits)
                if times < wanted.get(job.idx, 0) and (job.idx, job.claim_no) not in self.hits:
                    self._hit(batch_id, job)
            return self.kit.farm.status(batch_id).done

        until(done, 240)

    def _started(self, batch_id: str) -> list[Job]:
        running = self.kit.farm.jobs(batch_id, states=("running",))
        return [job for job in running if job.started_at]

    def _hit(self, batch_id: str, job: Job) -> None:
        self.hits.append((job.idx, job.claim_no))
        struck = time.time()
        os.kill(engine_child(self.worker).pid, self._fault)

        def again() -> float:
            """When the first render after that began, by the database."""
            later = [j.started_at or 0.0 for j in self.kit.farm.jobs(batch_id)]
            return max((at for at in later if at > struck), default=0.0)

        until(again, 60)
        self.seconds.append(again() - struck)


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[FarmKit]:
    models = KLEIN.format(path=sdcpp_models.klein())
    with FarmKit(
        tmp_path / "home", redis_url, models=models, step_timeout_s=SILENCE_S, bundle_seconds=60.0
    ) as kit:
        kit.dispatcher()
        yield kit


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_engine_is_replaced_and_only_the_job_that_does_it_again_is_failed(
    kit: FarmKit, fault: signal.Signals
) -> None:
    code, sentence, silence_s = FAULTS[fault]
    saboteur = Saboteur(kit, fault)
    row = {"prompt": "a red cat", "model": "klein"}
    first = kit.farm.submit([row])  # it measures the speed, so that bundles become large
    assert kit.farm.wait(first.id, 60).counts["succeeded"] == 1
    batch = kit.farm.submit([{**row, "seed": seed} for seed in range(4)])
    always, once = 1, 2
    saboteur.until_done(batch.id, {always: 2, once: 1})
    jobs = list(kit.farm.jobs(batch.id))
    assert [job.state for job in jobs] == ["succeeded", "failed", "succeeded", "succeeded"]
    assert sorted(idx for idx, _ in saboteur.hits) == [always, always, once]
    assert [job.failures for job in jobs] == [0, 2, 1, 0], "only who was hit is to blame"
    freed = [
        sum("its engine died before it" in str(event) for event in kit.farm.history(job.ref))
        for job in jobs
    ]
    # by the first death and by the death under job 2; alone with job 1, none was there to be freed
    assert freed == [0, 0, 1, 2]
    failed = jobs[always]
    assert failed.error_code == code
    assert sentence in (failed.error or "")
    codes = [event["code"] for event in kit.farm.history(jobs[once].ref)]
    assert code in codes
    assert max(saboteur.seconds) - silence_s < RENDERS_WITHIN_S, saboteur.seconds
    kit.assert_whole(batch.id)
