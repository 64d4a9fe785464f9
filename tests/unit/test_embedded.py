"""What `farm up` is made of, without starting a farm."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from farm import engines
from farm.catalog import DEMO, Catalog, Lane, Weights
from farm.children import Child, WorkerFlags, child_environment, spawn, worker_command
from farm.config import Settings, load_settings
from farm.embedded import MAX_DEATHS, EmbeddedFarm, lock_home
from farm.engines import choose_lane
from farm.errors import EnvironmentFault, InvalidConfig, ModelNotLoaded, UnknownModel
from farm.units import parse_size
from tests.servers import has_ended, poll
from workers.app import parse


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def both() -> Catalog:
    weights = {"diffusers": Weights(path=Path("a")), "sdcpp": Weights(path=Path("b"))}
    return Catalog({"both": DEMO.model_copy(update={"engines": weights})})


def test_the_first_engine_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PACKAGES", {"diffusers": ("json",), "sdcpp": ("json",)})
    assert choose_lane(both(), "both") == Lane("both", "diffusers")
    assert choose_lane(both(), "both:sdcpp") == Lane("both", "sdcpp")
    monkeypatch.setattr(engines, "PACKAGES", {"diffusers": ("nope",), "sdcpp": ("json",)})
    assert choose_lane(both(), "both") == Lane("both", "sdcpp")
    with pytest.raises(InvalidConfig, match=r"pip install 'renderfarm\[diffusers\]'"):
        choose_lane(both(), "both:diffusers")
    for name in ("nope", "both:fake"):
        with pytest.raises(UnknownModel):
            choose_lane(both(), name)


def test_weights_that_are_here_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PACKAGES", {})
    weights = {"diffusers": Weights(repo="me/there"), "sdcpp": Weights(path=Path("here"))}
    models = {"both": DEMO.model_copy(update={"engines": weights})}
    assert choose_lane(Catalog(models), "both") == Lane("both", "sdcpp")
    assert choose_lane(Catalog(models), "both:diffusers") == Lane("both", "diffusers")
    del weights["sdcpp"]
    assert choose_lane(Catalog(models), "both") == Lane("both", "diffusers")


def test_a_worker_gets_what_was_told() -> None:
    lane = Lane("shapes", "diffusers")
    plain = worker_command(lane, WorkerFlags())
    assert plain[1:] == ["-m", "workers", "--model", "shapes", "--engine", "diffusers"]
    told = parse(worker_command(lane, WorkerFlags("cuda:1", 4, True, 2, 3 * 2**30))[3:])
    assert (told.model, told.engine, told.device) == ("shapes", "diffusers", "cuda:1")
    assert (told.micro_batch, told.strict, told.threads) == (4, True, 2)
    assert parse_size(told.memory_limit) == 3 * 2**30


def test_children_get_the_very_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_BROKER_URL", "redis://:secret@elsewhere/0")
    (tmp_path / "farm.toml").write_text('blobs_url = "s3://elsewhere"\nbundle_max = 3\n')
    settings = load_settings(
        home="here", tick_s=0.25, s3_path_style=False, s3_secret_key="a", models_file="m.toml"
    ).model_copy(update={"broker_url": None, "blobs_url": None})
    code = (
        "from farm.config import load_settings as l; s = l()\n"
        "print([s.home, s.broker, s.blobs, s.tick_s, s.s3_path_style, s.bundle_max,"
        " s.models_file, s.s3_secret_key.get_secret_value()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(settings), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    home = tmp_path / "here"
    want = [home, settings.broker, settings.blobs, 0.25, False, 3, tmp_path / "m.toml", "a"]
    assert done.stdout.strip() == repr(want)


def test_one_farm_a_home(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    first = lock_home(home)
    assert oct(home.stat().st_mode)[-3:] == "700"
    with pytest.raises(EnvironmentFault, match=f"process {os.getpid()}"):
        lock_home(home)
    first.close()
    lock_home(home).close()


def test_a_worker_that_dies_at_once_five_times_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    farm = EmbeddedFarm(Settings(home=tmp_path), say=said.append)
    argv: list[str | Path] = [sys.executable, "-c", "print('my last word'); exit(3)"]
    worker = Child("worker-1", argv, tmp_path / "log", Lane("m", "fake"))
    farm._group.workers = [worker]
    for _ in range(MAX_DEATHS):
        worker.next_start = 0.0
        farm._tend(worker)  # starts it
        poll(lambda: not worker.alive, "its death", 10)
        farm._tend(worker)  # finds it dead
    assert worker.given_up
    assert "exit code 3, for the 5th time; given up" in said[-2]
    assert "my last word" in said[-1]
    with pytest.raises(ModelNotLoaded, match="no worker is left"):
        farm._supervise()


def test_a_long_life_forgives_earlier_deaths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.embedded.SHORT_LIFE_S", 0.0)
    farm = EmbeddedFarm(Settings(home=tmp_path), say=lambda text: None)
    worker = Child("worker-1", ["/bin/false"], tmp_path / "log", Lane("m", "fake"), deaths=4)
    worker.start(dict(os.environ))
    poll(lambda: not worker.alive, "its death", 10)
    farm._tend(worker)
    assert (worker.given_up, worker.deaths) == (False, 1)


def test_last_words_are_those_of_the_present_life(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of a life before\n")
    lines = "\n".join(f"line {i}" for i in range(50))
    child = Child("c", [sys.executable, "-c", f"print({lines!r})"], log)
    child.start(dict(os.environ))
    poll(lambda: not child.alive, "its end", 10)
    words = child.last_words().splitlines()
    assert (len(words), words[-1]) == (12, "  line 49")
    assert "life before" not in child.last_words()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal\nfrom farm.children import spawn\n"
        f"child = spawn(['/bin/sleep', '60'], pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "print(child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(done.stdout))
        poll(lambda: has_ended(child), "the child's end", 10)
    assert spawn(["/bin/true"], tmp_path / "log").wait(10) == 0
