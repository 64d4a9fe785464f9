"""What a picture costs here: told by the workers that live, and by pictures that are there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farm.store import jobs, sessions
from farm.store.costs import cost
from farm.store.sessions import Beat
from tests.store_kit import PICTURE, Kit, spec


@pytest.fixture
def kit(database_url: str) -> Kit:
    return Kit.at(database_url)


def rendered(kit: Kit, *sizes: int) -> None:
    batch_id = kit.batch(*(spec(str(size)) for size in sizes))
    held = kit.claim(batch_id, kit.session(), 99)
    done = [
        (claim, replace(PICTURE, size_bytes=size)) for claim, size in zip(held, sizes, strict=True)
    ]
    with kit.db.write() as connection:
        jobs.succeed(connection, done)


def test_nothing_is_known_at_first(kit: Kit) -> None:
    with kit.db.read() as connection:
        assert cost(connection, "shapes") == (None, None)
    kit.db.close()


def test_live_workers_share_the_work_and_the_newest_pictures_tell_the_size(kit: Kit) -> None:
    rendered(kit, 1000)
    rendered(kit, 10, 30)
    kit.batch(*(spec(f"waiting {n}") for n in range(3)))
    one, two = kit.session(), kit.session()
    with kit.db.write() as connection:
        for session_id in (one, two):
            sessions.beat(connection, session_id, 30.0, Beat("rendering", "", 1, 4.0))
        assert cost(connection, "shapes") == (2.0, 20.0)
        assert cost(connection, "other") == (None, None)
        for session_id in (one, two):
            sessions.close(connection, session_id)
        assert cost(connection, "shapes").seconds == 4.0, "as the last one did"
    kit.db.close()
