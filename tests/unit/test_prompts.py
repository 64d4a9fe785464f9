from __future__ import annotations

import io
import json

import pytest

from farm.catalog import load_catalog
from farm.errors import InvalidPromptFile, RowError
from farm.prompt_files import MAX_LINE_BYTES, guess_format, read_rows
from farm.prompts import Defaults, make_jobs, prompt_rows
from farm.spec import JobSpec, NewJob

CATALOG = load_catalog()


def specs(data: bytes, form: str, n: int = 1, **given: object) -> list[JobSpec | RowError]:
    defaults = Defaults({"model": "shapes", **given}, n)
    jobs = make_jobs(read_rows(io.BytesIO(data), form), defaults, CATALOG)
    return [job.spec if isinstance(job, NewJob) else job for job in jobs]


def errors(data: bytes, form: str) -> list[tuple[int, str]]:
    found = specs(data, form)
    return [(e.line, e.field) for e in found if isinstance(e, RowError)]


def test_txt() -> None:
    one, two = specs(b"\xef\xbb\xbfa red circle\r\n\n  \na blue star", "txt", steps=5)
    assert isinstance(one, JobSpec)
    assert isinstance(two, JobSpec)
    assert (one.prompt, two.prompt, two.steps) == ("a red circle", "a blue star", 5)


def test_jsonl_rows_win_over_defaults_and_null_means_not_given() -> None:
    rows = [{"prompt": "a", "steps": 7, "seed": None}, {"prompt": "b", "n": 3, "seed": 10}]
    found = specs("\n".join(map(json.dumps, rows)).encode(), "jsonl", steps=5, seed=1)
    assert [(s.prompt, s.steps, s.seed) for s in found if isinstance(s, JobSpec)] == [
        ("a", 7, 1), ("b", 5, 10), ("b", 5, 11), ("b", 5, 12),
    ]  # fmt: skip


def test_csv_with_quotes_newlines_and_empty_cells() -> None:
    data = b'prompt,seed,steps,guidance_scale\n"a ""red"" circle,\n\nbig",3,,4.5\nb,,9,\n'
    one, two = specs(data, "csv")
    assert isinstance(one, JobSpec)
    assert isinstance(two, JobSpec)
    assert (one.prompt, one.seed, one.steps, one.guidance_scale) == (
        'a "red" circle,\n\nbig', 3, CATALOG.get("shapes").defaults.steps, 4.5,
    )  # fmt: skip
    assert two.steps == 9


def test_every_bad_line_of_a_jsonl_is_reported_with_its_number_and_field() -> None:
    lines = [
        b'{"prompt": "good"}',
        b'{"prompt": ""}',
        b"not json",
        b'["a list"]',
        b'{"prompt": "x", "steps": "20"}',
        b'{"prompt": "x", "sampler": "euler"}',
        b'{"prompt": "x", "width": 63, "height": 10000}',
        b'{"prompt": "x", "model": "sdxl"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a\\u0000b"}',
        b'{"seed": 1}',
        b'{"prompt": "x", "n": 0}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "' + b"x" * (MAX_LINE_BYTES + 5) + b'"}',
        b'{"prompt": "x", "seed": 9223372036854775807, "n": 2}',
        b"[" * 100_000,
        b'{"prompt": "x", "guidance_scale": NaN}',
        b'{"prompt": "good again"}',
    ]
    assert errors(b"\n".join(lines), "jsonl") == [
        (2, "prompt"), (3, "line"), (4, "line"), (5, "steps"), (6, "sampler"), (7, "width"),
        (7, "height"), (8, "model"), (9, "line"), (10, "prompt"), (11, "prompt"), (12, "n"),
        (13, "line"), (14, "line"), (15, "seed"), (16, "line"), (17, "guidance_scale"),
    ]  # fmt: skip


def test_bad_csv_lines() -> None:
    assert errors(b"prompt,steps\na,x\nb\nc,1,2\nd,3\n\xff,1\n", "csv") == [
        (2, "steps"), (3, "line"), (4, "line"), (6, "line"),
    ]  # fmt: skip
    assert errors(b"text,steps\na,1\n", "csv") == [(1, "header")]
    assert errors(b"prompt,prompt\na,b\n", "csv") == [(1, "header")]
    assert errors(b"prompt,sampler\na,b\n", "csv") == [(1, "header")]


def test_the_model_s_own_limits() -> None:
    (error,) = specs(b'{"prompt": "x", "width": 512}', "jsonl")
    assert isinstance(error, RowError)
    assert "64 pixels" in error.expected


def test_seeds_are_drawn_and_differ_when_none_is_given() -> None:
    found = specs(b"a\na\na\na\n", "txt")
    assert len({s.seed for s in found if isinstance(s, JobSpec)}) == 4


def test_rows_from_python() -> None:
    rows = list(prompt_rows(["a", {"prompt": "b"}, 3]))  # type: ignore[list-item]
    assert rows[:2] == [(1, {"prompt": "a"}), (2, {"prompt": "b"})]
    assert isinstance(rows[2][1], RowError)


def test_formats_by_ending() -> None:
    from pathlib import Path

    assert guess_format(Path("a.JSONL")) == "jsonl"
    with pytest.raises(InvalidPromptFile, match="say --format"):
        guess_format(Path("a.xlsx"))
