"""The farm command, in this process on SQLite: words, JSON, exit codes. No service is needed."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.cells import cell_len
from typer.main import get_command

import farm.cli
from farm.catalog import Lane
from farm.cli import app, main, output
from farm.cli.context import use
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import OutOfMemory
from farm.pictures import Origin, encode, sha256
from farm.service import Farm
from farm.store import jobs, schema, sessions
from farm.store.jobs import Picture

SHAPES = Lane("shapes", "diffusers")
EVIL = "\x1b]0;owned\x07[red]x[/red]\u202e"


@dataclass
class Ran:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("FARM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FARM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*args: object) -> Ran:
        code = main([str(arg) for arg in args])
        return Ran(code, *capsys.readouterr())

    yield call
    root.handlers[:], root.level = handlers, level
    use(None, 0, False)


@pytest.fixture
def client(home: Path) -> Iterator[Farm]:
    with Farm(Settings(home=home)) as farm:
        farm.check_schema()
        yield farm


def work(client: Farm, failing: int = 0) -> None:
    """Be a worker: fail the first jobs for lack of memory, render the others."""
    with client.db.write() as connection:
        session = sessions.open_session(
            connection, SHAPES, 60, host="here", pid=1, device="cpu", info={}
        )
    held = claim_bundle(client.db, session, SHAPES, 64)
    for claim in held:
        with client.db.write() as connection:
            if claim.ref.idx < failing:
                jobs.fail(connection, claim, OutOfMemory())
                continue
            pixels = bytes(range(256)) * 48
            data = encode(pixels, claim.spec, Origin("diffusers", "0" * 64))
            key = f"pictures/{claim.ref}.png"
            client.blobs.put(key, data, "image/png")
            picture = Picture(key, sha256(data), len(data), 0.1, "f" * 64)
            assert jobs.succeed(connection, [(claim, picture)])
    with client.db.write() as connection:
        sessions.close(connection, session)


def commands(command: Any = None, path: str = "farm") -> Iterator[tuple[str, Any]]:
    """Every command and group of the tree, with how it is called."""
    command = command or get_command(app)
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, f"{path} {name}")


# ---- help


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=lambda x: x if x else "")
def test_every_command_has_one_line_and_an_example(path: str, command: Any) -> None:
    summary = (command.help or "").strip().splitlines()
    assert summary, f"{path} has no help"
    assert 10 < len(summary[0]) <= 100, path
    assert summary[0].endswith("."), path
    lines = re.findall(r"\$ (.+)\[/cyan\]", command.epilog or "")
    assert any(line.startswith("farm") for line in lines), f"{path} has no example"
    own = path.removeprefix("farm ")
    if path != "farm":
        assert any(f"farm {own}" in line or f" {own}" in line for line in lines), path


def test_a_paragraph_of_help_is_one_line_and_usage_has_no_braces() -> None:
    for path, command in commands():
        assert not re.search(r"[^\n]\n[^\n]", command.help), path
        if not hasattr(command, "commands"):
            usage = command.get_usage(command.make_context(path, [], resilient_parsing=True))
            assert not re.search(r"[{}]|\.\.\.\.|\[\[", usage), usage


@pytest.mark.parametrize("path", [path for path, _ in commands()])
def test_help_of_every_command_can_be_shown(path: str, run: Run) -> None:
    ran = run(*path.split()[1:], "--help")
    assert ran.code == 0
    assert "Usage: " + path in ran.out
    assert "Examples" in ran.out


@pytest.mark.parametrize("path", [path for path, _ in commands()])
def test_examples_name_options_that_exist(path: str) -> None:
    tree = dict(commands())
    for line in re.findall(r"\$ (.+)\[/cyan\]", tree[path].epilog or ""):
        for part in re.split(r"&&|;|\|", line):
            words = re.sub(r'"[^"]*"|--home \S+', "", part).split()
            if not words or words[0] != "farm":
                continue
            names = [path for path in tree if " ".join(words).startswith(path)]
            both = (tree["farm"], tree[max(names, key=len)])
            known = {name for c in both for p in c.params for name in p.opts}
            assert {word for word in words if re.match(r"-{1,2}[a-z]", word)} <= known, line


def test_what_every_command_is_for(run: Run) -> None:
    """The commands that a person was promised."""
    expected = "submit status jobs watch results cancel retry pause resume prune models up worker"
    names = set(get_command(app).commands)  # type: ignore[attr-defined]
    service = "workers dispatcher serve token owner db doctor config audit reconcile provenance"
    assert names == {*expected.split(), *service.split(), "dataset", "schedule"}


def test_help_needs_no_sql_and_no_celery() -> None:
    code = (
        "import sys\nfrom farm.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'sqlalchemy', 'celery', 'boto3', 'alembic', 'torch'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [[], ["config"], ["db"]])
def test_nothing_said_shows_the_help(args: list[str], run: Run) -> None:
    ran = run(*args)
    assert ran.code == 2
    assert "Usage: farm" in ran.out + ran.err
    assert "error:" not in ran.out + ran.err


def test_version(run: Run) -> None:
    assert re.fullmatch(r"farm \d+\.\d+\.\d+\S*\n", run("--version").out)


# ---- exit codes and errors


@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (["submit"], 2, "ERR_INVALID"),
        (["submit", "x", "--file", "y"], 2, "ERR_INVALID"),
        (["submit", "x", "--format", "txt"], 2, "ERR_INVALID"),
        (["submit", "x", "--model", "nope"], 2, "ERR_UNKNOWN_MODEL"),
        (["submit", "x", "--width", "13"], 2, "ERR_INVALID_PARAMETER"),
        (["submit", "x", "--seed", "-1"], 2, "ERR_INVALID_PARAMETER"),
        (["submit", "x", "--guidance-scale", "nan"], 2, "ERR_INVALID_PARAMETER"),
        (["submit", ""], 2, "ERR_INVALID_PROMPT"),
        (["submit", "a\x00b"], 2, "ERR_INVALID_PROMPT"),
        (["submit", "x" * 2**20], 2, "ERR_INVALID_PROMPT"),
        (["submit", "--file", "missing.jsonl"], 2, "ERR_INVALID_PROMPT_FILE"),
        (["submit", "--file", "prompts.doc"], 2, "ERR_INVALID_PROMPT_FILE"),
        (["submit", "--steps", "many", "x"], 2, "ERR_USAGE"),
        (["statsu"], 2, "ERR_USAGE"),
        (["status", "nope"], 2, "ERR_NOT_FOUND"),
        (["status", "latest"], 2, "ERR_NOT_FOUND"),
        (["status", "latest/1"], 2, "ERR_NOT_FOUND"),
        (["watch", "%"], 2, "ERR_NOT_FOUND"),
        (["results", "../../etc"], 2, "ERR_NOT_FOUND"),
        (["results", "latest", "--sheet", "sheet.doc"], 2, "ERR_INVALID"),
        (["cancel", "x'; drop table jobs"], 2, "ERR_NOT_FOUND"),
        (["retry", "latest", "--code", "oom"], 2, "ERR_INVALID"),
        (["models", "show", "nope"], 2, "ERR_UNKNOWN_MODEL"),
        (["worker", "--model", "nope", "--engine", "fake"], 2, "ERR_UNKNOWN_MODEL"),
        (["worker", "--model", "shapes", "--engine", "sdcpp"], 2, "ERR_UNKNOWN_MODEL"),
        (["up", "--model", "nope"], 2, "ERR_UNKNOWN_MODEL"),
        (["up", "--memory-limit", "much"], 2, "ERR_INVALID_CONFIG"),
    ],
)
def test_bad_input_is_one_sentence_and_a_code(
    args: list[str], code: int, kind: str, run: Run
) -> None:
    ran = run(*args)
    assert (ran.code, ran.out) == (code, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(f"({kind})")
    assert "Traceback" not in ran.err
    if args[0] not in ("worker", "up"):
        as_json = run(*args, "--json")
        assert as_json.code == code
        assert as_json.json()["error"]["code"] == kind
        assert "error:" not in as_json.err


def test_a_setting_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_TICK_S", "soon")
    ran = run("status")
    assert ran.code == 2
    assert "FARM_TICK_S" in ran.err


def test_a_database_that_is_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql+psycopg://u:geheim@127.0.0.1:1/x")
    ran = run("status", "--json")
    assert ran.code == 1
    assert ran.json()["error"]["code"] == "ERR_DATABASE_UNAVAILABLE"
    assert "geheim" not in ran.out + ran.err


def test_a_home_that_cannot_be_made(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run("--home", tmp_path / "file" / "home", "status")
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("more", [(), ("-q",)])
def test_bad_rows_alone_are_told_once(run: Run, tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": ""}\n')
    ran = run(*more, "submit", "--file", "b.jsonl", "--eager")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("line 1: prompt: ") == 1
    dry = run("submit", "--file", "b.jsonl", "--dry-run")
    assert (dry.code, dry.out) == (2, "")
    assert dry.err.count("line 1: prompt: ") == 1


def test_tokens_are_none_are_made_and_revoked(run: Run) -> None:
    none = run("token", "list")
    assert (none.out, none.err) == ("", "no token yet; make one: farm token create NAME\n")
    made = run("token", "create", "laptop", "--json").json()
    assert made["id"] in run("token", "list").out
    assert run("token", "revoke", made["id"], "--json").json() == {
        "id": made["id"], "revoked": True,
    }  # fmt: skip


def test_a_file_where_pictures_should_go(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = run("submit", "a red circle on a blue background", "--out", "file")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: file is a file, not a directory (ERR_INVALID)\n"


def test_a_fault_of_ours_shows_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Farm, limit: int) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Farm, "batches", broken)
    ran = run("status")
    assert ran.code == 1
    assert "ERR_INTERNAL" in ran.err
    assert "Traceback" not in ran.err


def test_interrupted(run: Run, client: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kw: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(farm.cli.submit, "follow", interrupt)
    ran = run("submit", "a red circle on a blue background", "--wait")
    assert ran.code == 130
    batch = ran.out.strip()
    assert "the batch goes on" in ran.err
    assert f"farm cancel {batch}" in ran.err
    assert client.status(batch).counts["queued"] == 1


def test_a_reader_that_goes_away(home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "farm", "models", "show", "shapes"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(30) == 141


# ---- submit


def test_submit_prints_the_id_alone(run: Run, client: Farm) -> None:
    ran = run("submit", "a red circle on a blue background", "-n", "3", "--seed", "5")
    assert ran.code == 0
    assert re.fullmatch(r"[0-9a-z]{16}\n", ran.out)
    assert "3 jobs" in ran.err
    assert "no worker serves shapes" in ran.err
    found = list(client.jobs(ran.out.strip()))
    assert [job.spec["seed"] for job in found] == [5, 6, 7]


def test_advice_leads_to_the_same_home(run: Run, tmp_path: Path) -> None:
    ran = run("--home", tmp_path / "my home", "submit", "x")
    at = f"farm --home '{tmp_path}/my home'"
    assert f"{at} up`" in ran.err
    assert f"{at} watch {ran.out.strip()}, then {at} results" in ran.err


def test_quiet_says_nothing(run: Run) -> None:
    ran = run("-q", "submit", "a red circle on a blue background")
    assert ran.code == 0
    assert ran.err == ""


def test_every_bad_line_of_a_file_is_told(run: Run, client: Farm, tmp_path: Path) -> None:
    lines = [
        '{"prompt": "fine"}',
        '{"prompt": ""}',
        "no json",
        '{"prompt": "x", "width": 13, "steps": "many"}',
        '{"promt": "x"}',
        json.dumps({"prompt": EVIL}),
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    ran = run("submit", "--file", "bad.jsonl")
    assert (ran.code, ran.out) == (2, "")
    told = [line.split(":")[0] for line in ran.err.splitlines()[:-1]]
    assert told == ["line 2", "line 3", "line 4", "line 4", "line 5", "line 5", "line 6"]
    assert "nothing was queued (ERR_INVALID_PROMPT_FILE)" in ran.err
    assert not set(ran.err) & {"\x1b", "\x07", "\u202e"}
    as_json = run("submit", "--file", "bad.jsonl", "--json").json()["error"]
    assert [(e["line"], e["field"]) for e in as_json["errors"]][:3] == [
        (2, "prompt"), (3, "line"), (4, "width"),
    ]  # fmt: skip
    assert client.batches() == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "a", "seed": 3}\n{"prompt": "b", "n": 2}\n'),
        ("p.csv", "prompt,seed\na,3\nb,\nb,\n"),
        ("p.txt", "a\n\nb\nb\n"),
    ],
)
def test_submit_a_file(name: str, text: str, run: Run, client: Farm, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    batch = run("submit", "--file", name, "--json", "--owner", "ann", "--priority", "3").json()
    assert (batch["total"], batch["name"], batch["owner"], batch["priority"]) == (3, name, "ann", 3)
    assert [job.spec["prompt"] for job in client.jobs(batch["id"])] == ["a", "b", "b"]


LORAS = """
[models.mine]
licence = "mit"
family = "sd1"
[models.mine.engines.diffusers]
path = "weights"
[models.mine.engines.sdcpp]
path = "weights.gguf"
[loras.felt]
licence = "mit"
models = ["mine"]
[loras.felt.weights]
path = "felt.safetensors"
[loras.ink]
licence = "mit"
models = ["mine"]
[loras.ink.weights]
path = "ink.safetensors"
"""


def test_submit_with_pictures_loras_and_an_engine(run: Run, client: Farm, home: Path) -> None:
    (home / "models.toml").write_text(LORAS)
    for name, colour in (("cat.png", "white"), ("mask.png", "grey")):
        Image.new("RGB", (64, 64), colour).save(name)
    ran = run(
        "submit", "a cat", "-m", "mine", "--engine", "sdcpp", "--init-image", "cat.png",
        "--mask-image", "mask.png", "--strength", "0.5", "--lora", "felt:0.7", "--lora", "ink",
        "--clip-skip", "1",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "no worker serves mine on sdcpp now, 1 job waiting" in ran.err
    assert "`farm up --model mine:sdcpp`" in ran.err
    shown = run("status", "latest/0").out
    for line in (
        "engine asked +sdcpp", "init image +inputs/[0-9a-f]{64}.png", "strength +0.5",
        "mask image +inputs/[0-9a-f]{64}.png", "loras +felt:0.7, ink:1", "clip skip +1",
    ):  # fmt: skip
        assert re.search(f"(?m)^{line}$", shown), line
    spec = run("status", "latest/0", "--json").json()["spec"]
    assert spec["loras"] == [["felt", 0.7], ["ink", 1.0]]
    Path("rows.csv").write_text(
        'prompt,init_image,strength,loras,clip_skip,engine\na,cat.png,0.25,"ink:-1, felt",2,sdcpp\n'
        "b,,,,,\n"
    )
    batch = run("submit", "-f", "rows.csv", "-m", "mine", "--json").json()["id"]
    one, two = (job.spec for job in client.jobs(batch))
    assert (one["strength"], one["loras"], one["clip_skip"], one["engine"]) == (
        0.25, (("felt", 1.0), ("ink", -1.0)), 2, "sdcpp",
    )  # fmt: skip
    assert (two["init_image"], two["strength"], two["loras"]) == (None, None, ())


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--init-image", "none.png"], "init_image: expected a PNG, JPEG or WebP file"),
        (["--init-image", "http://x/y.png"], "download it first"),
        (["--strength", "0.5"], "strength and init_image go together"),
        (["--lora", "felt"], "loras: expected LoRAs for model shapes"),
        (["--lora", "felt:much"], "no names with weights"),
        (["--engine", "sdcpp"], "engine: expected one of diffusers"),
        (["--engine", "torch"], "engine: expected one of diffusers, sdcpp"),
        (["--clip-skip", "99"], "clip_skip: expected a whole number"),
    ],
)
def test_what_a_job_cannot_ask_for(args: list[str], told: str, run: Run, client: Farm) -> None:
    ran = run("submit", "x", *args)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert client.batches() == []


def test_blocked_terms(run: Run, client: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("terms.txt").write_text("# ours\ngore\n")
    monkeypatch.setenv("FARM_BLOCKLIST", "terms.txt")
    ran = run("submit", "some Gore", "--json")
    assert (ran.code, ran.json()["error"]["code"]) == (2, "ERR_INVALID_PROMPT")
    assert run("submit", "a circle").code == 0
    monkeypatch.setenv("FARM_BLOCKLIST", "none.txt")
    assert "ERR_INVALID_CONFIG" in run("submit", "a circle").err


def test_submit_standard_input(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "farm", "submit", "--file", "-", "--format", "txt", "--json"],
        input="a red circle on a blue background\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["total"] == 1


# ---- look, manage, fetch


def test_a_batch_that_partly_failed(run: Run, client: Farm, tmp_path: Path) -> None:
    refused = run("submit", "one", "--name", EVIL)
    assert (refused.code, "U+001B" in refused.err) == (2, True)
    name = EVIL.replace("\x1b", "").replace("\x07", "")
    batch = run("submit", "one", "two", "three", "--name", name).out.strip()
    work(client, failing=1)
    shown = run("status", batch[:12])
    assert shown.code == 0
    assert "3: 2 succeeded, 1 failed" in shown.out
    assert re.search(r"failed ERR_OUT_OF_MEMORY +1\n", shown.out)
    assert "farm retry" in shown.err
    assert not set(shown.out) & {"\x1b", "\x07", "\u202e"}
    assert run("status", "latest", "--json").json()["failures"] == {"ERR_OUT_OF_MEMORY": 1}
    assert run("watch", batch).code == 1
    assert run("watch", batch, "--json").json()["counts"]["failed"] == 1

    fetched = run("results", batch, "--out", "got", "--sheet", "sheet.png", "--json")
    assert fetched.code == 1
    assert fetched.json()["pictures"] == fetched.json()["on_sheet"] == 2
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == [
        f"{batch}-0000001.png", f"{batch}-0000002.png", f"{batch}.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "sheet.png").is_file()
    listed = run("results", batch, "--list", "--json")
    assert [job["idx"] for job in listed.json()] == [1, 2]
    assert len(run("results", batch, "--list").out.splitlines()) == 2


def test_a_job_with_its_history(run: Run, client: Farm) -> None:
    run("submit", EVIL.replace("\x1b", "").replace("\x07", ""))
    work(client, failing=1)
    ran = run("status", "latest/0")
    assert "state           failed" in ran.out
    assert "ERR_OUT_OF_MEMORY" in ran.out
    assert "\u202e" not in ran.out
    told = run("status", "latest/0", "--json").json()
    assert [event["kind"] for event in told["history"]] == ["failed"]


def test_retry_by_code_and_by_job(run: Run, client: Farm) -> None:
    run("submit", "a", "b", "c")
    work(client, failing=3)
    assert run("retry", "latest", "--code", "ERR_BAD_IMAGE", "--json").json()["queued"] == 0
    assert run("retry", "latest/1", "--json").json()["queued"] == 1
    assert run("retry", "latest", "--json").json()["queued"] == 2
    assert client.batches()[0].counts["queued"] == 3


def test_cancel_pause_resume(run: Run, client: Farm) -> None:
    batch = run("submit", "a", "b", "c").out.strip()
    assert run("pause", batch, "--json").json()["paused"] is True
    assert "paused" in run("status").out
    assert run("resume", batch, "--json").json()["paused"] is False
    assert run("cancel", f"{batch}/1", "--json").json()["cancelled"] == 1
    assert "cancelled 2 jobs" in run("cancel", batch).err
    assert "nothing to cancel" in run("cancel", batch).err
    assert run("watch", batch).code == 0
    assert run("retry", f"{batch}/1").err.startswith("nothing to queue")
    assert run("retry", batch, "--cancelled", "--json").json()["queued"] == 3


def test_nothing_there_yet(run: Run) -> None:
    for command in ("status", "workers", "watch"):
        ran = run(command)
        assert (ran.code, ran.out) == (0, "")
        assert ran.err
    assert run("status", "--json").json() == []
    assert run("workers", "--json").json() == []


def test_workers(run: Run, client: Farm) -> None:
    with client.db.write() as connection:
        sessions.open_session(
            connection, SHAPES, 60, host="here", pid=7, device="cuda:0", info={"torch": "2"}
        )
    assert re.search(r"shapes +diffusers +cuda:0 +here:7 +idle", run("workers").out)
    assert run("workers", "--json").json()[0]["info"] == {"torch": "2"}
    assert "no worker" not in run("submit", "x").err


def test_pictures_that_are_held_back_are_told(run: Run, client: Farm) -> None:
    run("submit", "x")
    for n in (30, 100):
        with client.db.write() as connection:
            session = sessions.open_session(
                connection, SHAPES, 60, host="here", pid=n, device="cpu", info={}
            )
            told = sessions.Beat("waiting", f"the store is away ({n})", spooled=n)
            assert sessions.beat(connection, session, 60, told)
    line = "2 workers hold 130 finished pictures: the store is away (100)"
    assert line in run("status").err
    assert line in run("status", "latest").err
    assert re.search(r"here:30 +waiting +0 +30 ", run("workers").out)
    assert "they hold 130 finished pictures" in run("doctor").out


def test_status_says_why_a_worker_waits(run: Run, client: Farm) -> None:
    run("submit", "x")
    with client.db.write() as connection:
        session = sessions.open_session(
            connection, SHAPES, 60, host="here", pid=7, device="cpu", info={}
        )
        told = sessions.Beat(state="waiting", note="the disk is full\x1b[2J")
        sessions.beat(connection, session, 60, told)
    assert "worker here:7 is waiting: the disk is full\\x1b[2J" in run("status", "latest").err


def test_models(run: Run, home: Path) -> None:
    home.mkdir()
    (home / "models.toml").write_text(
        '[models.mine]\nlicence = "mit"\n[models.mine.engines.diffusers]\npath = "weights"\n'
    )
    names = [model["name"] for model in run("models", "list", "--json").json()]
    assert names == ["mine", "shapes"]
    assert run("models").out == run("models", "list").out
    assert str(home / "weights") in run("models", "show", "mine").out
    (home / "models.toml").write_text("[models.Mine]\n")
    assert run("models").code == 2


# ---- settings, database


def test_config_shows_every_setting_and_no_secret(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "DATABASE_URL": "postgresql+psycopg://user:geheim@host/db?password=geheim",
        "BROKER_URL": "rediss://:geheim@host:6379/0",
        "BLOBS_URL": "s3://bucket/prefix",
        "S3_ACCESS_KEY": "geheim",
        "S3_SECRET_KEY": "geheim",
    }.items():
        monkeypatch.setenv(f"FARM_{name}", value)
    shown, told = run("config", "show"), run("config", "show", "--json")
    assert "geheim" not in shown.out + shown.err + told.out + told.err
    settings = told.json()
    assert set(settings) == set(Settings.model_fields)
    assert settings["s3_secret_key"]["set"] is True
    assert settings["tick_s"] == {"value": 1.0, "env": "FARM_TICK_S", "set": False}
    for name in Settings.model_fields:
        assert f"FARM_{name.upper()}" in shown.out
    assert re.search(r"^FARM_S3_PATH_STYLE +true ", shown.out, re.MULTILINE), "as TOML has it"
    assert re.search(r"^FARM_HUB_HOSTS +\[\] ", shown.out, re.MULTILINE)


def test_home_goes_before_the_environment(run: Run, tmp_path: Path) -> None:
    told = run("--home", tmp_path / "other", "config", "show", "--json").json()
    assert told["home"]["value"] == str(tmp_path / "other")
    assert str(tmp_path / "other") in told["database_url"]["value"]


def test_db(run: Run) -> None:
    empty = run("db", "current", "--json")
    assert (empty.code, empty.json()["current"]) == (1, None)
    assert run("db", "upgrade").code == 0
    current = run("db", "current")
    assert (current.code, current.out) == (0, f"{schema.head()}\n")
    assert "already" in run("db", "upgrade").err


# ---- words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0.0 s"), (4.2, "4.2 s"), (9.96, "10 s"), (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"), (18_420, "5 h 07 min"), (183_600, "2 d 3 h"), (-3, "0.0 s"),
    ],
)  # fmt: skip
def test_duration(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(None, "-"), (0, "-"), (3.14, "3.1/s"), (0.5, "30.0/min"), (0.001, "3.6/h")],
)
def test_pace(rate: float | None, text: str) -> None:
    assert output.pace(rate) == text


def test_about() -> None:
    assert [output.about(seconds) for seconds in (0, 0.9, 12)] == [
        "less than a second", "less than a second", "about 12 s",
    ]  # fmt: skip


def test_clean() -> None:
    assert output.clean("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert output.clean("héllo 画 👩‍🎨") == "héllo 画 👩‍🎨"
    assert output.short("x" * 100, 10) == "x" * 9 + "…"


def table(columns: tuple[str, ...], rows: list[tuple[str | None, ...]]) -> list[str]:
    """Its lines on a terminal of COLUMNS cells, without colours."""
    screen = Terminal()
    output.print_table(columns, rows, screen)
    return re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue()).splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    prompt, why = "a red circle on a blue background", "ERR_RENDER_FAILED: the picture is uniform"
    row = ("1m8b298c47nwh16n/0", "succeeded", "diffusers", None, prompt, why)
    head, first, *more = table(("job", "state", "engine", "took", "prompt", "what"), [row])
    assert head.split() == ["job", "state", "engine", "prompt", "what"], "no empty column"
    assert first.startswith("1m8b298c47nwh16n/0  succeeded  diffusers  a red")
    assert "ERR_RENDER_FAILED:" in first
    words = {word for line in (first, *more) for word in line.split()}
    assert {*prompt.split(), *why.split()} <= words, "no word is folded"
    assert max(map(cell_len, (head, first, *more))) <= 80


def test_wide_characters_push_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("prompt", "what"), [("赤い円", "x"), ("a circle", "y")])
    assert capsys.readouterr().out == "PROMPT    WHAT\n赤い円    x\na circle  y\n"
