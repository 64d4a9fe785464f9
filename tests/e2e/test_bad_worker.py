"""Two workers of one lane, one of them bad: it rests, the other renders all, and it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from farm.store.sessions import Worker
from tests.farm_kit import FarmKit, until

LANE = """
[models.fake-one]
licence = "none"
defaults = {{ width = 64, height = 64, steps = 2 }}
[models.fake-one.engines.fake]
options = {{ seconds_per_step = 0.04, mood = "{mood}" }}
"""


@pytest.mark.slow
def test_a_bad_worker_leaves_the_work_to_a_good_one(tmp_path: Path, redis_url: str) -> None:
    mood = tmp_path / "mood"
    models = LANE.format(mood=tmp_path / "never")
    with FarmKit(tmp_path / "home", redis_url, max_failures=3, models=models) as kit:
        kit.dispatcher()
        good = kit.worker("fake-one")
        (tmp_path / "bad.toml").write_text(LANE.format(mood=mood))
        kit.env["FARM_MODELS_FILE"] = str(tmp_path / "bad.toml")
        bad = kit.worker("fake-one")

        def by_pid(pid: int) -> Worker:
            return next(worker for worker in kit.farm.workers() if worker.pid == pid)

        mood.write_text("!white")
        batch = kit.farm.submit([f"p{i}" for i in range(200)], model="fake-one")
        until(lambda: by_pid(bad.pid).state == "resting", 30)
        assert "ERR_BAD_IMAGE" in by_pid(bad.pid).note
        status = kit.farm.wait(batch.id, 90)
        assert (status.counts["succeeded"], status.counts["failed"]) == (200, 0)
        jobs = list(kit.farm.jobs(batch.id))
        assert sum(job.failures for job in jobs) < 20
        assert max(job.failures for job in jobs) == 1, "each went to the good one next"
        assert kit.farm.unserved() == {}
        mood.unlink()
        until(lambda: by_pid(bad.pid).state != "resting", 60)
        good.terminate()
        good.wait(30)
        again = kit.farm.submit([f"q{i}" for i in range(20)], model="fake-one")
        assert kit.farm.wait(again.id, 90).counts["succeeded"] == 20
