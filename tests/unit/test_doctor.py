"""`farm doctor` on SQLite: what it finds, what it advises, how it ends."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from farm import doctor, engines, local_broker
from farm.catalog import Lane
from farm.cli import main
from farm.config import Settings
from farm.doctor import Check, examine
from farm.service import Farm
from farm.store import sessions


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(name: str) -> list[Check]:
    return [check for check in examine() if check.name == name]


def one(name: str) -> Check:
    checks = found(name)
    assert len(checks) == 1, checks
    return checks[0]


def test_a_fresh_home_has_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_broker, "find_program", lambda: Path("/bin/server"))
    verdicts = {check.name: check.verdict for check in examine()}
    assert "fail" not in verdicts.values()
    assert verdicts["python"] == verdicts["database"] == verdicts["pictures"] == "ok"
    assert verdicts["broker"] == "warn"  # not running


def test_every_trouble_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(local_broker, "find_program", lambda: None)
    (home / "models.toml").write_text(
        '[models.mine]\nlicence = "mit"\n[models.mine.engines.diffusers]\npath = "weights"\n'
    )
    checks = examine()
    assert one("broker program").verdict == "fail"
    assert one("model mine").verdict == "warn"
    assert all(check.mend for check in checks if check.verdict != "ok")


def test_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.PACKAGES, "diffusers", ("no_such_package",))
    monkeypatch.setitem(engines.PACKAGES, "sdcpp", ("no_such_package",))
    check = one("engine diffusers")
    assert check.verdict == "warn"
    assert "renderfarm[diffusers]" in check.mend


def test_settings_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_TICK_S", "never")
    assert "FARM_TICK_S" in one("settings").message


def test_a_catalogue_that_is_none(home: Path) -> None:
    (home / "models.toml").write_text("[models")
    assert one("models").verdict == "fail"
    assert "models.toml" in one("models").message


def test_a_database_and_a_broker_that_are_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql+psycopg://u:geheim@127.0.0.1:1/x")
    monkeypatch.setenv("FARM_BROKER_URL", "redis://:geheim@127.0.0.1:1/0")
    checks = {check.name: check for check in examine()}
    assert checks["database"].verdict == checks["broker"].verdict == "fail"
    assert "geheim" not in str(checks)


def test_an_unusable_picture_store(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    (home / "file").touch()
    monkeypatch.setenv("FARM_BLOBS_URL", f"file://{home}/file/pictures")
    assert one("pictures").verdict == "fail"


def test_little_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK", 2**60)
    assert one("disk").verdict == "warn"
    monkeypatch.setattr(doctor, "NO_DISK", 2**60)
    assert one("disk").verdict == "fail"


def test_a_blocklist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not found("blocklist")
    monkeypatch.setenv("FARM_BLOCKLIST", str(tmp_path / "terms.txt"))
    assert one("blocklist").verdict == "fail"
    (tmp_path / "terms.txt").write_text("one\ntwo\n")
    assert one("blocklist").message.startswith("2 terms")


def test_a_clock_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + 60)
    assert one("clock").verdict == "warn"
    assert "60 s behind" in one("clock").message


def test_a_backlog_without_a_worker(home: Path) -> None:
    with Farm(Settings(home=home)) as farm:
        farm.check_schema()
        farm.submit("a red circle on a blue background", n=3)
        check = next(c for c in found("model shapes") if "wait" in c.message)
        assert (check.verdict, check.message[:6]) == ("warn", "3 jobs")
        assert one("workers").verdict == "warn"
        farm.submit("a blue star", n=2, engine="diffusers")
        asked = next(c for c in found("model shapes") if "on diffusers" in c.message)
        assert asked.message.startswith("2 jobs")
        assert asked.mend.endswith("farm worker --model shapes --engine diffusers")
        with farm.db.write() as connection:
            sessions.open_session(
                connection, Lane("shapes", "diffusers"), 60, host="h", pid=1, device="cpu", info={}
            )
    assert one("workers").verdict == "ok"
    assert not [c for c in found("model shapes") if "wait" in c.message]


def test_json_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_broker, "find_program", lambda: Path("/bin/server"))
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {"name", "verdict", "message", "mend"} == set(told["checks"][0])
    monkeypatch.setattr(local_broker, "find_program", lambda: None)
    assert main(["doctor"]) == 1
    assert "fail  broker program" in capsys.readouterr().out
