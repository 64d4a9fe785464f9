"""A stream of jobs becomes one batch, whole or not at all, whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from farm.errors import InvalidPromptFile, KeyReused, RowError, SubmitInProgress
from farm.reconcile import remove_abandoned
from farm.spec import JobSpec, NewJob, Shape
from farm.store import batches, jobs, reads
from farm.store.batches import Once
from farm.store.db import Database
from farm.submitting import CHUNK, FIRST_CHUNK, Plan, Submitted, submit
from tests.store_kit import Kit, spec

ONCE = Once("tonight", "1" * 64)
KILLS = 10  # on each database
BAD = RowError(7, "steps", "0", "a whole number")
Item = NewJob | RowError


@pytest.fixture
def kit(database_url: str) -> Iterator[Kit]:
    kit = Kit.at(database_url)
    yield kit
    kit.db.close()


def stream(n: int, *, seed: int = 0, first: int = 0) -> Iterator[NewJob]:
    shape, wide = Shape(spec()), Shape(spec(width=128, loras="a:0.5"))
    for i in range(first, n):
        yield NewJob(wide if i % 3 == 2 else shape, f"prompt {i}\t\\ \n☃", "", seed + i)


def specs(kit: Kit, batch_id: str) -> list[JobSpec]:
    found, after = [], -1
    while True:
        with kit.db.read() as connection:
            page = reads.page(connection, batch_id, after=after)
        if not page:
            return found
        found += [JobSpec.from_record(job.spec) for job in page]
        after = page[-1].idx


def test_what_comes_out_is_what_went_in(kit: Kit) -> None:
    done = submit(kit.db, stream(50), Plan(name="n", owner="o", priority=3))
    assert specs(kit, done.batch_id) == [job.spec for job in stream(50)]
    assert kit.states(done.batch_id) == {"queued": 50}
    with kit.db.read() as connection:
        status = batches.status(connection, done.batch_id)
    assert (status.total, status.whole, status.ready, status.name) == (50, True, True, "n")


def test_more_than_one_chunk(kit: Kit) -> None:
    seen: list[int] = []
    done = submit(kit.db, stream(CHUNK + 10), Plan(progress=seen.append))
    assert seen == [CHUNK, CHUNK + 10]
    assert kit.states(done.batch_id) == {"queued": CHUNK + 10}


def test_a_bad_row_and_nothing_stays(kit: Kit) -> None:
    def rows() -> Iterator[Item]:
        yield from stream(CHUNK + 1)
        yield BAD
        yield from stream(3)

    with pytest.raises(InvalidPromptFile) as caught:
        submit(kit.db, rows(), Plan())
    assert caught.value.errors == [BAD]
    with kit.db.read() as connection:
        assert batches.recent(connection) == []


@pytest.mark.parametrize("rows", [[], [BAD]])
@pytest.mark.parametrize("eager", [False, True])
def test_no_good_row_is_no_batch(kit: Kit, rows: list[Item], eager: bool) -> None:
    with pytest.raises(InvalidPromptFile, match="nothing was queued"):
        submit(kit.db, rows, Plan(eager=eager, once=ONCE))
    with kit.db.read() as connection:
        assert batches.recent(connection) == []


def test_an_eager_batch_is_claimed_while_it_is_read_and_bad_rows_are_left_out(kit: Kit) -> None:
    claimed: list[int] = []
    told: list[RowError] = []

    def claim() -> None:
        if not claimed:  # it is called once more at the end
            (batch,) = recent(kit.db)
            assert (batch.ready, batch.done) == (True, False)
            claimed.append(len(kit.claim(batch.id, kit.session(), limit=8)))

    def rows() -> Iterator[Item]:
        yield from stream(FIRST_CHUNK)
        yield BAD
        assert claimed == [8], "not before the rest was read"
        yield from stream(FIRST_CHUNK + 10, first=FIRST_CHUNK)

    plan = Plan(eager=True, started=claim, left_out=told.append)
    done = submit(kit.db, rows(), plan)
    assert (done.total, done.bad, told) == (FIRST_CHUNK + 10, 1, [BAD])
    assert kit.states(done.batch_id) == {"queued": FIRST_CHUNK + 2, "running": 8}


def recent(db: Database) -> list[Any]:
    with db.read() as connection:
        return batches.recent(connection)


def interrupted(kit: Kit, n: int, *, eager: bool = False) -> None:
    """A submit that ends in the middle, as if its process were killed."""

    class Killed(BaseException):
        pass

    def rows() -> Iterator[NewJob]:
        yield from stream(n)
        raise Killed

    with pytest.raises(Killed):
        submit(kit.db, rows(), Plan(once=ONCE, eager=eager))


@pytest.mark.parametrize("eager", [False, True])
def test_an_interrupted_submit_is_gone_on_with(kit: Kit, eager: bool) -> None:
    interrupted(kit, CHUNK + 5, eager=eager)
    (before,) = recent(kit.db)
    assert not before.done
    seen: list[int] = []
    plan = Plan(once=ONCE, eager=eager, takeover_s=0.0, resumed=seen.append)
    done = submit(kit.db, stream(CHUNK + 30), plan)
    assert (done.batch_id, done.total) == (before.id, CHUNK + 30)
    assert seen == [done.resumed]
    assert 0 < done.resumed <= CHUNK + 5
    assert kit.states(done.batch_id) == {"queued": CHUNK + 30}
    assert [s.prompt for s in specs(kit, done.batch_id)] == [j.prompt for j in stream(CHUNK + 30)]


def test_a_submit_of_another_that_lives_is_not_taken_over(kit: Kit) -> None:
    interrupted(kit, CHUNK + 5)
    with pytest.raises(SubmitInProgress):
        submit(kit.db, stream(CHUNK + 5), Plan(once=ONCE))


def test_a_finished_submit_is_not_done_again(kit: Kit) -> None:
    first = submit(kit.db, stream(20), Plan(once=ONCE))
    again = submit(kit.db, stream(20, seed=99), Plan(once=ONCE))  # seeds may have been drawn
    assert (again.batch_id, again.total, again.resumed) == (first.batch_id, 20, 20)
    assert kit.states(first.batch_id) == {"queued": 20}
    other = submit(kit.db, stream(20), Plan(once=ONCE, owner="another"))
    assert other.batch_id != first.batch_id


@pytest.mark.parametrize("n", [19, 21])
def test_a_key_is_for_one_set_of_prompts(kit: Kit, n: int) -> None:
    first = submit(kit.db, stream(20), Plan(once=ONCE))
    with pytest.raises(KeyReused, match=first.batch_id):
        submit(kit.db, stream(n), Plan(once=ONCE))
    with pytest.raises(KeyReused):
        submit(kit.db, stream(20), Plan(once=Once(ONCE.key, "2" * 64)))
    assert kit.states(first.batch_id) == {"queued": 20}


def test_two_at_once_make_one_batch(kit: Kit) -> None:
    """The second comes while the first is between two chunks."""
    late: list[Submitted | SubmitInProgress] = []

    def second(total: int) -> None:
        if not late:
            late.append(Submitted())
            plan = Plan(once=ONCE, takeover_s=0.0)
            late[0] = submit(kit.db, stream(CHUNK * 2), plan)

    with pytest.raises(SubmitInProgress):
        submit(kit.db, stream(CHUNK * 2), Plan(once=ONCE, progress=second))
    (found,) = recent(kit.db)
    assert kit.states(found.id) == {"queued": CHUNK * 2}


def test_batches_that_nobody_ends(kit: Kit) -> None:
    """A held one is removed after a day; an eager one ends with what is in it."""
    interrupted(kit, CHUNK + 5)
    with kit.db.write() as connection:
        connection.exec_driver_sql("UPDATE batches SET touched_at = 1, idempotency_key = NULL")
    interrupted(kit, CHUNK + 5, eager=True)
    with kit.db.write() as connection:
        connection.exec_driver_sql("UPDATE batches SET touched_at = 1")
    remove_abandoned(kit.db)
    (left,) = recent(kit.db)
    assert (left.whole, left.ready) == (True, True)
    assert kit.states(left.id) == {"queued": left.total}


def test_an_eager_batch_whose_jobs_all_ended_before_it_was_whole(kit: Kit) -> None:
    def rows() -> Iterator[NewJob]:
        yield from stream(FIRST_CHUNK)
        (batch,) = recent(kit.db)
        with kit.db.write() as connection:
            assert jobs.request_cancel(connection, batch.id)[0] == FIRST_CHUNK
        (batch,) = recent(kit.db)
        assert not batch.done
        assert batch.finished_at is None

    with pytest.raises(InvalidPromptFile):
        submit(kit.db, iter([]), Plan(eager=True))
    done = submit(kit.db, rows(), Plan(eager=True))
    (batch,) = recent(kit.db)
    assert (batch.id, batch.done) == (done.batch_id, True)
    assert batch.finished_at is not None


def _submit(url: str, total: int, pipe: Connection) -> None:
    db = Database(url)
    plan = Plan(once=ONCE, takeover_s=0.0, eager=True, progress=pipe.send)
    submit(db, stream(total), plan)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_random_places_and_run_again_the_count_is_exact(database_url: str) -> None:
    kit = Kit.at(database_url)
    draw, total, resumed = random.Random(5), 150_000, []
    spawn = multiprocessing.get_context("spawn")
    for turn in range(KILLS + 1):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_submit, args=(database_url, total, theirs))
        process.start()
        theirs.close()
        resumed.append(ours.recv())
        if turn < KILLS:
            for _ in range(draw.randrange(3)):
                ours.recv()
            threading.Event().wait(draw.uniform(0, 0.05))  # at any place of a chunk
            process.kill()
        process.join()
        ours.close()
    assert process.exitcode == 0
    assert resumed == sorted(resumed), "it never begins anew"
    (batch,) = recent(kit.db)
    assert (batch.total, batch.done) == (total, False)
    assert kit.states(batch.id) == {"queued": total}
    with kit.db.read() as connection:
        tail = reads.page(connection, batch.id, after=total - 4)
    wanted = [job.prompt for job in stream(total, first=total - 3)]
    assert [job.spec["prompt"] for job in tail] == wanted
    kit.db.close()
