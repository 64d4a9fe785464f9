"""`farm worker --auto`: one device, several models, each served in its turn."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from farm.catalog import Lane
from farm.store import sessions
from farm.store.demand import LOAD_S, PICTURE_S, demands
from farm.store.sessions import Beat
from tests.farm_kit import FarmKit, until
from tests.store_kit import Kit, spec

MODELS = """
[models.one]
licence = "none"
defaults = { width = 64, height = 64, steps = 2 }
[models.one.engines.fake]

[models.two]
licence = "none"
defaults = { width = 64, height = 64, steps = 2 }
[models.two.engines.fake]

[models.broken]
licence = "none"
defaults = { width = 64, height = 64, steps = 2 }
[models.broken.engines.fake]
options = { crash_in_load = true }
"""


def workers(kit: FarmKit) -> list[str]:
    return [worker.model for worker in kit.farm.workers()]


@pytest.mark.slow
def test_it_goes_where_the_work_is(tmp_path: Path, redis_url: str, database_url: str) -> None:
    with FarmKit(tmp_path / "farm", redis_url, database_url=database_url, models=MODELS) as kit:
        kit.dispatcher()
        first = kit.farm.submit(["a"], n=3, model="one")
        auto = kit.run("-m", "farm", "worker", "--auto", name="auto")
        assert kit.farm.wait(first.id, 60).counts["succeeded"] == 3
        assert workers(kit) == ["one"]
        second = kit.farm.submit(["a"], n=3, model="two")
        assert kit.farm.wait(second.id, 60).counts["succeeded"] == 3
        assert workers(kit) == ["two"]
        stuck = kit.farm.submit(["a"], model="broken")
        until(lambda: "broken on fake ended" in kit.log("auto"), 60)
        third = kit.farm.submit(["a"], model="one")
        assert kit.farm.wait(third.id, 60).counts["succeeded"] == 1
        assert kit.farm.status(stuck.id).counts["queued"] == 1
        below = psutil.Process(auto.pid).children(recursive=True)
        assert below
        auto.send_signal(signal.SIGTERM)
        assert auto.wait(30) == 0
        until(lambda: not any(child.is_running() for child in below), 30)
        assert workers(kit) == []


def test_what_is_known_of_each_lane(database_url: str) -> None:
    kit = Kit.at(database_url)
    shapes, other, third = (Lane(name, "fake") for name in ("shapes", "other", "third"))
    kit.batch(spec(), spec(engine="fake"), spec(engine="sdcpp"))
    kit.batch(spec(), priority=4)
    kit.batch(spec(model="other"))
    info = {"load_s": 7.0}
    with kit.db.write() as connection:
        for pid, lane in ((1, shapes), (2, shapes), (3, third)):
            opened = sessions.open_session(
                connection, lane, 60, host="h", pid=pid, device="cpu", info=info
            )
            sessions.beat(connection, opened, 60, Beat("idle", "", 1, 0.25))
        sessions.close(connection, opened)
        found = demands(connection, [shapes, other, third], but=("h", 1))
    by_lane = {demand.lane: demand for demand in found}
    assert (by_lane[shapes].queued, by_lane[shapes].priority) == (3, 4)
    assert (by_lane[shapes].workers, by_lane[shapes].waiting_s) == (1, 0.0)
    assert (by_lane[shapes].picture_s, by_lane[shapes].load_s) == (0.25, 7.0)
    assert (by_lane[other].queued, by_lane[other].workers) == (1, 0)
    assert (by_lane[other].picture_s, by_lane[other].load_s) == (PICTURE_S, LOAD_S)
    assert (by_lane[third].queued, by_lane[third].workers) == (0, 0)
    kit.db.close()
