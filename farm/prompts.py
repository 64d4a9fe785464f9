"""Prompt files (jsonl, csv, txt, standard input) and plain prompts, as a stream of JobSpecs.

Nothing is guessed and nothing is skipped: a bad line is a RowError with its number, its field
and what was expected.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from farm.abilities import narrowed
from farm.catalog import Catalog
from farm.checks import Link, chain, check_texts
from farm.errors import (
    InvalidParameter,
    InvalidPrompt,
    InvalidPromptFile,
    RowError,
    UnknownModel,
)
from farm.spec import DEFAULT_STRENGTH, EXPECTED, FIELDS, MAX_SEED, JobSpec, row_errors

FORMATS = ("jsonl", "csv", "txt")
MAX_LINE_BYTES = 1 << 20
MAX_PICTURES = 10_000
Row = tuple[int, Mapping[str, Any] | RowError]
_WHOLE = {"width", "height", "steps", "seed", "n", "clip_skip"}
_NUMBERS = {"guidance_scale", "strength"}
_ROW_FIELDS = (*FIELDS, "n")


def guess_format(path: Path) -> str:
    """jsonl, csv or txt by the file's ending; raises InvalidPromptFile for any other."""
    known = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".txt": "txt"}
    if path.suffix.lower() not in known:
        raise InvalidPromptFile(
            f"{path}: the ending {path.suffix!r} is none of {', '.join(known)}; say --format"
        )
    return known[path.suffix.lower()]


def read_rows(stream: BinaryIO, form: str) -> Iterator[Row]:
    """(line number from 1, fields or the line's error) for each line with something on it."""
    lines = _text_lines(stream)
    if form == "csv":
        return _read_csv(lines)
    read = _json_row if form == "jsonl" else _txt_row
    return (read(n, text) for n, text in lines if isinstance(text, RowError) or text.strip())


Line = tuple[int, str | RowError]


def _text_lines(stream: BinaryIO) -> Iterator[Line]:
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            yield number, _row_error(number, "line", "over 1 MiB", "a line of at most 1 MiB")
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, _row_error(number, "line", f"byte {error.start + 1} is not", "UTF-8 text")
            continue
        yield number, text


def _row_error(line: int, field: str, got: str, expected: str) -> RowError:
    return RowError(line, field, got, expected, InvalidPromptFile.code)


def _txt_row(number: int, text: str | RowError) -> Row:
    return number, text if isinstance(text, RowError) else {"prompt": text}


def _json_row(number: int, text: str | RowError) -> Row:
    if isinstance(text, RowError):
        return number, text
    try:
        row = json.loads(text, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        return number, _row_error(number, "line", str(error)[:120], "one JSON object")
    if not isinstance(row, dict):
        return number, _row_error(number, "line", type(row).__name__, "one JSON object")
    return number, row


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a field stands twice")
    return row


def _read_csv(lines: Iterator[Line]) -> Iterator[Row]:
    """CSV with a header of field names; empty cells count as not given. RFC 4180."""
    bad: list[RowError] = []

    def texts() -> Iterator[str]:
        for _, text in lines:  # a bad line stays as an empty one, so that the count holds
            if isinstance(text, RowError):
                bad.append(text)
            yield "\n" if isinstance(text, RowError) else text + "\n"

    reader = csv.reader(texts(), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, _row_error(line, "line", str(error), "a CSV row")
            continue
        yield from ((error.line, error) for error in bad)
        bad.clear()
        if cells is None:
            return
        if cells and header:
            yield line, _csv_row(line, header, cells)
        elif cells:
            header = [name.strip() for name in cells]
            if problem := _header_problem(header):
                yield line, _row_error(line, "header", ", ".join(header)[:60], problem)
                return


def _csv_row(line: int, header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return _row_error(line, "line", f"{len(cells)} cells", f"{len(header)} cells")
    named = zip(header, cells, strict=True)
    return {name: _cell(name, text) for name, text in named if text != ""}


def _header_problem(header: list[str]) -> str | None:
    if "prompt" not in header:
        return "a first line of field names, `prompt` among them"
    if len(set(header)) != len(header):
        return "each column once"
    unknown = [name for name in header if name not in _ROW_FIELDS]
    return f"only known fields: {', '.join(_ROW_FIELDS)}" if unknown else None


def _cell(name: str, text: str) -> Any:
    """A number where the field is one and the cell reads as one; else the text, for the check."""
    try:
        if name in _WHOLE:
            return int(text)
        return float(text) if name in _NUMBERS else text
    except ValueError:
        return text


def _no_pictures(given: str) -> str:
    raise InvalidParameter("input pictures cannot be given here")


@dataclass(frozen=True)
class Defaults:
    """What rows inherit: the submit's own options over the model's defaults.

    `take` makes an input picture's key in the blob store of what a row says of it; it raises
    InvalidParameter, which says what is wrong with it. `checks`: the chain for the texts.
    """

    given: Mapping[str, Any]
    n: int = 1
    take: Callable[[str], str] = _no_pictures
    checks: Sequence[Link] = chain()


def make_specs(
    rows: Iterable[Row], defaults: Defaults, catalog: Catalog
) -> Iterator[JobSpec | RowError]:
    """JobSpecs of the rows in order, `n` a row (their seeds counting up), or their errors.

    A row without a seed draws one of 32 bits, which the job then records.
    """
    for line, row in rows:
        if isinstance(row, RowError):
            yield row
            continue
        yield from _row_specs(line, row, defaults, catalog)


def _row_specs(
    line: int, row: Mapping[str, Any], defaults: Defaults, catalog: Catalog
) -> Iterator[JobSpec | RowError]:
    fields = {**defaults.given, **{k: v for k, v in row.items() if v is not None}}
    n = fields.pop("n", defaults.n)
    if type(n) is not int or not 1 <= n <= MAX_PICTURES:
        yield RowError(line, "n", repr(n)[:60], f"a whole number from 1 to {MAX_PICTURES:,}")
        return
    model = fields.get("model")
    if not isinstance(model, str) or model not in catalog.models:
        known = ", ".join(sorted(catalog.models))
        yield RowError(line, "model", repr(model)[:60], f"one of {known}", UnknownModel.code)
        return
    chosen = _checked_spec(line, fields, n, defaults, catalog)
    if not isinstance(chosen, JobSpec):
        yield from chosen
        return
    yield chosen
    for i in range(1, n):
        yield chosen.model_copy(update={"seed": chosen.seed + i})


def _checked_spec(
    line: int, row: dict[str, Any], n: int, defaults: Defaults, catalog: Catalog
) -> JobSpec | list[RowError]:
    """The first of a row's `n` jobs, or all that is wrong with the row."""
    entry = catalog.models[row["model"]]
    fields = {**entry.defaults.model_dump(), **row}
    wrong = check_texts(line, fields, defaults.checks)
    wrong += _take_pictures(line, fields, defaults.take)
    if fields.get("seed") is None:
        fields["seed"] = secrets.randbits(32)
    try:
        spec = JobSpec(**fields)
    except ValidationError as error:
        told = {item.field for item in wrong}
        return wrong + [item for item in row_errors(line, error) if item.field not in told]
    if wrong:
        return wrong
    refused = entry.refusals(spec.model_dump())
    if spec.seed + n - 1 > MAX_SEED:
        refused["seed"] = EXPECTED["seed"] + f", also for the last of {n} pictures"
    chosen = refused or narrowed(spec, entry, catalog)
    if isinstance(chosen, JobSpec):
        return chosen
    values = spec.model_dump()
    return [RowError(line, name, repr(values[name]), told) for name, told in chosen.items()]


def _take_pictures(line: int, fields: dict[str, Any], take: Callable[[str], str]) -> list[RowError]:
    """Put input pictures' keys in the place of what the row said of them."""
    wrong = []
    for name in ("init_image", "mask_image"):
        given = fields.get(name)
        if isinstance(given, str | os.PathLike):
            try:
                fields[name] = take(os.fsdecode(given))
            except InvalidParameter as error:
                got = f"{os.fsdecode(given)[:60]!r}: {error.message}"
                wrong.append(RowError(line, name, got, EXPECTED[name]))
    if fields.get("init_image") and fields.get("strength") is None:
        fields["strength"] = DEFAULT_STRENGTH
    return wrong


def prompt_rows(prompts: Iterable[str | Mapping[str, Any]]) -> Iterator[Row]:
    """Rows from Python: a text, or a mapping of fields; counted from 1."""
    for number, item in enumerate(prompts, start=1):
        if isinstance(item, str):
            yield number, {"prompt": item}
        elif isinstance(item, Mapping):
            yield number, item
        else:
            expected = "a text or a mapping of fields"
            yield (
                number,
                RowError(number, "prompt", type(item).__name__, expected, InvalidPrompt.code),
            )
