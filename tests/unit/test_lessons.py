"""What a lack of memory taught is kept from one worker of a lane to the next."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.catalog import Lane
from farm.errors import DatabaseUnavailable
from farm.store import sessions
from farm.store.db import Database
from tests.store_kit import Kit
from tests.unit.test_child import config, spec
from workers.child import Child
from workers.engine import EngineConfig, EngineInfo
from workers.lessons import Lessons
from workers.messages import Cap, Eased, TooLarge

LANE = Lane("fake", "fake")
OPTIONS = {"memory": 4096, "bytes_per_pixel": 1, "rungs": 3}
CONFIG = replace(config(**OPTIONS), micro_batch=None)
CONFIG = replace(CONFIG, weights=CONFIG.weights.model_copy(update={"micro_batch": 8}))

Life = Callable[..., tuple[Lessons, EngineInfo]]


@pytest.fixture
def kit(tmp_path: Path) -> Iterator[Kit]:
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    yield kit
    kit.db.close()


@pytest.fixture
def life(kit: Kit) -> Iterator[Life]:
    """A worker begins, learns, and its session ends."""
    children: list[Child] = []

    def live(*learns: Any, conf: EngineConfig = CONFIG) -> tuple[Lessons, EngineInfo]:
        children.append(Child(conf))
        lessons = Lessons(kit.db, conf)
        info = lessons.load(children[-1])
        for event in learns:
            lessons.take(event)
        with kit.db.write() as connection:
            session = sessions.open_session(
                connection, LANE, 30, host=socket.gethostname(), pid=1, device=info.device,
                memory=info.memory, info=lessons.told(info),
            )  # fmt: skip
            sessions.close(connection, session)
        return lessons, info

    yield live
    for child in children:
        child.kill()
        child.close()


def test_the_next_worker_begins_with_it_and_so_does_the_one_after(life: Life) -> None:
    first, info = life(Cap(4), Cap(2), Eased("tiles", 1))
    assert (info.micro_batch, first.cap) == (8, 2)
    assert first.note == "short of memory: micro-batches of 2, tiles"
    for _ in range(2):
        lessons, info = life()
        assert (info.micro_batch, lessons.cap, lessons.note) == (2, 2, first.note)
        told = lessons.told(info)
        assert (told["micro_batch"], told["learnt_cap"], told["eased"]) == (2, 2, ["tiles"])
    lessons, _ = life(Cap(1), Eased("offload", 2))
    assert lessons.note == "short of memory: micro-batches of 1, tiles, offload"


def test_the_next_process_has_taken_the_rungs(kit: Kit, life: Life) -> None:
    life(Eased("a", 1), Eased("b", 2))
    child = Child(CONFIG)
    lessons = Lessons(kit.db, CONFIG)
    lessons.load(child)
    large = [spec(width=128, height=128)]  # four times the memory: needs both
    kinds = [type(event).__name__ for event in child.render(large)]
    child.close()
    assert "Eased" not in kinds
    assert kinds[-1] == "Rendered"


def test_nothing_learnt_nothing_said(life: Life) -> None:
    life()
    lessons, info = life()
    assert (info.micro_batch, lessons.note) == (8, "")
    assert lessons.told(info)["learnt_cap"] is None


def test_what_was_in_vain_is_taken_back(life: Life) -> None:
    lessons, _ = life(Cap(4), Cap(1), Eased("a", 1), Cap(8), TooLarge(10_000, 0))
    assert lessons.note == "short of memory: nothing of 10000 pixels or more"
    lessons, info = life()
    assert (info.micro_batch, lessons.note) == (8, "")


@pytest.mark.parametrize(
    "change",
    [
        {"memory_limit": 8192},
        {"strict": True},
        {"model": "fake-2"},
        {"micro_batch": 8},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_it_is_forgotten_where_it_does_not_hold(life: Life, change: dict[str, Any]) -> None:
    life(Cap(2), Eased("tiles", 1))
    lessons, info = life(conf=replace(CONFIG, **change))
    assert (info.micro_batch, lessons.cap, lessons.note) == (8, 8, "")


def test_after_an_explicit_micro_batch_nobody_knows_it_any_more(life: Life) -> None:
    life(Cap(2))
    life(conf=replace(CONFIG, micro_batch=4))
    _, info = life()
    assert info.micro_batch == 8


def test_a_smaller_cap_of_the_catalogue_holds(life: Life) -> None:
    life(Cap(4))
    weights = CONFIG.weights.model_copy(update={"micro_batch": 2})
    _, info = life(conf=replace(CONFIG, weights=weights))
    assert info.micro_batch == 2


def test_a_database_that_is_away_costs_only_the_lessons(
    kit: Kit, life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    life(Cap(2))

    def away(self: Database) -> None:
        raise DatabaseUnavailable("away")

    child = Child(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "read", away)
        assert Lessons(kit.db, CONFIG).load(child).micro_batch == 8
    child.close()
