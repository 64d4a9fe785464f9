"""What no column holds is refused, and a record that somebody changed fails alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import literal, select, text

from farm.errors import InvalidParameter
from farm.store import jobs, reads
from farm.store.ids import JobRef
from tests.store_kit import Kit, spec


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


@pytest.mark.parametrize(
    "params",
    [[], "x", 7, {"width": "64"}, {"width": None}, {"width": 13}, {"steps": 1e400}, {"depth": 3},
     {"loras": [["pixel"]]}, {"loras": 5}, {"format": "exe"}, {"mask_image": "../x"}],
    ids=str,
)  # fmt: skip
def test_a_changed_record_fails_and_holds_up_no_other(kit: Kit, params: Any) -> None:
    batch = kit.batch(spec("a"), spec("b"), spec("c"))
    with kit.db.write() as connection:
        told = json.dumps(params).replace("Infinity", "1e400")
        change = text("UPDATE jobs SET params = :value WHERE batch_id = :batch AND idx = 0")
        connection.execute(change, {"value": told, "batch": batch})
    held = kit.claim(batch, kit.session(), 64)
    assert [claim.ref.idx for claim in held] == [1, 2]
    assert kit.states(batch) == {"failed": 1, "running": 2}
    with kit.db.read() as connection:
        job = reads.job(connection, JobRef(batch, 0))
        assert len(reads.page(connection, batch)) == 3
    assert job.error_code == InvalidParameter.code
    assert job.error is not None
    assert "not what was submitted" in job.error


def test_the_shared_parameters_of_a_batch_may_be_changed_too(kit: Kit) -> None:
    batch = kit.batch(spec("a"), spec("b"))
    with kit.db.write() as connection:
        connection.execute(text("UPDATE batches SET params = '[1]'"))
    assert kit.claim(batch, kit.session(), 64) == []
    assert kit.states(batch) == {"failed": 2}


def test_a_text_that_was_changed_is_no_fault_of_its_neighbours(kit: Kit) -> None:
    batch = kit.batch(spec("a"), spec("b"))
    with kit.db.write() as connection:
        connection.execute(text("UPDATE jobs SET prompt = '' WHERE idx = 0"))
    assert [claim.spec.prompt for claim in kit.claim(batch, kit.session(), 64)] == ["", "b"]


@pytest.mark.parametrize("value", [2**63, 10**30, "\ud800"], ids=ascii)
def test_what_no_column_holds_is_refused(kit: Kit, value: Any) -> None:
    column = jobs.jobs.c.prompt if isinstance(value, str) else jobs.jobs.c.seed
    with pytest.raises(InvalidParameter, match="cannot hold"), kit.db.read() as connection:
        connection.execute(select(jobs.jobs.c.idx).where(column == literal(value, column.type)))


def test_a_nul_is_refused_where_the_database_holds_none(kit: Kit) -> None:
    if kit.db.dialect == "sqlite":
        pytest.skip("SQLite holds it")
    with pytest.raises(InvalidParameter, match="NUL"), kit.db.read() as connection:
        connection.execute(select(literal("a\0b")))
