"""Log lines: one event, one line, whatever is in it; and what it is about."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from farm import logs
from farm.cli.context import _LogLine
from farm.spec import JobSpec
from farm.store.ids import JobRef
from farm.store.jobs import Claim

SPEC = JobSpec(model="m", prompt="p", seed=1, width=64, height=64, steps=1, guidance_scale=1.0)
CLAIM = Claim(JobRef("b" * 16, 7), 3, "s" * 32, SPEC)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    logs._always.clear()


def _line(form: str, capsys: pytest.CaptureFixture[str], *args: object, **more: object) -> str:
    logs.begin("info", form, role="worker", lane="m:fake")
    logs.always(worker="s" * 32)
    logging.getLogger("workers.keeper").warning(*args, **more)  # type: ignore[arg-type]
    return capsys.readouterr().err


def test_a_line_tells_batch_job_claim_and_worker(capsys: pytest.CaptureFixture[str]) -> None:
    line = _line("text", capsys, "no room for %d", 5, extra=logs.about(CLAIM))
    assert line.endswith(
        f" WARNING workers.keeper no room for 5 role=worker lane=m:fake worker={'s' * 32} "
        f"batch={'b' * 16} job={'b' * 16}/7 claim=3\n"
    )
    told = json.loads(_line("json", capsys, "no room for %d", 5, extra=logs.about(CLAIM)))
    assert told["message"] == "no room for 5"
    assert (told["batch"], told["job"], told["claim"]) == ("b" * 16, f"{'b' * 16}/7", 3)
    assert (told["worker"], told["level"], told["logger"]) == (
        "s" * 32,
        "warning",
        "workers.keeper",
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_is_told_ends_no_line(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\nERROR forged\r\x1b[2Jb\u2028c \x9b"
    line = _line(form, capsys, "%s", hostile)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert not set("\r\x1b\u2028\x9b") & set(line)


def test_a_traceback_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("odd\n2026-11-21T00:00:00.000Z INFO forged\x1b[2J\u202e")
    except ValueError:
        text = _line("text", capsys, "a prompt", exc_info=sys.exc_info())
        record = logging.LogRecord("x", 40, "x", 1, "a\nerror: b\x1b", None, sys.exc_info())
    for told in (text, _LogLine().format(record)):
        _, *more = told.rstrip("\n").split("\n")
        assert more
        assert all(line.startswith("  ") for line in more)
        assert not set("\x1b\u202e") & set(told)


def test_a_traceback_stands_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        line = _line("json", capsys, "after a record", exc_info=sys.exc_info())
    assert "ValueError: odd" in json.loads(line)["exception"]
