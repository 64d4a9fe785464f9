"""Every command of `farm` with hostile words, on a home of its own: 0, 1 or 2, and one sentence.

A command that waits or serves is told to end after a moment, as by Ctrl-C; then it may say 130.
Where results go is the asker's own choice, and so below the data directory always. `farm up`,
`worker` and `dispatcher` always get a word that is surely wrong, for they start processes.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

from typer.main import get_command

from farm import parquet_rows
from farm.catalog import Lane
from farm.cli import app, main
from farm.cli.context import use
from farm.config import Settings
from farm.dispatch import claim_bundle
from farm.errors import OutOfMemory
from farm.service import Farm
from farm.store import jobs, sessions
from tests.farm_kit import FAKES
from tests.fuzz import words
from tests.fuzz.core import SLOW_S, Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.picture_kit import picture

PATIENCE_S = 1.0
STARTS = {"up", "worker", "dispatcher"}
WAITS = {"watch", "submit", "serve", "status", "results"}
PLACES = {"out", "sheet"}
SKIPPED = {
    "models convert",
    "models fetch",
}  # of the good names: they start processes, or ask a hub


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    home = data / "home"
    home.mkdir()
    (home / "models.toml").write_text(FAKES)
    (data / "picture.png").write_bytes(picture())
    (data / "prompts.txt").write_text("a\nb\n")
    known = _prepared(home)
    guard.may_run.add(parquet_rows.__file__)
    commands = list(_leaves(get_command(app)))
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"a prompt\n"))
    (data / "here").mkdir()
    os.chdir(data / "here")

    def judge(case: Case) -> str:
        path, command = case.rng.choice(commands)
        argv = [
            *_globals(case.rng, home),
            *path.split(),
            *_words(case.rng, path, command, data, known),
        ]
        case.told = repr(argv)
        code, out, err = _call(argv, path in WAITS)
        _check(path, argv, code, out, err)
        return f"exit code {code}"

    yield judge
    sys.stdin = stdin
    use(None, 0, False)


def _prepared(home: Path) -> list[str]:
    """A farm with jobs that are queued, failed and cancelled; batches' names."""
    with Farm(Settings(home=home)) as farm:
        farm.check_schema()
        found = [farm.submit(["a", "b"], name=f"batch {n}").id for n in range(3)]
        lane = Lane("shapes", "diffusers")
        with farm.db.write() as connection:
            session = sessions.open_session(
                connection, lane, 60, host="here", pid=1, device="cpu", info={}
            )
        for claim in claim_bundle(farm.db, session, lane, 2):
            with farm.db.write() as connection:
                jobs.fail(connection, claim, OutOfMemory())
        farm.cancel(found[1])
        farm.pause(found[2])
    return found


def _leaves(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    if not children and path not in SKIPPED:
        yield path, command
    for name, child in children.items():
        yield from _leaves(child, f"{path} {name}".strip())


def _globals(rng: Random, home: Path) -> list[str]:
    kind = rng.randrange(25)
    if kind == 0:
        return ["--home", str(home / "none" / rng.choice(("x", "a" * 400)))]
    return ["--home", str(home), *(["-q"] if kind == 1 else ["-vv"] if kind == 2 else [])]


def _words(rng: Random, path: str, command: Any, data: Path, known: list[str]) -> list[str]:
    """Options and arguments of the command, each good or hostile, in any order."""
    groups: list[list[str]] = []
    for param in command.params:
        if param.name == "help" or (param.param_type_name == "option" and rng.randrange(4)):
            continue
        given = _value(rng, param, data, known)
        if param.param_type_name == "argument":
            groups += [[each] for each in [given] * rng.choice((0, 1, 1, 1, 1, 2))]
        elif param.is_flag:
            groups.append([param.opts[0]])
        else:
            groups.append([rng.choice(param.opts), given])
    if rng.randrange(8) == 0:
        groups.append([words.text(rng)])
    if path in STARTS or (path == "serve" and rng.randrange(4)):
        groups.append([rng.choice(("--none", "-0", "--non\ud800"))])
        groups = [group for group in groups if group[0] not in ("--help", "-h")]
    rng.shuffle(groups)
    return [word for group in groups for word in group]


def _value(rng: Random, param: Any, data: Path, known: list[str]) -> str:
    if param.name in PLACES:
        return str(data / rng.choice(("here", "out/x", "sheet.png", "sheet.doc", "prompts.txt")))
    kind = param.bare_type
    if isinstance(kind, type) and issubclass(kind, Enum) and rng.randrange(2):
        return str(rng.choice([each.value for each in kind]))
    turn = rng.randrange(10)
    if turn < 3:
        good = words.GOOD.get(param.name)
        return str(rng.choice(good)) if good else rng.choice((*known, "latest", f"{known[0]}/0"))
    if turn == 3:
        return str(rng.choice(words.NUMBERS))
    if turn == 4:
        return rng.choice(
            (str(data / "prompts.txt"), str(data / "picture.png"), str(data), "30d", "8GB")
        )
    return words.text(rng)


def _call(argv: list[str], waits: bool) -> tuple[int, str, str]:
    """Run it; to one that may wait a Ctrl-C comes after a moment."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and the like ignore it
    if waits:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S, SLOW_S - PATIENCE_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        if waits:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    # Python shows a Ctrl-C that came while something was collected, and goes on
    told = err.getvalue()
    return code, out.getvalue(), "interrupted" if "\nKeyboardInterrupt" in told else told


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _check(path: str, argv: list[str], code: int, out: str, err: str) -> None:
    allowed = {0, 1, 2} | ({130} if path in WAITS else set())
    if code not in allowed or "Traceback" in err or "ERR_INTERNAL" in out + err:
        raise Finding(f"exit code {code}\n{out[-500:]}\n{err[-3000:]}")
    if code in (1, 2) and not (out or err):
        raise Finding(f"exit code {code}, and not a word")
    if bad := {char for char in out + err if ord(char) < 32 and char not in "\n\t"}:
        raise Finding(f"characters that a terminal obeys: {bad!r}")
