"""Due times, windows and labels where clocks change; and `farm schedule`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from farm.errors import InvalidParameter
from farm.schedules import times
from farm.schedules.runner import dataset_command
from farm.schedules.times import closes, coming, label, latest, next_due
from farm.store.schedules import Schedule
from tests.cli_kit import Run, command_line

MADRID = "Europe/Madrid"  # clocks change on 2026-03-29 at 02:00 and on 2026-10-25 at 03:00


def at(text: str, tz: str = MADRID, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz), fold=fold).timestamp()


def utc(due: float) -> str:
    return f"{datetime.fromtimestamp(due, UTC):%m-%dT%H:%M}"


@pytest.mark.parametrize(
    ("cron", "since", "due"),
    [
        # at two each night: in spring right after the gap, which is three
        ("0 2 * * *", "2026-03-28T12:00", ["03-29T01:00", "03-30T00:00"]),
        ("30 2 * * *", "2026-03-28T12:00", ["03-29T01:00", "03-30T00:30"]),
        ("0,30 2 * * *", "2026-03-28T12:00", ["03-29T01:00", "03-30T00:00"]),
        # in autumn at the first two
        ("30 2 * * *", "2026-10-24T12:00", ["10-25T00:30", "10-26T01:30"]),
        # intervals go by the time that passes
        ("0 * * * *", "2026-10-25T01:30", ["10-25T00:00", "10-25T01:00", "10-25T02:00"]),
        ("*/30 2 * * *", "2026-03-28T12:00", ["03-30T00:00", "03-30T00:30"]),
        ("0 */6 * * *", "2026-10-24T23:00", ["10-24T22:00", "10-25T05:00"]),
    ],
)
def test_due_times_where_clocks_change(cron: str, since: str, due: list[str]) -> None:
    assert [utc(one) for one in coming(cron, MADRID, at(since), len(due))] == due


def test_a_time_that_comes_twice_is_due_once_wherever_one_begins() -> None:
    second = at("2026-10-25T02:10", fold=1)
    assert utc(next_due("30 2 * * *", MADRID, second)) == "10-26T01:30"
    assert utc(next_due("5 2 * * *", MADRID, at("2026-10-25T02:05"))) == "10-26T01:05"


@pytest.mark.parametrize("cron", ["0 2 * * *", "30 2,3 * * *", "0 * * * *", "*/20 2 * * *"])
def test_the_way_does_not_depend_on_where_one_looks_from(cron: str) -> None:
    """Whoever was away finds the due times that one sees who was there."""
    for begin in ("2026-03-27T00:00", "2026-10-23T00:00"):
        whole = coming(cron, MADRID, at(begin), 60)
        assert all(one < following for one, following in pairwise(whole))
        for place, due in enumerate(whole[:50]):
            for since in (due, due + 1, due + 59.5, due + 1800):
                following = next(one for one in whole[place:] if one > since)
                assert next_due(cron, MADRID, since) == following
        assert latest(cron, MADRID, whole[0], whole[-1], 10) == whole[-10:]
        assert latest(cron, MADRID, whole[40], whole[-1] + 30, 100) == whole[40:]


def test_a_long_absence_costs_no_more_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [0]
    every = times._simulated

    def counting(cron: str, start: datetime) -> Iterator[datetime]:
        for moment in every(cron, start):
            asked[0] += 1
            yield moment

    monkeypatch.setattr(times, "_simulated", counting)
    found = latest("* * * * *", MADRID, at("2025-01-01T00:00"), at("2026-01-01T00:00"), 100)
    assert found == [at("2026-01-01T00:00") - 60 * n for n in reversed(range(100))]
    assert latest("0 2 * * *", MADRID, at("2016-01-01T02:00"), at("2026-01-01T12:00"), 100)[99:]
    assert asked[0] < 1000


@pytest.mark.parametrize(
    ("until", "due", "closing"),
    [
        ("07:00", "2026-11-25T02:00", "2026-11-25T07:00"),
        ("07:00", "2026-11-25T22:00", "2026-11-26T07:00"),
        ("02:00", "2026-11-25T02:00", "2026-11-26T02:00"),
        ("07:00", "2026-03-29T03:00", "2026-03-29T07:00"),  # an hour less
        ("02:30", "2026-03-29T01:00", "2026-03-29T03:30"),  # a time that is skipped
    ],
)
def test_when_a_window_closes(until: str, due: str, closing: str) -> None:
    assert closes(until, MADRID, at(due)) == at(closing)


def test_a_window_that_closes_in_the_hour_that_comes_twice() -> None:
    assert closes("02:30", MADRID, at("2026-10-25T02:00")) == at("2026-10-25T02:30")
    later = closes("02:30", MADRID, at("2026-10-25T02:10", fold=1))
    assert later == at("2026-10-26T02:30")


def test_labels_of_a_schedule_differ() -> None:
    assert label(at("2026-11-25T02:00"), MADRID) == "2026-11-25t0200"
    assert label(at("2026-11-25T02:00:00") + 0.25, MADRID) == "2026-11-25t020000"
    twice = coming("0 * * * *", MADRID, at("2026-10-25T01:30"), 2)
    assert [label(one, MADRID) for one in twice] == ["2026-10-25t0200", "2026-10-25t0200-2"]


@pytest.mark.parametrize(
    "cron",
    ["", "0 2 * *", "0 0 2 * * *", "@daily", "60 2 * * *", "a b c d e", "0 2 30 2 *", "*/0 * * * *",
     "0 2 * * * ; rm", "٠ 2 * * *", "1-0 * * * *", "0 2 L * L", "0 2 * * MON#9"],
)  # fmt: skip
def test_a_cron_that_is_none(cron: str) -> None:
    with pytest.raises(InvalidParameter, match='such as "0 2'):
        next_due(cron, "UTC", 0.0)


@pytest.mark.parametrize("tz", ["", "Mars", "Europe", "../etc/passwd", "/etc/localtime", "a\0b"])
def test_a_time_zone_that_is_none(tz: str) -> None:
    with pytest.raises(InvalidParameter, match="such as Europe/Madrid"):
        next_due("0 2 * * *", tz, 0.0)


def test_the_machines_own_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ":Europe/Madrid")
    assert times.local_zone() == MADRID
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    assert times.local_zone() == "UTC"


def test_the_command_of_a_run() -> None:
    one = Schedule("i", "n", "/r.toml", "0 2 * * *", "UTC", None, -10, False, False, "", 0, None, 0)
    assert dataset_command(one, "2026-11-25t0200")[1:] == [
        "-m", "farm", "dataset", "run", "/r.toml", "--label", "2026-11-25t0200",
        "--priority", "-10", "--json", "--notify",
    ]  # fmt: skip


# ---- farm schedule


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", MADRID)
    with command_line(tmp_path / "home", monkeypatch, capsys) as run:
        run("dataset", "init", "nightly.toml")  # its name is shapes
        yield run


ADD = ("schedule", "add", "nightly.toml", "--cron", "0 5 * * *")  # when no clocks change


def test_a_schedule_from_its_beginning_to_its_end(run: Run, tmp_path: Path) -> None:
    code, out, err = run(*ADD, "--until", "07:00", "--catch-up")
    assert (code, out) == (0, "shapes\n")
    assert "05:00 (Europe/Madrid)" in err
    assert "no dispatcher runs" in err
    assert "fresh = true" in err
    (one,) = json.loads(run("schedule", "list", "--json")[1])
    assert one["recipe"] == str(tmp_path / "nightly.toml")
    assert (one["priority"], one["now"], one["catch_up"]) == (None, "idle", True)
    shown = json.loads(run("schedule", "show", "shapes", "--json")[1])
    assert len(shown["coming"]) == 5
    assert shown["coming"][0] == shown["next_due"]
    assert run("schedule", "show", "shapes")[1].count("05:00 (Europe/Madrid)") == 5
    assert run("schedule", "run", "shapes")[0] == 0
    code, _, err = run("schedule", "run", "shapes")
    assert code == 2
    assert "asked for already" in err
    (asked,) = json.loads(run("schedule", "history", "shapes", "--json")[1])
    assert (asked["kind"], asked["state"]) == ("manual", "pending")
    assert asked["label"] in run("schedule", "history", "shapes")[1]
    assert "pending" in run("schedule", "list")[1]
    assert json.loads(run("schedule", "pause", "shapes", "--json")[1])["paused"]
    assert json.loads(run("schedule", "show", "shapes", "--json")[1])["coming"] == []
    assert "next due" in run("schedule", "resume", "shapes")[2]
    assert run("schedule", "remove", "shapes")[0] == 0
    assert run("schedule", "list", "--json")[1] == "[]\n"
    assert run("schedule", "show", "shapes")[0] == 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--until", "7"), "HH:MM"),
        (("--tz", "Mars"), "no time zone"),
        (("--cron", "often"), "such as"),
        (("--name", "../x"), "expected small letters"),
        (("--priority", "9999999999"), "priority: a whole number up to 1,000,000"),
        (("--name", "Ann's"), "expected small letters"),
    ],
)
def test_what_a_schedule_cannot_be(more: tuple[str, ...], told: str, run: Run) -> None:
    code, out, err = run(*ADD, *more)
    assert (code, out) == (2, "")
    assert told in err
    assert run("schedule", "list", "--json")[1] == "[]\n"


def test_a_name_is_taken_once(run: Run) -> None:
    assert run(*ADD)[0] == 0
    code, _, err = run(*ADD)
    assert code == 2
    assert "choose another --name" in err
    assert run(*ADD, "--name", "second")[0] == 0


def test_a_recipe_must_be_one(run: Run, tmp_path: Path) -> None:
    assert "no.toml" in run("schedule", "add", "no.toml", "--cron", "0 2 * * *")[2]
    (tmp_path / "nightly.toml").write_text("name = 3", encoding="utf-8")
    code, _, err = run(*ADD)
    assert code == 2
    assert "ERR_INVALID_CONFIG" in err
