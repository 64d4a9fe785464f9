"""Schedules with real processes: the dispatcher's, and those of the runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from farm.config import Settings
from farm.schedules import policy
from farm.schedules.runner import Runner
from farm.store import schedules as store
from farm.store.db import Database
from farm.store.schedules import Run, Terms
from farm.store.tables import clock
from tests.farm_kit import FarmKit, until
from tests.servers import has_ended
from tests.store_kit import Kit

RECIPE = """
name = "nightly"
out = "sets/{label}"
[prompts]
template = "a {colour} circle"
lists = { colour = ["red", "green", "blue"] }
[params]
model = "fake-one"
[gates]
blank = false
[card]
licence = "CC0-1.0"
"""

# A dispatcher whose runs are `python -c RUN LABEL FOLDER`.
DISPATCHER = """
import signal, sys, threading
from farm.config import load_settings
from farm.dispatcher import run_dispatcher
from farm.service import Farm

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
run, folder = sys.argv[1:]
with Farm(load_settings()) as farm:
    command = lambda schedule, label: [sys.executable, "-c", run, label, folder]
    run_dispatcher(farm.db, farm.broker, farm.settings, stop, lambda: farm.blobs, command)
"""
# It says who it is, and ends well once there is a file `go`.
RUN = """
import json, os, pathlib, sys, time
label, folder = sys.argv[1], pathlib.Path(sys.argv[2])
(folder / f"{label}.{os.getpid()}.{os.getppid()}").touch()
print(json.dumps({"batch": "0f9k2m4x7q3w5t8b"}), flush=True)
while not (folder / "go").exists():
    time.sleep(0.02)
print(json.dumps({"batch": "0f9k2m4x7q3w5t8b", "whole": True, "counts": {"accepted": 3}}))
"""


NEVER = "0 0 29 2 *"  # not while a test runs


def add(db: Database, recipe: Path | str = "/nightly.toml", cron: str = NEVER) -> str:
    with db.write() as connection:
        terms = Terms("nightly", str(recipe), cron, "UTC")
        return policy.add(connection, terms, clock(connection)).id


def add_due(db: Database) -> str:
    """A schedule that became due within the last minute and is not so again for a year."""
    with db.write() as connection:
        at = clock(connection)
        due = at - at % 60
        cron = datetime.fromtimestamp(due, UTC).strftime("%M %H %d %m *")
        one = policy.add(connection, Terms("nightly", "/nightly.toml", cron, "UTC"), due - 60)
    assert one.next_due == due
    return one.id


def runs(db: Database, schedule_id: str) -> list[Run]:
    with db.read() as connection:
        return store.history(connection, schedule_id, 10)


@pytest.fixture
def kit(redis_url: str, tmp_path: Path) -> Iterator[FarmKit]:
    with FarmKit(tmp_path / "home", redis_url, session_ttl_s=4.0) as kit:
        yield kit


def test_the_dispatcher_makes_a_dataset(kit: FarmKit, tmp_path: Path) -> None:
    recipe = tmp_path / "nightly.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    schedule_id = add(kit.farm.db, recipe)
    with kit.farm.db.write() as connection:
        policy.ask(connection, store.find(connection, "nightly"), clock(connection))
    kit.worker()
    kit.dispatcher()
    until(lambda: runs(kit.farm.db, schedule_id)[0].finished_at, 60)
    (run,) = runs(kit.farm.db, schedule_id)
    assert (run.kind, run.state) == ("manual", "succeeded"), run.why
    assert run.summary
    assert run.summary["counts"]["accepted"] == 3
    assert (run.summary["batch"], run.summary["whole"]) == (run.batch_id, True)
    assert kit.farm.status(str(run.batch_id)).priority == -10
    (manifest,) = tmp_path.glob("sets/*/manifest.json")
    assert manifest.parent.name == run.summary["label"]


def test_a_killed_dispatchers_run_is_taken_over_and_ended_once(
    kit: FarmKit, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    schedule_id = add_due(kit.farm.db)

    def dispatcher(name: str) -> subprocess.Popen[bytes]:
        return kit.run("-c", DISPATCHER, RUN, str(folder), name=name)

    both = {one.pid: one for one in (dispatcher("one"), dispatcher("two"))}
    until(
        lambda: runs(kit.farm.db, schedule_id) and runs(kit.farm.db, schedule_id)[-1].batch_id, 30
    )
    (first,) = folder.iterdir()
    label, pid, parent = first.name.split(".")
    child = psutil.Process(int(pid))
    both.pop(int(parent)).kill()
    until(lambda: len(list(folder.iterdir())) == 2, 30)
    assert has_ended(child) or sys.platform != "linux"
    (second,) = set(folder.iterdir()) - {first}
    assert second.name.startswith(f"{label}.")
    (left,) = both.values()
    left.send_signal(signal.SIGTERM)
    assert left.wait(30) == 0
    given_back = runs(kit.farm.db, schedule_id)[-1]
    assert (given_back.state, given_back.why) == ("pending", "given back by its dispatcher")
    (folder / "go").touch()
    dispatcher("three")
    until(lambda: runs(kit.farm.db, schedule_id)[-1].finished_at, 30)
    run = runs(kit.farm.db, schedule_id)[-1]
    assert (run.state, run.summary and run.summary["whole"]) == ("succeeded", True)
    started = [path.name.split(".")[0] for path in folder.iterdir() if "." in path.name]
    assert started.count(label) == 3


# ---- how a run ends


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    kit = Kit.at(f"sqlite:///{tmp_path / 'farm.db'}")
    yield kit.db
    kit.db.close()


def ended(db: Database, home: Path, command: Sequence[str]) -> Run:
    """The run that a command was, once it is over."""

    def attempt(duty: str, do: Any) -> bool:
        do()
        return True

    schedule_id = add(db)
    runner = Runner(db, Settings(home=home), "me", attempt, lambda schedule, label: command)

    def over() -> object:
        runner.look(True)
        return runs(db, schedule_id)[0].finished_at

    with db.write() as connection:
        policy.ask(connection, store.find(connection, "nightly"), clock(connection))
    until(over, 30)
    return runs(db, schedule_id)[0]


SHORT = {
    "batch": "0f9k2m4x7q3w5t8b",
    "counts": {"accepted": 5, "rejected": 7, "failed": 3, "cancelled": 0},
}


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("print('{\"whole\": true}')", "succeeded", ""),
        ("print('{\"whole\": false}'); exit(1)", "failed", "rows: none accepted"),
        (
            f"import json; print(json.dumps({SHORT})); exit(1)",
            "failed",
            "rows: 7 rejected, 3 failed; why: farm status 0f9k2m4x7q3w5t8b",
        ),
        ('print(\'{"error": {"message": "no recipe"}}\'); exit(2)', "failed", "no recipe"),
        ("exit('odd\\0')", "failed", "schedule-nightly ended with exit code 1\n  odd"),
        ("import os; os.abort()", "failed", "schedule-nightly was killed by SIGABRT\n"),
        ("print('{\"n\": NaN}\\n{' + '[' * 99_999); exit(3)", "failed", None),
    ],
)
def test_what_became_of_a_run(
    code: str, state: str, why: str | None, db: Database, tmp_path: Path
) -> None:
    run = ended(db, tmp_path, [sys.executable, "-c", code])
    assert run.state == state
    assert why is None or run.why == why
    assert run.summary is None or "n" not in run.summary or run.summary == {"n": "NaN"}
    assert run.batch_id == (run.summary or {}).get("batch"), "however short it was"


def test_a_log_that_cannot_be_written(db: Database, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    run = ended(db, tmp_path, [sys.executable, "-c", ""])
    assert run.state == "failed"
    assert run.why.startswith("its process does not start: ")


def test_a_run_has_the_home_of_its_dispatcher(db: Database, tmp_path: Path) -> None:
    code = "import os; print('{\"batch\": \"' + os.environ['FARM_HOME'] + '\"}')"
    run = ended(db, tmp_path, [sys.executable, "-c", code])
    assert run.summary == {"batch": str(tmp_path)}
    assert run.batch_id is None, "which no batch is called"
    assert os.access(tmp_path / "logs" / "schedule-nightly.log", os.R_OK)
