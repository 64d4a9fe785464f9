"""`farm submit` from templates, tables and keys, and its dry run, through the whole command."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from farm.cli import main
from farm.service import Farm


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FARM_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv: str) -> int:
    try:
        code = main(list(argv))
    except SystemExit as exit:
        code = exit.code
    return int(code or 0)


def prompts() -> list[str]:
    with Farm.open() as farm:
        return [job.spec["prompt"] for job in farm.jobs(farm.find("latest"))]


def test_a_template_with_lists(home: Path) -> None:
    (home / "animals.txt").write_text("cat\ndog\n")
    assert not run("submit", "a {c} {a}", "--list", "c=red,blue", "--list", "a=@animals.txt")
    assert prompts() == ["a red cat", "a red dog", "a blue cat", "a blue dog"]


def test_a_list_may_be_a_field_and_a_sample_is_drawn(home: Path) -> None:
    argv = ["--list", "seed=1..9", "--list", "steps=4,5", "--pick", "sample", "--count", "7"]
    assert not run("submit", "a cat", *argv, "--seed", "3")
    with Farm.open() as farm:
        found = [(job.spec["seed"], job.spec["steps"]) for job in farm.jobs(farm.find("latest"))]
    assert len(found) == 7
    assert {steps for _, steps in found} <= {4, 5}


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["a {c}", "--list", "c"], "expected NAME=a,b,c"),
        (["a {c}", "{c}", "--list", "c=x"], "one PROMPT"),
        (["a {c}", "--list", "c=x", "--list", "c=y"], "stands twice"),
        (["a {c}", "--list", "b=x"], "no list for {c}"),
        (["a", "--column", "prompt=x"], "--file"),
        (["--file", "p.csv", "--column", "colour=x"], "expected FIELD=NAME"),
        (["a", "--file", "p.csv"], "not both"),
    ],
)
def test_options_that_do_not_go_together(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("submit", *argv)
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_zipped_table_with_other_names(home: Path) -> None:
    (home / "c.tsv.gz").write_bytes(gzip.compress(b"caption\turl\na red cat\tx\n"))
    assert not run("submit", "--file", "c.tsv.gz", "--column", "prompt=caption")
    assert prompts() == ["a red cat"]


def test_a_key_submits_once(capsys: pytest.CaptureFixture[str]) -> None:
    ids = []
    for _ in range(2):
        assert not run("submit", "a cat", "-n", "3", "--idempotency-key", "k")
        ids.append(capsys.readouterr().out.strip())
    assert ids[0] == ids[1]
    assert run("submit", "a dog", "-n", "3", "--idempotency-key", "k")
    assert "ERR_KEY_REUSED" in capsys.readouterr().err


def test_eager_leaves_bad_rows_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n{"prompt": "c"}\n')
    assert not run("submit", "--file", "p.jsonl", "--eager")
    assert "left out: line 2: steps" in capsys.readouterr().err
    assert prompts() == ["a", "c"]


def test_a_dry_run_changes_nothing_and_tells_what_is_wrong(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run("submit", "a {c}", "--list", "c=x,y,z", "-n", "2", "--dry-run", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["by_model"]) == (6, {"shapes": 6})
    assert [sample["prompt"] for sample in told["samples"][:3]] == ["a x", "a x", "a y"]
    (home / "p.txt").write_text("a\n\x01\n")
    assert run("submit", "--file", "p.txt", "--dry-run")
    caught = capsys.readouterr()
    assert "1 job: 1 of shapes" in caught.out
    assert "line 2: prompt" in caught.err
    with Farm.open() as farm:
        assert farm.batches() == []


def test_a_dry_run_estimates_from_what_was_rendered_here() -> None:
    from farm.catalog import Lane
    from farm.store import sessions
    from farm.store.sessions import Beat

    with Farm.open() as farm:
        for seconds in (0.5, 0.5):
            with farm.db.write() as connection:
                session = sessions.open_session(
                    connection, Lane("shapes", "fake"), 60, host="h", pid=1, device="cpu", info={}
                )
                sessions.beat(connection, session, 60, Beat("idle", "", 1, seconds))
        found = farm.preview(["a", "b"], n=100, model="shapes")
    assert found.seconds == pytest.approx(50)
    assert found.size_bytes is None
