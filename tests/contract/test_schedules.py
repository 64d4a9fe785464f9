"""Every due time is run once: under a simulated clock, with dispatchers that come and go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy.exc import IntegrityError

from farm.errors import Invalid
from farm.schedules import policy
from farm.schedules.times import label as label_of
from farm.store import schedules as store
from farm.store.tables import schedule_runs
from tests.schedules_kit import MADRID, TTL_S, Stage, moment

NOON = "2026-11-24T12:00"


@pytest.fixture
def begin(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Stage] = []

    def begin(at: str = NOON) -> Stage:
        made.append(Stage.begin(database_url, tmp_path, moment(at), monkeypatch))
        return made[-1]

    yield begin
    for stage in made:
        stage.close()


def nights(first: date, n: int, clock: time) -> list[float]:
    """The due times of so many nights, found without cron: a time that is skipped comes after."""
    zone = ZoneInfo(MADRID)
    due = []
    for day in range(n):
        local = datetime.combine(first + timedelta(days=day), clock, zone)
        if local.astimezone(ZoneInfo("UTC")).astimezone(zone) != local:
            local = datetime.combine(local.date(), time(3), zone)
        due.append(local.timestamp())
    return due


@pytest.mark.parametrize(
    "change", [date(2026, 3, 29), date(2026, 10, 25)], ids=["spring", "autumn"]
)
def test_thirty_nights_around_a_change_of_clocks(change: date, begin: Any) -> None:
    """Two dispatchers that both believe to lead look at once, and are killed, stopped, replaced."""
    first = change - timedelta(days=15)
    stage, rng = begin(f"{first - timedelta(days=1)}T12:00"), random.Random(change.month)
    stage.add("free", "30 2 * * *")
    stage.add("bound", "0 2 * * *", until="07:00")
    dues = {"free": nights(first, 30, time(2, 30)), "bound": nights(first, 30, time(2))}
    for name, hours in (("free", 3), ("bound", 8)):
        for due in dues[name]:
            stage.left[name, label_of(due, MADRID)] = rng.uniform(0.5, hours) * 3600
    for _ in range(2):
        stage.dispatcher()
    for day in range(1, 31):
        stage.nights(moment(f"{first + timedelta(days=day - 1)}T08:00"), rng)
        assert [one.argv[0] for one in stage.alive() if one.argv[0] == "bound"] == []
        stage.nights(moment(f"{first + timedelta(days=day - 1)}T12:00"), rng)
    for name, expected in dues.items():
        assert [run.due_at for run in stage.runs(name)] == expected
    assert set(stage.states("free")) == {"succeeded"}
    for run in stage.runs("free"):
        assert stage.finished["free", label_of(run.due_at, MADRID)] == 1
    bound = stage.runs("bound")
    assert {run.state for run in bound[:-3]} == {"succeeded", "skipped"}
    assert all("is run instead" in run.why for run in bound if run.state == "skipped")
    for run in bound:
        times = stage.finished["bound", label_of(run.due_at, MADRID)]
        assert run.finished_at is None or times == (run.state == "succeeded")
    assert sum(run.state == "succeeded" for run in bound) >= 15
    assert stage.begun > 20, "few were replaced"


# ---- missed


def test_a_week_without_a_dispatcher_is_made_up_for_once_if_asked(begin: Any) -> None:
    stage = begin(NOON)
    stage.add("made-up", catch_up=True)
    stage.add("nightly")
    stage.dispatcher()
    stage.sleep_until(moment("2026-12-01T12:00"))
    made_up, nightly = stage.runs("made-up"), stage.runs()
    dues = nights(date(2026, 11, 25), 7, time(2))
    assert [run.due_at for run in made_up] == [run.due_at for run in nightly] == dues
    assert stage.states("made-up") == ["skipped"] * 6 + ["running"]
    assert stage.states() == ["skipped"] * 7
    assert made_up[0].why == "missed by 6 d, for no dispatcher ran; a newer one is run instead"
    assert nightly[0].why == "missed by 6 d, for no dispatcher ran; the schedule does not catch up"
    assert [one.argv for one in stage.children] == [("made-up", "2026-12-01t0200")]
    stage.sleep_until(moment("2026-12-01T13:00"))
    assert stage.runs("made-up")[-1].why == "made up for: no dispatcher ran for 10 h"
    stage.sleep_until(moment("2026-12-02T02:00"))
    assert stage.states("made-up")[6:] == ["succeeded", "running"]
    assert stage.states()[7:] == ["running"]


def test_what_is_a_little_late_is_run(begin: Any) -> None:
    stage = begin(NOON)
    stage.add()
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:09"))
    assert stage.states() == ["running"]


def test_a_year_of_minutes_leaves_few_rows(begin: Any) -> None:
    stage = begin("2025-11-24T12:00")
    stage.add("often", "* * * * *")
    stage.dispatcher()
    stage.sleep_until(moment(NOON))
    runs = stage.runs("often")
    assert len(runs) == policy.KEPT
    assert [run.state for run in runs] == ["skipped"] * 99 + ["running"]
    assert runs[0].why.endswith("; so were all since 2025-11-24 12:01 (Europe/Madrid)")
    assert [run.why for run in runs if "so were all" in run.why] == [runs[0].why]


# ---- one after the other


def test_what_is_under_way_goes_on_first_and_of_those_that_wait_the_newest(begin: Any) -> None:
    stage = begin(NOON)
    stage.add("hourly", "0 * * * *")
    stage.left["hourly", "2026-11-24t1300"] = 2.5 * 3600
    stage.dispatcher()
    for hour in (13, 14, 15):
        stage.sleep_until(moment(f"2026-11-24T{hour}:00"))
    assert stage.states("hourly") == ["running", "skipped", "pending"]
    assert "2026-11-24 15:00 (Europe/Madrid) is run instead" in stage.runs("hourly")[1].why
    stage.sleep_until(moment("2026-11-24T15:31"))
    assert stage.states("hourly") == ["succeeded", "skipped", "running"]


def test_a_window_pauses_what_is_left_and_goes_on_the_next_night(begin: Any) -> None:
    stage = begin(NOON)
    stage.add(until="07:00")
    stage.left["nightly", "2026-11-25t0200"] = 8 * 3600
    runner = stage.dispatcher()
    for hour in range(2, 7):
        stage.sleep_until(moment(f"2026-11-25T0{hour}:00"))
        assert len(stage.alive()) == 1
    stage.sleep_until(moment("2026-11-25T07:00"))
    assert stage.alive() == []
    stage.look()
    (waiting,) = stage.runs()
    assert (waiting.state, waiting.holder) == ("waiting", None)
    assert (
        waiting.why == "its window closed at 07:00; it goes on at 2026-11-26 02:00 (Europe/Madrid)"
    )
    assert waiting.batch_id
    assert stage.paused(waiting.batch_id)
    stage.kill(runner)
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T20:00"))
    assert stage.alive() == []
    stage.sleep_until(moment("2026-11-26T02:00"))
    assert not stage.paused(waiting.batch_id)
    assert [one.argv[1] for one in stage.alive()] == ["2026-11-25t0200"]
    assert stage.states() == ["running", "pending"]
    for minutes in range(30, 210, 30):
        stage.sleep_until(moment("2026-11-26T02:00") + minutes * 60)
    assert stage.states() == ["succeeded", "running"]
    assert stage.runs()[0].started_at == moment("2026-11-25T02:00")


def test_a_window_that_closed_on_a_dead_dispatchers_run(begin: Any) -> None:
    stage = begin(NOON)
    stage.add(until="07:00")
    stage.left["nightly", "2026-11-25t0200"] = 8 * 3600
    runner = stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:00"))
    stage.sleep_until(moment("2026-11-25T02:10"))
    batch_id = stage.runs()[0].batch_id
    stage.kill(runner)
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T09:00"))
    assert (stage.states(), len(stage.children)) == (["waiting"], 1)
    assert stage.paused(batch_id)


def test_a_dispatcher_that_dies_while_a_window_closes_leaves_nothing_paused(begin: Any) -> None:
    stage = begin(NOON)
    stage.add(until="07:00")
    stage.left["nightly", "2026-11-25t0200"] = 8 * 3600
    runner = stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:00"))
    stage.sleep_until(moment("2026-11-25T06:59"))
    stage.sleep_until(moment("2026-11-25T07:00"))
    (run,) = stage.runs()
    assert (run.state, stage.alive()) == ("running", []), "its child was asked to stop just now"
    stage.kill(runner)
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-26T02:00"))
    assert len(stage.alive()) == 1
    assert not stage.paused(run.batch_id)


# ---- holders


def test_a_killed_holders_run_is_taken_over_when_its_lease_is_over(begin: Any) -> None:
    stage = begin(NOON)
    stage.add()
    first, _ = stage.dispatcher(), stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:00"))
    holder = stage.runs()[0].holder
    if holder != "dispatcher 1":
        first = stage.runners[1]
    stage.kill(first)
    stage.sleep_until(moment("2026-11-25T02:00") + TTL_S - 1)
    assert stage.alive() == []
    stage.sleep_until(moment("2026-11-25T02:00") + TTL_S + 1)
    assert [one.argv for one in stage.children] == [("nightly", "2026-11-25t0200")] * 2
    assert (stage.states(), stage.runs()[0].holder != holder) == (["running"], True)


@pytest.mark.parametrize("paused", [False, True])
def test_a_stopped_holders_run_is_free_at_once(begin: Any, paused: bool) -> None:
    stage = begin(NOON)
    stage.add()
    runner = stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:00"))
    if paused:  # what is under way is finished all the same
        stage.do(policy.pause)
    runner.stop()
    (run,) = stage.runs()
    assert (run.state, run.why, stage.alive()) == ("pending", "given back by its dispatcher", [])
    stage.runners.clear()
    stage.dispatcher()
    stage.look()
    assert (stage.states(), len(stage.alive())) == (["running"], 1)


def test_who_could_not_renew_stops_before_another_one_begins(
    begin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = begin(NOON)
    stage.add()
    runner = stage.dispatcher()
    stage.left["nightly", "2026-11-25t0200"] = 9 * 3600
    stage.sleep_until(moment("2026-11-25T02:00"))
    with monkeypatch.context() as away:  # the database, for nothing is done
        away.setattr(runner, "_attempt", lambda duty, do: None)
        stage.sleep_until(stage.at + TTL_S / 2)
        assert len(stage.alive()) == 1
        stage.sleep_until(stage.at + TTL_S / 2 + 1)
        assert stage.alive() == []
    stage.look()
    assert (stage.states(), len(stage.children)) == (["running"], 2)


def test_who_only_watches_begins_nothing_and_finishes_what_is_his(begin: Any) -> None:
    stage = begin(NOON)
    stage.add("hourly", "0 * * * *")
    runner = stage.dispatcher()
    stage.at = moment("2026-11-24T13:00")
    runner.look(False)
    assert stage.runs("hourly") == []
    runner.look(True)
    stage.at = moment("2026-11-24T14:00")
    runner.look(False)
    assert stage.states("hourly") == ["succeeded"]


# ---- what a person does


def test_run_now_knows_no_window(begin: Any) -> None:
    stage = begin(NOON)
    stage.add(until="07:00")
    stage.dispatcher()
    stage.do(policy.ask)
    with pytest.raises(Invalid, match="asked for already"):
        stage.do(policy.ask)
    stage.look()
    assert [one.argv for one in stage.alive()] == [("nightly", "2026-11-24t1200")]
    with pytest.raises(Invalid, match="under way"):
        stage.do(policy.ask)
    stage.sleep_until(stage.at + 3600)
    (run,) = stage.runs()
    assert (run.kind, run.state) == ("manual", "succeeded")


def test_run_now_carries_on_what_waits_for_its_window(begin: Any) -> None:
    stage = begin(NOON)
    stage.add(until="03:00")
    stage.left["nightly", "2026-11-25t0200"] = 2 * 3600
    stage.dispatcher()
    for hour in (2, 3, 4):
        stage.sleep_until(moment(f"2026-11-25T0{hour}:00"))
    assert stage.states() == ["waiting"]
    stage.do(policy.ask)
    stage.sleep_until(moment("2026-11-25T05:00"))
    assert [one.argv[1] for one in stage.alive()] == ["2026-11-25t0200"]
    stage.sleep_until(moment("2026-11-25T06:00"))
    assert stage.states() == ["succeeded"]


def test_a_paused_schedule_misses_nothing(begin: Any) -> None:
    stage = begin(NOON)
    stage.add("hourly", "0 * * * *", catch_up=True)
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-24T13:00"))
    stage.left["hourly", "2026-11-24t1300"] = 5400.0
    stage.do(policy.pause, "hourly")
    for hour in (14, 15, 16):
        stage.sleep_until(moment(f"2026-11-24T{hour}:00"))
    assert stage.states("hourly") == ["succeeded"], "what was under way is finished"
    stage.do(policy.ask, "hourly")
    stage.look()
    assert stage.states("hourly") == ["succeeded", "running"]
    stage.do(policy.resume, "hourly")
    stage.sleep_until(moment("2026-11-24T17:00"))
    assert stage.runs("hourly")[-1].due_at == moment("2026-11-24T17:00")
    assert len(stage.runs("hourly")) == 3


def test_removing_a_schedule_stops_its_run(begin: Any) -> None:
    stage = begin(NOON)
    one = stage.add()
    stage.dispatcher()
    stage.sleep_until(moment("2026-11-25T02:00"))
    with stage.db.write() as connection:
        store.remove(connection, one.id)
    stage.look()
    assert stage.alive() == []
    stage.look()
    assert stage.runners[0]._held == []


# ---- what SQL holds to


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "lost"},
        {"kind": "odd"},
        {"state": "running", "started_at": 1.0},
        {"state": "pending", "holder": "me", "lease_until": 1.0},
        {"state": "succeeded", "started_at": 1.0},
        {"state": "pending", "finished_at": 1.0},
        {"state": "waiting"},
        {"state": "skipped", "finished_at": 1.0, "started_at": 1.0},
        {"state": "waiting", "started_at": 1.0, "due_at": 2.0},  # the second one under way
    ],
)
def test_what_no_run_can_be(wrong: dict[str, Any], begin: Any) -> None:
    stage = begin(NOON)
    one = stage.add()
    with stage.db.write() as connection:
        first = {"schedule_id": one.id, "due_at": 1.0, "state": "waiting", "started_at": 1.0}
        connection.execute(schedule_runs.insert(), [first])
    row = {"schedule_id": one.id, "due_at": 3.0, **wrong}
    with pytest.raises(IntegrityError), stage.db.write() as connection:
        connection.execute(schedule_runs.insert(), [row])
