"""Prompt files: what is accepted is what was in, and what is refused is told by line and field.

Generated files of each format whose rows are known must come back as they were; hostile ones must
end in rows and row errors, whose numbers only grow; some go through `farm submit --dry-run` too.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from farm import parquet_rows
from farm.catalog import load_catalog
from farm.cli import main
from farm.errors import InvalidConfig, InvalidPromptFile, RowError
from farm.inputs import InputPictures
from farm.prompt_files import FORMATS, ROW_FIELDS, guess_format, read_rows
from farm.prompts import Defaults, make_jobs
from farm.spec import NewJob
from tests.farm_kit import FAKES
from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.picture_kit import picture

MOST_JOBS = 5_000
TEXTS = tuple(form for form in FORMATS if form != "parquet")


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    (data / "models.toml").write_text(FAKES)
    (data / "picture.png").write_bytes(picture())
    guard.may_run.add(parquet_rows.__file__)
    catalog = load_catalog(data / "models.toml")

    def judge(case: Case) -> str:
        # Parquet is read by a process of its own, whose start is what it costs
        form = case.rng.choice(FORMATS if case.one_in(8) else TEXTS)
        if case.one_in(3):
            return known(case, form)
        content = hostile(case.rng, form)
        case.told = f"{form} {content[:1500]!r}"
        if case.one_in(12):
            return at_the_terminal(case, data, form, content)
        columns = _columns(case.rng)
        rows = _rows(content, form, columns)
        if form in ("txt", "jsonl") and not columns and content[:2] != b"\x1f\x8b":
            _every_line(content, rows)
        with InputPictures(_no_blobs, _no_job, data, upload=False) as pictures:
            defaults = Defaults({"model": "fake-fast"}, take=pictures.take)
            return made(rows, list(_some(make_jobs(rows, defaults, catalog))))

    yield judge


def _no_blobs() -> Any:
    raise InvalidConfig("no blob store here")


def _no_job(name: str) -> bytes:
    raise InvalidPromptFile("no job here")


def _some(jobs: Iterator[NewJob | RowError]) -> Iterator[NewJob | RowError]:
    for _, job in zip(range(MOST_JOBS), jobs, strict=False):
        yield job


# ---- files whose rows are known


def known(case: Case, form: str) -> str:
    """A good file gives exactly its rows."""
    rng = case.rng
    wanted = [good_row(rng, form) for _ in range(rng.randrange(1, 12))]
    content = written(rng, form, wanted)
    if form != "parquet" and case.one_in(3):
        content = words.gzip.compress(content, 1)
    case.told = f"{form} {content!r}\nof {wanted}"
    found = [row for _, row in _rows(content, form, None)]
    if found != wanted:
        raise Finding(f"{found!r} is not what was in")
    return f"{form} as it was"


def good_row(rng: Random, form: str) -> dict[str, Any]:
    names = ("prompt", "seed", "width", "guidance_scale", "format", "negative_prompt")
    row = {name: rng.choice(words.GOOD[name]) for name in names[: rng.randrange(1, 7)]}
    if "\n" in row["prompt"] and form not in ("jsonl", "parquet"):
        row["prompt"] = row["prompt"].replace("\n", " ")
    if form == "txt":
        return {"prompt": row["prompt"]}
    if form in ("csv", "tsv"):
        row = {name: rng.choice(words.GOOD[name]) for name in names[:5]} | {"prompt": row["prompt"]}
        row["guidance_scale"] = float(row["guidance_scale"])
    return row


def written(rng: Random, form: str, rows: Sequence[dict[str, Any]]) -> bytes:
    """The rows as a file, with whatever line ends and blank lines a format allows."""
    end = rng.choice(("\n", "\r\n"))
    if form == "parquet":
        # one column each: rows that lack a field hold null there
        names = sorted({name for row in rows for name in row})
        columns = {name: [row.get(name) for row in rows] for name in names}
        if "guidance_scale" in columns:
            column = columns["guidance_scale"]
            columns["guidance_scale"] = [None if v is None else float(v) for v in column]
        out = io.BytesIO()
        size = rng.choice((1, 2, 100))
        pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=size)
        return out.getvalue()
    if form in ("csv", "tsv"):
        text = io.StringIO(newline="")
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC))
        delimiter = "," if form == "csv" else "\t"
        table = csv.DictWriter(
            text, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting
        )
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode(rng.choice(("utf-8", "utf-8-sig")))
    lines = [row["prompt"] if form == "txt" else json.dumps(row) for row in rows]
    blank = rng.choice(("", "", end))
    return (end + blank).join([*lines, ""]).encode(rng.choice(("utf-8", "utf-8-sig")))


# ---- hostile files


def hostile(rng: Random, form: str) -> bytes:
    """A file of rows that are partly bad, changed in places, or nothing like its format."""
    rows = [words.row(rng, 0.25) for _ in range(rng.randrange(0, 8))]
    if form == "parquet":
        content = _parquet(rng, rows)
    elif form in ("csv", "tsv"):
        content = words.encoded(rng, _table(rng, rows, "," if form == "csv" else "\t"))
    else:
        end = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
        lines = [words.line(rng, row) if form == "jsonl" else words.text(rng) for row in rows]
        content = words.encoded(rng, end.join(lines))
    kind = rng.randrange(12)
    if kind < 4:
        content = words.broken(rng, content)
    elif kind < 6:
        content = words.zipped(rng, content)
    elif kind == 6:
        content = rng.randbytes(rng.randrange(400))
    elif kind == 7 and rng.randrange(8) == 0:
        content += b"x" * rng.choice((2**20 - 1, 2**20, 2**20 + 1, 10 * 2**20)) + b"\n" + content
    return content


def _table(rng: Random, rows: list[dict[str, Any]], delimiter: str) -> str:
    names = ["prompt", *rng.sample(ROW_FIELDS, rng.randrange(0, 5))]
    if rng.randrange(5) == 0:
        names += [words.text(rng)[:100]]
    lines = [delimiter.join(names)]
    for row in rows:
        cells = [str(row.get(name, ""))[:20_000] for name in names]
        if rng.randrange(2):
            cells = ['"' + cell.replace('"', '""') + '"' for cell in cells]
        lines.append(delimiter.join(cells[: rng.choice((99, 99, 1))]))
    return rng.choice(("\n", "\r\n", "\r")).join([*lines, ""])


def _parquet(rng: Random, rows: list[dict[str, Any]]) -> bytes:
    """Columns of one wrong type each, nested ones, none at all."""
    columns: dict[str, Any] = {"prompt": [words.text(rng) for _ in rows]}
    for name in rng.sample([*ROW_FIELDS, "other"], rng.randrange(4)):
        one = words.value(rng)
        columns[name] = [one for _ in rows]
    out = io.BytesIO()
    try:
        table = pyarrow.table({str(k): v for k, v in columns.items()})
        pyarrow.parquet.write_table(table, out)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, UnicodeError):
        table = pyarrow.table({"prompt": [b"\xff\xfe"], "seed": [[1, 2]], "steps": [{"a": 1}]})
        pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def _columns(rng: Random) -> dict[str, str] | None:
    if rng.randrange(6):
        return None
    names = rng.sample(ROW_FIELDS, rng.randrange(1, 4))
    return {name: rng.choice((name, "prompt", words.text(rng)[:80] or "x")) for name in names}


# ---- what must hold


def _rows(content: bytes, form: str, columns: dict[str, str] | None) -> list[Any]:
    """The rows and row errors; their numbers never fall."""
    rows = list(read_rows(io.BytesIO(content), form, columns))
    numbers = [number for number, _ in rows]
    if numbers != sorted(numbers) or min(numbers, default=1) < 1:
        raise Finding(f"lines are numbered {numbers}")
    for number, row in rows:
        if isinstance(row, RowError):
            if not (row.line == number and row.field and row.expected and row.code):
                raise Finding(f"{row!r} says too little")
        elif not isinstance(row, dict):
            raise Finding(f"{row!r} is no row")
    return rows


def _every_line(content: bytes, rows: list[Any]) -> None:
    """Each line with something on it is a row or an error, and no other is."""
    wanted = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            blank = not raw.decode().strip()
        except UnicodeDecodeError:
            blank = False
        if not blank:
            wanted.append(number)
    if [number for number, _ in rows] != wanted:
        raise Finding(f"rows {[number for number, _ in rows]} of the lines {wanted}")


def made(rows: list[Any], jobs: list[NewJob | RowError]) -> str:
    """Each row became jobs with its prompt, or errors with its line."""
    for job in jobs:
        if isinstance(job, NewJob):
            type(job.spec).model_validate(job.spec.model_dump())
    bad = {job.line for job in jobs if isinstance(job, RowError)}
    good = sum(isinstance(job, NewJob) for job in jobs)
    if rows and len(jobs) < MOST_JOBS:
        counted = sum(row.get("n") or 1 for number, row in rows if number not in bad)
        if good != counted:
            raise Finding(f"{good} jobs of {counted}")
    return "accepted" if good and not bad else "partly accepted" if good else "refused"


def at_the_terminal(case: Case, data: Path, form: str, content: bytes) -> str:
    """`farm submit --file ... --dry-run` ends with 0 or 2, and with no traceback."""
    ending = case.rng.choice((f".{form}", ".gz", ".txt", ".parquet", ".zip"))
    path = data / f"prompts{ending}"
    path.write_bytes(content)
    argv = ["--home", str(data / "home"), "submit", "--file", str(path), "--dry-run"]
    argv += ["--model", case.rng.choice(("shapes", "fake-fast"))] if case.one_in(2) else []
    argv += ["--format", form] if case.one_in(2) else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    told = err.getvalue()
    if code not in (0, 2) or "Traceback" in told or "ERR_INTERNAL" in told:
        raise Finding(f"exit code {code}: {told[-1500:]}")
    with contextlib.suppress(InvalidPromptFile):
        guess_format(path)
    return f"submit --dry-run: {code}"
