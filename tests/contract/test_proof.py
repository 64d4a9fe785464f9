"""What a worker that doubts itself asks of SQL. On both databases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from farm.catalog import Lane
from farm.store import jobs, proof
from farm.store.jobs import Claim
from tests.store_kit import LANE, PICTURE, Kit, spec

INIT = {"init_image": f"inputs/{'a' * 64}.png", "strength": 0.5}


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def finish(kit: Kit, claims: list[Claim], *seconds: float | None) -> None:
    done = [(claim, replace(PICTURE, render_s=s)) for claim, s in zip(claims, seconds, strict=True)]
    with kit.db.write() as connection:
        assert len(jobs.succeed(connection, done)) == len(done)


def proven(kit: Kit, lane: Lane = LANE) -> str | None:
    with kit.db.read() as connection:
        found = proof.proven(connection, lane)
    return found and found.prompt


def test_the_quickest_of_the_newest_batch_with_pictures_is_proven(kit: Kit) -> None:
    assert proven(kit) is None
    session = kit.session()
    old = kit.batch(spec("old"))
    finish(kit, kit.claim(old, session), 0.1)
    new = kit.batch(*(spec(word) for word in ("slow", "quick", "linked", "waits")))
    finish(kit, kit.claim(new, session, limit=3), 3.0, 2.0, None)
    kit.batch(spec("nobody has rendered it"))
    assert proven(kit) == "quick"
    assert proven(kit, Lane("other", "fake")) is None


def test_what_needs_an_input_or_another_engine_is_not(kit: Kit) -> None:
    session = kit.session()
    batch = kit.batch(spec("from a picture", **INIT))
    finish(kit, kit.claim(batch, session), 0.1)
    assert proven(kit) is None
    asked = kit.batch(spec("theirs", engine="fake"))
    finish(kit, kit.claim(asked, session, asked="fake"), 0.1)
    assert proven(kit) == "theirs"
    assert proven(kit, Lane(LANE.model, "sdcpp")) is None


def test_how_many_succeeded_of_those_that_failed_here(kit: Kit) -> None:
    session = kit.session()
    one, two = kit.batch(*(spec(str(i)) for i in range(3))), kit.batch(spec("other"))
    claims = [*kit.claim(one, session, limit=3), *kit.claim(two, session)]
    finish(kit, [claims[1], claims[3]], 0.1, 0.1)
    with kit.db.read() as connection:
        assert proof.succeeded_among(connection, []) == 0
        assert proof.succeeded_among(connection, [claim.ref for claim in claims]) == 2
        assert proof.succeeded_among(connection, [claims[0].ref, claims[3].ref]) == 1
