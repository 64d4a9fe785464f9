"""`farm owner`, and what `farm status` says of a batch that comes after another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farm.cli import main
from farm.config import Settings
from farm.service import Farm
from farm.store import batches


def run(home: Path, *args: str) -> int:
    return main(["--home", str(home), *args])


def listed(home: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    assert run(home, "owner", "list", "--json") == 0
    return {row["owner"]: row for row in json.loads(capsys.readouterr().out)}


def test_limits_are_set_kept_shown_and_taken_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "owner", "set", "alice", "--max-queued", "10") == 0
    assert run(tmp_path, "owner", "set", "alice", "--max-running", "2") == 0
    assert "alice may have 10 jobs queued and 2 jobs running" in capsys.readouterr().err
    alice = listed(tmp_path, capsys)["alice"]
    assert (alice["max_queued"], alice["max_running"], alice["queued"]) == (10, 2, 0)
    told = {}
    for args in (("set", "*", "--max-running", "9"), ("unset", "alice"), ("unset", "*")):
        assert run(tmp_path, "owner", *args, "--json") == 0
        told[args[:2]] = json.loads(capsys.readouterr().out)
    everyone = {"max_queued": None, "max_running": 9}
    assert told["set", "*"] == {"owner": "*", **everyone}
    assert told["unset", "alice"] == {"owner": "alice", **everyone}, "what holds now"
    assert told["unset", "*"] == {"owner": "*", "max_queued": None, "max_running": None}
    assert listed(tmp_path, capsys) == {}
    assert run(tmp_path, "owner", "set", "alice") == 2


def test_a_submit_over_the_limit_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "owner", "set", "alice", "--max-queued", "3")
    assert run(tmp_path, "submit", "a red circle", "-n", "4", "--owner", "alice") == 2
    told = capsys.readouterr().err
    assert "'alice' may have 3 jobs queued at once; 0 are" in told
    assert "ERR_QUOTA_EXCEEDED" in told


def test_a_batch_that_waits_for_another_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Farm(Settings(home=tmp_path)) as farm:
        farm.check_schema()
        first = farm.submit("a red circle")
        second = farm.submit("a green star", after=first.id, expires_s=3600.0)
        assert second.waits
        assert farm.unserved() == {"shapes": 1}
        run(tmp_path, "status", second.id)
        out, err = capsys.readouterr()
        assert "waiting" in out
        assert f"batch {first.id}" in out
        assert f"begins when batch {first.id} is done" in err
        with farm.db.write() as connection:
            batches.set_cancelled(connection, first.id)
        run(tmp_path, "status", first.id)
        assert "cancelling" in capsys.readouterr().out
