"""The dispatcher's loop: who leads ticks, who watches does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farm import dispatcher
from farm.config import Settings
from farm.errors import BrokerUnavailable
from farm.store import leases
from tests.store_kit import Kit


class Waits(threading.Event):
    """Stops the loop at its `ticks`-th wait, and keeps how long each would have been."""

    def __init__(self, ticks: int) -> None:
        super().__init__()
        self.ticks, self.asked = ticks, list[float | None]()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout)
        if len(self.asked) >= self.ticks:
            self.set()
        return self.is_set()


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    yield kit
    kit.db.close()


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One item for each time that the lanes were rung."""
    rung: list[str] = []
    monkeypatch.setattr(dispatcher, "ring", lambda *_: rung.append("rung"))
    return rung


def run(kit: Kit, ticks: int) -> Waits:
    stop, broker = Waits(ticks), Any
    dispatcher.run_dispatcher(kit.db, broker, Settings(tick_s=2.0), stop)  # type: ignore[arg-type]
    return stop


def free(kit: Kit) -> bool:
    with kit.db.write() as connection:
        return leases.take(connection, leases.DISPATCHER, "another", 60.0)


def test_who_leads_ticks_and_hands_over_at_its_end(kit: Kit, rung: list[str]) -> None:
    assert run(kit, 3).asked == [2.0, 2.0, 2.0]
    assert len(rung) == 3
    assert free(kit)


def test_who_watches_does_nothing_and_leaves_the_lead_alone(kit: Kit, rung: list[str]) -> None:
    assert free(kit)  # and taken by another one
    assert run(kit, 3).asked == [2.0, 2.0, 2.0]
    assert rung == []
    with kit.db.write() as connection:
        assert not leases.take(connection, leases.DISPATCHER, "a third", 60.0)


def test_a_broker_that_is_away_is_asked_less_and_less(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise BrokerUnavailable()

    monkeypatch.setattr(dispatcher, "ring", away)
    waits = zip(run(kit, 5).asked, [4.0, 8.0, 10.0, 10.0, 10.0], strict=True)
    assert all(most / 2 <= asked <= most for asked, most in waits)
