"""`farm up`: one command brings up a farm, keeps it up, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from farm import local_broker
from farm.catalog import Lane
from farm.children import WorkerFlags
from farm.config import Settings, load_settings
from farm.embedded import EmbeddedFarm, lock_home
from farm.errors import EnvironmentFault, ModelNotLoaded
from farm.service import Farm
from tests.servers import has_ended, poll
from tests.up_kit import START_S, Up

MODELS = """
[models.fake-one]
licence = "none"
defaults = { width = 64, height = 64, steps = 4 }
[models.fake-one.engines.fake]
options = { seconds_per_step = 0.005 }

[models.fake-slow]
licence = "none"
defaults = { width = 64, height = 64, steps = 20 }
[models.fake-slow.engines.fake]
options = { seconds_per_step = 0.1 }

[models.broken]
licence = "none"
[models.broken.engines.diffusers]
path = "no-such-directory"
"""
FAKE = Lane("fake-one", "fake")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    (home / "models.toml").write_text(MODELS)
    return home


@pytest.fixture
def started() -> Iterator[list[Up]]:
    """What a test started; killed at its end, whatever happened."""
    ups: list[Up] = []
    yield ups
    for up in ups:
        up.end()


def gone(processes: list[psutil.Process]) -> bool:
    return all(has_ended(process) for process in processes)


def command(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "farm", "--home", str(home), *args],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_it_renders_and_stops_all_when_asked(
    signum: signal.Signals, home: Path, started: list[Up], tmp_path: Path
) -> None:
    up = Up(home, "--model", "fake-one")
    started.append(up)
    up.until_ready()
    out = tmp_path / "pictures"
    done = command(
        home, "submit", "a", "b", "-m", "fake-one", "-n", "4", "--out", str(out), "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pictures"] == len(list(out.glob("*.png"))) == 8
    doctor = json.loads(command(home, "doctor", "--json").stdout)
    assert doctor["ok"]
    assert {c["name"]: c["verdict"] for c in doctor["checks"]}["broker"] == "ok"
    assert oct((home / "broker.sock").stat().st_mode)[-3:] == "700"

    children = up.children()
    assert len(children) >= 3
    up.process.send_signal(signum)
    assert up.process.wait(30) == 0, up.text()
    poll(lambda: gone(children), "the children's end", 30)
    assert not (home / "broker.sock").exists()
    assert "stopped" in up.text()


def test_killed_it_leaves_no_process_behind_and_starts_again(home: Path, started: list[Up]) -> None:
    up = Up(home, "--model", "fake-one")
    started.append(up)
    children = up.until_ready().children()
    up.process.kill()
    up.process.wait(30)
    poll(lambda: gone(children), "the children's end", 30)
    again = Up(home, "--no-worker")
    started.append(again)
    poll(lambda: again.text().count("ready; ") == 2 or again.over(), "farm up", START_S)
    assert not again.over(), again.text()


def test_a_second_one_in_the_same_home_is_refused(home: Path, started: list[Up]) -> None:
    up = Up(home, "--no-worker")
    started.append(up)
    up.until_ready()
    second = command(home, "up", "--no-worker")
    assert second.returncode == 1
    assert f"process {up.process.pid}" in second.stderr
    assert not up.over()


@pytest.mark.parametrize("words", ["valkey-server|redis-server", "farm dispatcher", "-m workers"])
def test_what_dies_is_started_again(words: str, home: Path, started: list[Up]) -> None:
    up = Up(home, "--model", "fake-one")
    started.append(up)
    up.until_ready()
    victim = next(child for name in words.split("|") if (child := find(up, name)))
    victim.kill()
    poll(lambda: any(up.has(name, victim.pid) for name in words.split("|")), "a new one", 30)
    done = command(home, "submit", "a", "-m", "fake-one", "--wait")
    assert done.returncode == 0, done.stderr + up.text()
    assert "was killed by SIGKILL; starting it again" in up.text()


def find(up: Up, words: str) -> psutil.Process | None:
    with suppress(LookupError):
        return up.child(words)
    return None


def test_a_worker_that_cannot_load_ends_it_all(home: Path, started: list[Up]) -> None:
    up = Up(home, "--model", "broken")
    started.append(up)
    assert up.process.wait(START_S) == 1
    assert "no-such-directory" in up.text()
    assert "(ERR_MODEL_NOT_LOADED)" in up.text()
    assert "Traceback" not in up.text()
    assert not (home / "broker.sock").exists()


def test_a_second_interrupt_does_not_wait_for_pictures(home: Path, started: list[Up]) -> None:
    up = Up(home, "--model", "fake-slow")
    started.append(up)
    up.until_ready()
    batch = command(home, "submit", "a", "-n", "20", "-m", "fake-slow").stdout.strip()
    with Farm(settings_of(home)) as farm:
        poll(lambda: farm.status(batch).counts["running"] > 0, "a render", 30)
        children = up.children()
        up.process.send_signal(signal.SIGINT)
        poll(lambda: "stopping" in up.text(), "its word", 30)
        up.process.send_signal(signal.SIGINT)
        up.process.wait(30)
        poll(lambda: gone(children), "the children's end", 30)
        assert farm.status(batch).open > 0


def settings_of(home: Path) -> Settings:
    return load_settings(home=home)


# ---- as a library


def test_a_farm_in_a_with_block(home: Path) -> None:
    settings, flags = settings_of(home), WorkerFlags(micro_batch=3, memory_limit=10**9)
    with EmbeddedFarm(settings, [FAKE, FAKE], flags=flags) as up, Farm(settings) as farm:
        infos = [worker.info for worker in farm.workers()]
        assert [(info["micro_batch"], info["memory"]) for info in infos] == [(3, 10**9)] * 2
        assert len(up.pids()) == 4
        batch = farm.submit(["a", "b"], model="fake-one")
        assert farm.wait(batch.id, 60).counts["succeeded"] == 2
        pids = [psutil.Process(pid) for pid in up.pids().values()]
        with pytest.raises(EnvironmentFault, match="already"):
            EmbeddedFarm(settings_of(home)).start()
    assert gone(pids)
    with Farm(settings_of(home)) as farm:
        assert farm.workers() == []


def test_a_home_with_a_path_too_long_for_a_socket(home: Path) -> None:
    settings = settings_of(home.parent / ("long" * 30))
    with EmbeddedFarm(settings) as up:
        assert not settings.broker_socket.is_relative_to(settings.home)
        assert local_broker.answers(settings.broker_socket)
        assert oct(settings.broker_socket.stat().st_mode)[-3:] == "700"
        assert set(up.pids()) == {"broker", "dispatcher"}
    assert not settings.broker_socket.exists()


def test_a_broken_lane_raises_and_leaves_nothing(home: Path) -> None:
    lane = Lane("broken", "diffusers")
    with pytest.raises(ModelNotLoaded, match="no-such-directory"):
        EmbeddedFarm(settings_of(home), [lane]).start()
    lock_home(home).close()  # free again


def test_it_uses_a_broker_of_ones_own(home: Path, started: list[Up]) -> None:
    with EmbeddedFarm(settings_of(home)) as own:
        url = f"redis+socket://{own.settings.broker_socket}"
        other = load_settings(home=home.parent / "other", broker_url=url)
        with EmbeddedFarm(other) as guest:
            assert set(guest.pids()) == {"dispatcher"}
        assert local_broker.answers(own.settings.broker_socket)


def test_a_server_that_outlived_its_farm_makes_way(home: Path) -> None:
    settings = settings_of(home)
    (home / "broker").mkdir()
    argv = local_broker.command_line(settings.broker_socket, home / "broker")
    with (home / "stale.log").open("wb") as log:
        stale = subprocess.Popen([str(word) for word in argv], stdout=log, stderr=log)
    try:
        poll(lambda: local_broker.answers(settings.broker_socket), "the stale server", 30)
        with EmbeddedFarm(settings) as up:
            assert stale.wait(30) == 0
            assert up.pids()["broker"] != stale.pid
    finally:
        stale.kill()
        stale.wait(30)
