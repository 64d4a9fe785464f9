"""What was rendered before is linked, not rendered again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.errors import DatabaseUnavailable
from farm.store import reuse
from tests.runner_kit import LoneRunner

ROWS = [{"prompt": f"p{i}", "seed": i, "model": "fake-fast"} for i in range(150)]


@pytest.fixture
def lone(tmp_path: Path, database_url: str) -> Iterator[LoneRunner]:
    with LoneRunner(tmp_path / "home", database_url=database_url) as lone:
        yield lone


def test_a_finished_batch_again_costs_no_render(lone: LoneRunner) -> None:
    first = lone.work(lone.farm.submit(ROWS))
    assert lone.rendered == first.counts["succeeded"] == len(ROWS)
    again = lone.work(lone.farm.submit(ROWS))
    assert lone.rendered == len(ROWS)
    assert again.counts["succeeded"] == len(ROWS)
    for old, new in zip(lone.farm.jobs(first.id), lone.farm.jobs(again.id), strict=True):
        same = ("object_key", "sha256", "size_bytes", "fingerprint")
        assert [getattr(old, name) for name in same] == [getattr(new, name) for name in same]
        assert old.render_s is not None
        assert new.render_s is None
        assert lone.farm.fetch(new)
    assert len(list(lone.farm.blobs.list("pictures/"))) == len(ROWS)


def test_only_what_is_new_is_rendered(lone: LoneRunner) -> None:
    lone.work(lone.farm.submit(ROWS[:50]))
    more = [*ROWS[:50], {**ROWS[0], "format": "webp"}, {**ROWS[0], "seed": 999}, *ROWS[50:90]]
    batch = lone.work(lone.farm.submit(more))
    assert batch.counts["succeeded"] == len(more)
    assert lone.rendered == 50 + 42
    assert all(lone.farm.fetch(job) for job in lone.farm.jobs(batch.id))


def test_a_batch_may_ask_for_its_own_pictures(lone: LoneRunner) -> None:
    lone.work(lone.farm.submit(ROWS[:10]))
    batch = lone.work(lone.farm.submit(ROWS[:10], reuse=False))
    assert lone.rendered == 20
    assert all(batch.id in (job.object_key or "") for job in lone.farm.jobs(batch.id))


def test_a_database_that_goes_away_meanwhile_costs_a_render_and_no_job(
    lone: LoneRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone.work(lone.farm.submit(ROWS[:10]))

    def away(*_: object) -> None:
        raise DatabaseUnavailable("gone for a moment")

    monkeypatch.setattr(reuse, "link", away)
    batch = lone.work(lone.farm.submit(ROWS[:10]))
    assert batch.counts["succeeded"] == 10
    assert lone.rendered == 20


def test_more_was_claimed_than_is_rendered_at_once(lone: LoneRunner) -> None:
    """A long row of links makes large claims; what they hold beyond a bundle goes back."""
    lone.work(lone.farm.submit(ROWS))
    lone.runner._settings = lone.settings.model_copy(update={"bundle_max": 4})
    fresh = [{"prompt": f"new {i}", "seed": i, "model": "fake-fast"} for i in range(100)]
    batch = lone.work(lone.farm.submit([*ROWS, *fresh]))
    assert batch.counts["succeeded"] == 250
    assert lone.rendered == 250
    assert all(job.failures == 0 for job in lone.farm.jobs(batch.id))
