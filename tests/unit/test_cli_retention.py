"""`farm jobs` and `farm prune` on SQLite and a local directory: words, JSON, exit codes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from farm.cli import prune as prune_command
from farm.config import Settings
from farm.errors import InvalidParameter, OutOfMemory
from farm.pictures import object_key
from farm.service import Farm
from farm.store import jobs
from farm.store.jobs import Picture
from farm.units import parse_duration
from tests.cli_kit import Run, command_line
from tests.store_kit import Kit, spec


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    with command_line(tmp_path / "home", monkeypatch, capsys) as call:
        yield call


@pytest.fixture
def farm(run: Run, tmp_path: Path) -> Iterator[Farm]:
    with Farm(Settings(home=tmp_path / "home")) as farm:
        farm.check_schema()
        yield farm


def done(farm: Farm, pictures: int, failing: int = 0) -> str:
    """A batch that is done: some jobs failed, the others have a picture of five bytes each."""
    kit = Kit(farm.db)
    batch_id = kit.batch(*(spec(f"p{i}") for i in range(failing + pictures)))
    for claim in kit.claim(batch_id, kit.session(), 99):
        with farm.db.write() as connection:
            if claim.ref.idx < failing:
                assert jobs.fail(connection, claim, OutOfMemory())
                continue
            key = object_key(claim.ref, claim.claim_no, claim.session_id, "png")
            farm.blobs.put(key, b"12345", "image/png")
            jobs.succeed(connection, [(claim, Picture(key, "0" * 64, 5, 0.1, f"{claim.ref}"))])
    return batch_id


def stored(farm: Farm) -> int:
    return len(list(farm.blobs.list()))


def test_jobs_by_state_and_code_page_by_page(run: Run, farm: Farm) -> None:
    batch_id = done(farm, 3, failing=4)
    code, out, _ = run("jobs", batch_id, "--state", "failed", "--limit", 3, "--json")
    told = json.loads(out)
    assert code == 0
    assert [job["idx"] for job in told["jobs"]] == [0, 1, 2]
    assert told["next"] == 2
    code, out, _ = run("jobs", batch_id, "--state", "failed", "--after", 2, "--json")
    assert [job["idx"] for job in json.loads(out)["jobs"]] == [3]
    assert json.loads(out)["next"] is None
    code, out, err = run("jobs", batch_id, "--code", "ERR_OUT_OF_MEMORY", "--limit", 2)
    assert out.count("ERR_OUT_OF_MEMORY") == 2
    assert "--after 1" in err
    assert "no such job" in run("jobs", batch_id, "--code", "ERR_BAD_IMAGE")[2]
    since = json.loads(run("jobs", batch_id, "--since", "1h", "--json")[1])
    assert len(since["jobs"]) == 7
    assert run("jobs", batch_id, "--since", "soon")[0] == 2


def test_prune_by_name_after_a_dry_run(run: Run, farm: Farm) -> None:
    batch_id, kept = done(farm, 3, failing=1), done(farm, 1)
    code, out, _ = run("prune", batch_id, "--dry-run", "--json")
    assert code == 0
    expected = {"batches": 1, "jobs": 4, "objects": 3, "bytes": 15, "kept": 0}
    assert json.loads(out) == expected | {"dry_run": True}
    assert stored(farm) == 4
    code, out, err = run("prune", batch_id)
    assert code == 0
    assert "removed: 1 batch, 4 jobs, 3 objects" in err
    assert stored(farm) == 1
    assert run("status", batch_id)[0] == 2
    assert run("status", kept)[0] == 0


def test_prune_by_age_and_what_is_not_done(run: Run, farm: Farm) -> None:
    done(farm, 2)
    assert "nothing to prune" in run("prune", "--older-than", "1d")[2]
    open_one = Kit(farm.db).batch(spec())
    assert "1 batch not done" in run("prune", open_one)[2]
    assert json.loads(run("prune", "--older-than", "0s", "--json")[1])["jobs"] == 2


def test_prune_orphans(run: Run, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    done(farm, 2)
    farm.blobs.put(f"pictures/{'0' * 16}/0000001-1.png", b"123", "image/png")
    assert "nothing to prune" in run("prune", "--orphans")[2]  # it is young
    now = time.time()
    monkeypatch.setattr("farm.retention.time.time", lambda: now + 7200)
    assert "nothing to prune" in run("prune", "--orphans")[2]
    assert "would go: 1 object" in run("prune", "--orphans", "--older-than", "1h", "--dry-run")[2]
    assert "removed: 1 object" in run("prune", "--orphans", "--older-than", "1h")[2]
    assert stored(farm) == 2


def test_prune_asks_on_a_terminal(run: Run, farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = done(farm, 1)
    asked: list[str] = []

    def refuse(question: str, **_: object) -> None:
        asked.append(question)
        raise typer.Abort

    monkeypatch.setattr(prune_command, "_on_a_terminal", lambda: True)
    monkeypatch.setattr(typer, "confirm", refuse)
    assert run("prune", batch_id)[0] == 130
    assert batch_id in asked[0]
    assert stored(farm) == 1
    assert run("prune", batch_id, "--yes")[0] == 0
    assert len(asked) == 1


@pytest.mark.parametrize(
    "wrong",
    [[], ["latest", "--older-than", "1d"], ["latest", "--orphans"], ["--older-than", "a while"],
     ["--orphans", "--older-than", "5min"]],
)  # fmt: skip
def test_what_prune_refuses(run: Run, farm: Farm, wrong: list[str]) -> None:
    done(farm, 1)
    assert run("prune", *wrong)[0] == 2
    assert stored(farm) == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15min", 900), ("1.5h", 5400), ("30D", 2592000), ("2w", 1209600)],
)  # fmt: skip
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "d", "-1d", "1y", "nand", "1d2h", "9999999999s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InvalidParameter, match="is no time"):
        parse_duration(text)
