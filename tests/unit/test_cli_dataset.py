"""`farm dataset` on SQLite and a directory: words, JSON and exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.cli import dataset_view
from tests.cli_kit import Run, command_line
from tests.farm_kit import FAKES
from tests.recipe_kit import write_recipe
from tests.runner_kit import LoneRunner

FEW = {"template": "thing {n}", "lists": {"n": "1..4"}}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    with command_line(tmp_path / "home", monkeypatch, capsys) as call:
        monkeypatch.setenv("FARM_BROKER_URL", f"redis+socket://{tmp_path}/nobody.sock")
        monkeypatch.setenv("FARM_MODELS_FILE", str(tmp_path / "home" / "models.toml"))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "models.toml").write_text(FAKES)
        yield call


@pytest.fixture
def lone(tmp_path: Path, run: Run) -> Iterator[LoneRunner]:
    """The same farm, with a worker."""
    with LoneRunner(tmp_path / "home", max_failures=1) as lone, lone.working():
        yield lone


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, prompts=FEW, shard_size=3)


def lines(text: str) -> list[dict[str, Any]]:
    """Standard output, which must be an object a line and nothing else."""
    return [json.loads(line) for line in text.splitlines()]


def test_init_writes_a_recipe_and_nothing_over_one(run: Run, tmp_path: Path) -> None:
    code, out, err = run("dataset", "init")
    assert (code, out) == (0, "dataset.toml\n")
    assert "farm dataset plan dataset.toml" in err
    code, out, err = run("dataset", "init")
    assert (code, out) == (2, "")
    assert "is there already" in err
    code, _, err = run("dataset", "init", tmp_path / "none" / "x.toml")
    assert (code, "No such file" in err) == (2, True)


def test_a_dataset_from_plan_to_diff(run: Run, lone: LoneRunner, file: Path) -> None:
    code, out, _ = run("dataset", "status", file, "--json")
    before = json.loads(out)
    assert (code, before["batch"], before["finished"]) == (0, None, False)

    code, out, _ = run("dataset", "plan", file, "--json")
    planned = json.loads(out)
    assert (code, planned["rows"], planned["shards"], planned["to_render"]) == (0, 4, 2, 4)
    assert lone.rendered == 0

    code, out, err = run("dataset", "run", file, "--json")
    first, *shards, summary = lines(out)
    assert code == 0, err
    assert first == {"batch": summary["batch"], "rows": 4}
    assert shards == [{"shard": n, "shards": 2, "written": True} for n in (0, 1)]
    assert (summary["rendered"], summary["whole"], summary["kept"]) == (4, True, 0)

    code, out, err = run("dataset", "run", file)
    assert (code, out) == (0, f"{summary['out']}\n")
    assert "0 rendered now, 4 before" in err
    code, out, _ = run("dataset", "status", file, "--json")
    assert (code, json.loads(out)["finished"], json.loads(out)["stats"]) == (0, True, 2)
    for words in (("plan", file), ("status", file)):
        code, out, _ = run("dataset", *words)
        assert code == 0
        assert "4" in out

    code, out, err = run("dataset", "verify", file, "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    code, out, err = run("dataset", "verify", "out")
    assert (code, out) == (0, "")
    assert "all right" in err

    code, out, _ = run("dataset", "publish", file, "copy", "--json")
    assert (code, json.loads(out)["kept"]) == (0, 0)
    code, out, err = run("dataset", "publish", "out", "copy")
    assert (code, out) == (0, "")
    assert "0 files copied to copy" in err
    code, out, _ = run("dataset", "diff", "copy", file, "--json")
    assert (code, json.loads(out)["same"], json.loads(out)["changed"]) == (0, 4, 0)
    code, out, _ = run("dataset", "diff", "copy", file)
    assert (code, out.split()[:2]) == (0, ["same", "4"])


def test_what_is_wrong_with_a_dataset_is_data(run: Run, lone: LoneRunner, file: Path) -> None:
    run("dataset", "run", file)
    (file.parent / "out" / "README.md").unlink()
    code, out, err = run("dataset", "verify", "out")
    assert (code, out) == (1, "README.md  is missing\n")
    assert "run its recipe again" in err
    code, out, _ = run("dataset", "verify", "out", "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    code, out, err = run("dataset", "publish", "out", "copy")
    assert (code, out) == (1, "")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("run", "none.toml"), 2, "none.toml: No such file"),
        (("plan", "none.toml"), 2, "none.toml: No such file"),
        (("run", "test.toml", "--label", "../x"), 2, "label '../x'"),
        (("plan", "test.toml", "--label", "../x"), 2, "label '../x'"),
        (("status", "test.toml", "--label", "A/B"), 2, "label 'A/B'"),
        (("redrive", "test.toml", "--label", "a\n"), 2, "label 'a"),
        (("verify", "nothing"), 2, "holds no dataset"),
        (("verify", ""), 2, "empty"),
        (("verify", "test.toml/x"), 2, "test.toml is no directory"),
        (("publish", "nothing", "copy"), 2, "holds no dataset"),
        (("diff", "nothing", "test.toml"), 2, "holds no dataset"),
        (("verify", "ftp://x/y"), 2, "not ftp://"),
        (("run", "test.toml", "--priority", "9999999999"), 2, "priority"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Run, file: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    found, out, err = run("dataset", *words)
    assert (found, out) == (code, "")
    assert told in err
    assert "Traceback" not in err
    found, out, _ = run("dataset", *words, "--json")
    assert (found, "message" in json.loads(out)["error"]) == (code, True)
    assert not (file.parent / "copy").exists()


def test_bad_rows_are_told_by_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "", "steps": 0}\n')
    file = write_recipe(tmp_path, prompts={"file": "p.jsonl"})
    for verb in ("plan", "run"):
        code, out, err = run("dataset", verb, file)
        assert (code, out) == (2, "")
        assert "p.jsonl: " in err
        assert "line 2: steps: " in err
        code, out, _ = run("dataset", verb, file, "--json")
        assert {one["line"] for one in json.loads(out)["error"]["errors"]} == {2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"model": "nope"},
            "params.model: one of fake-fast, fake-one, fake-slow, shapes (got 'nope')",
        ),
        ({"model": {"each": ["fake-one", "nope"]}}, "params.model: one of "),
        ({"steps": 100_000}, "params.steps: "),
        ({"steps": {"choice": [0, 4]}}, "params.steps: "),
        ({"guidance_scale": {"uniform": [300.0, 900.0]}}, "params.guidance_scale: "),
    ],
)
def test_a_wrong_value_of_all_rows_is_told_once(
    run: Run, tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    params = {"model": "fake-one", **given}
    file = write_recipe(tmp_path, prompts=FEW, params=params, pictures=3)
    for verb in ("plan", "run"):
        code, out, err = run("dataset", verb, file)
        assert (code, out, err.count(told), "line" in err) == (2, "", 1, False), err


def test_a_dataset_without_a_picture_is_no_success(
    run: Run, lone: LoneRunner, tmp_path: Path
) -> None:
    file = write_recipe(tmp_path, prompts=FEW, gates={"min_side": 9999})
    code, _, err = run("dataset", "run", file)
    assert (code, "rejected: 4 by min_side" in err) == (1, True)
    code, out, _ = run("dataset", "run", file, "--json")
    summary = lines(out)[-1]
    assert (code, summary["whole"], summary["ok"]) == (1, True, False)
    assert summary["refused"] == {"min_side": 4}


def test_commands_that_are_shown_can_be_copied(run: Run, lone: LoneRunner, tmp_path: Path) -> None:
    folder = tmp_path / "my sets"
    folder.mkdir()
    file = write_recipe(folder, prompts=FEW, out="{label}")
    _, _, err = run("dataset", "init", "my sets/two.toml")
    assert "`farm dataset plan 'my sets/two.toml'`" in err
    _, _, err = run("dataset", "verify", folder / "night-1")
    assert "holds no dataset" in err
    run("dataset", "run", file, "--label", "night-1")
    _, _, err = run("dataset", "diff", file, file, "--old-label", "night-1")
    assert "--label" in err
    code, out, _ = run(
        "dataset", "diff", file, file, "--old-label", "night-1", "--label", "night-1", "--json"
    )
    assert (code, json.loads(out)["same"]) == (0, 4)


def test_failed_rows_are_one_and_said_how_to_drive_again(
    run: Run, lone: LoneRunner, tmp_path: Path
) -> None:
    prompts = {"template": "{x} thing", "lists": {"x": ["!fail", "good"]}}
    file = write_recipe(tmp_path, prompts=prompts)
    code, out, err = run("dataset", "run", file, "--label", "night-1")
    assert (code, out) == (1, f"{tmp_path / 'out'}\n")
    assert f"farm dataset redrive {file} --label night-1" in err
    code, out, _ = run("dataset", "redrive", file, "--label", "night-1", "--json")
    assert (code, lines(out)[-1]["counts"]["failed"]) == (1, 1)
    code, out, _ = run("dataset", "status", file, "--label", "night-1")
    assert (code, "1 failed" in out) == (0, True)


def test_a_preview_is_rendered_and_json_stays_json(run: Run, lone: LoneRunner, file: Path) -> None:
    code, out, _ = run("dataset", "plan", file, "--preview", 2, "--sheet", "p.png", "--json")
    assert (code, json.loads(out)["sheet"]) == (0, "p.png")
    assert (file.parent / "p.png").read_bytes().startswith(b"\x89PNG")
    assert lone.rendered == 2
    code, out, _ = run("dataset", "run", file, "--json")
    assert (code, lines(out)[-1]["rendered"], lone.rendered) == (0, 2, 4)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_how_to_go_on(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    def waits(*_: object) -> None:  # the batch is queued, and nobody renders it
        assert signal.getsignal(which) != signal.SIG_DFL
        signal.raise_signal(which)

    monkeypatch.setattr(dataset_view._Words, "waits", waits)
    code, out, err = run("dataset", "run", file, "--label", "a")
    assert (code, out) == (130, "")
    assert f"`farm dataset run {file} --label a` goes on with it" in err
