"""What is around the farm goes away, fills up or falls silent: nothing fails, all goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import func, select

from farm.store.tables import sessions
from tests.farm_kit import FarmKit, until

MODEL = "fake-one"


def _sessions(kit: FarmKit) -> int:
    with kit.farm.db.read() as connection:
        return connection.scalar(select(func.count()).select_from(sessions)) or 0


@pytest.mark.parametrize("part", ["consumer", "process"])
def test_a_worker_that_hears_no_token_works_on_and_mends_itself(
    tmp_path: Path, redis_url: str, part: str
) -> None:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        words = ("--model", MODEL, "--engine", "fake")
        worker = kit.run("-m", "tests.chaos.deaf", part, *words, name="deaf")
        until(lambda: worker.pid in kit.live(), 60)
        batch = kit.farm.submit(["a", "b", "c"], model=MODEL)
        assert kit.farm.wait(batch.id, 20).counts["succeeded"] == 3, "although it is deaf"
        assert kit.tokens() > 0
        until(lambda: kit.tokens() == 0, 60)
        log = kit.log("deaf")
        assert "the consumer is restarted" in log
        assert ("the worker starts anew" in log) == (part == "process")
        assert worker.poll() is None
        until(lambda: worker.pid in kit.live(), 30)
        assert _sessions(kit) == (2 if part == "process" else 1)
        again = kit.farm.submit(["d"], model=MODEL)
        assert kit.farm.wait(again.id, 20).counts["succeeded"] == 1
