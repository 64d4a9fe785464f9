"""Prompt files as a stream of rows: jsonl, csv, tsv, txt and Parquet; the texts gzipped or not.

Memory stays bounded whatever the file's length. Nothing is guessed and nothing is skipped: a bad
line is a RowError with its number, its field and what was expected.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from farm import parquet_rows
from farm.errors import InvalidConfig, InvalidPromptFile, RowError
from farm.spec import FIELDS

FORMATS = ("jsonl", "csv", "tsv", "txt", "parquet")
ENDINGS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "txt",
    ".parquet": "parquet",
}  # fmt: skip
MEDIA_TYPES = {  # by the IANA's registry, where it has one
    "application/jsonl": "jsonl", "application/x-ndjson": "jsonl", "text/csv": "csv",
    "text/tab-separated-values": "tsv", "text/plain": "txt",
    "application/vnd.apache.parquet": "parquet",
}  # fmt: skip
MAX_LINE_BYTES = 1 << 20
MOST_RATIO = 250  # text that compresses better is a bomb, beyond this many unpacked bytes:
BOMB_BYTES = 64 << 20
ROW_FIELDS = (*FIELDS, "n")
_WHOLE = {"width", "height", "steps", "seed", "n", "clip_skip"}
_NUMBERS = {"guidance_scale", "strength"}
_GZIP = b"\x1f\x8b"

Row = tuple[int, Mapping[str, Any] | RowError]
Line = tuple[int, str | RowError]


def guess_format(path: Path) -> str:
    """The format by the file's ending; raises InvalidPromptFile for one that is not known."""
    ending = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if ending not in ENDINGS:
        raise InvalidPromptFile(
            f"{path}: the ending {ending!r} is none of {', '.join(ENDINGS)}, also with .gz; "
            "say --format"
        )
    return ENDINGS[ending]


def read_rows(
    stream: BinaryIO, form: str, columns: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """(line number from 1, fields or the line's error) for each line with something on it.

    `columns`: field -> the name it has in the file, where at least one row must have it; then names
    that are neither are left out. Raises InvalidConfig where Parquet cannot be read on this
    machine.
    """
    columns = columns or {}
    if form == "parquet":
        rows = _parquet_rows(stream, columns)
    elif form in ("csv", "tsv"):
        rows = _table_rows(_text_lines(stream), "\t" if form == "tsv" else ",", columns)
    else:
        read = _json_row if form == "jsonl" else _txt_row
        lines = _text_lines(stream)
        rows = (read(n, text) for n, text in lines if isinstance(text, RowError) or text.strip())
        rows = _all_found(rows, columns)
    return _renamed(rows, columns) if columns else rows


def _renamed(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    for number, row in rows:
        if isinstance(row, RowError):
            yield number, row
            continue
        kept = {k: v for k, v in row.items() if k in ROW_FIELDS and k not in columns.values()}
        yield number, kept | {field: row[name] for field, name in columns.items() if name in row}


def _all_found(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Behind the rows, an error if none of them had a column."""
    number, first, missing = 0, "", set(columns.values())
    for number, row in rows:
        if missing and not isinstance(row, RowError):
            first = first or ", ".join(row)[:120]
            missing -= row.keys()
        yield number, row
    if missing and first:
        expected = f"rows with {', '.join(sorted(missing))}, as was named"
        yield number + 1, row_error(number + 1, "fields", f"{first} in the first", expected)


# ---- lines


def _text_lines(stream: BinaryIO) -> Iterator[Line]:
    number = unpacked = 0
    stream, packed = _unzipped(stream)
    try:
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            unpacked += len(raw)
            if packed and unpacked > max(BOMB_BYTES, MOST_RATIO * packed.count):
                got = f"gzip that unpacks to more than {MOST_RATIO} times its size"
                yield number, row_error(number, "line", got, "a file that is unpacked first")
                return
            if len(raw) > MAX_LINE_BYTES:
                yield number, row_error(number, "line", "over 1 MiB", "a line of at most 1 MiB")
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(MAX_LINE_BYTES)
                continue
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                got = f"byte {error.start + 1} is not"
                yield number, row_error(number, "line", got, "UTF-8 text")
                continue
            yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield number + 1, row_error(number + 1, "line", str(error)[:120], "a whole gzip file")


class _Packed(io.RawIOBase):
    """Counts what is read through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.count = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


def _unzipped(stream: BinaryIO) -> tuple[BinaryIO, _Packed | None]:
    """The stream, unzipped if its first bytes say that it is zipped; then also what it was."""
    buffered = cast(io.BufferedReader, stream)
    if not hasattr(stream, "peek"):
        buffered = io.BufferedReader(cast(io.RawIOBase, stream))
    if buffered.peek(2)[:2] != _GZIP:
        return buffered, None
    packed = _Packed(buffered)
    unzipped = gzip.GzipFile(fileobj=io.BufferedReader(packed), mode="rb")
    return cast(BinaryIO, unzipped), packed


def row_error(line: int, field: str, got: str, expected: str) -> RowError:
    """A fault of the file itself."""
    return RowError(line, field, got, expected, InvalidPromptFile.code)


def _txt_row(number: int, text: str | RowError) -> Row:
    return number, text if isinstance(text, RowError) else {"prompt": text}


def _json_row(number: int, text: str | RowError) -> Row:
    if isinstance(text, RowError):
        return number, text
    try:
        row = json.loads(text, object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        return number, row_error(number, "line", str(error)[:120], "one JSON object")
    if not isinstance(row, dict):
        return number, row_error(number, "line", type(row).__name__, "one JSON object")
    return number, row


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a field stands twice")
    return row


# ---- tables of text


def _table_rows(lines: Iterator[Line], delimiter: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """CSV (RFC 4180) or TSV with a header of names; empty cells count as not given."""
    bad: list[RowError] = []
    reader = csv.reader(_without(bad, lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        cells = _cells(reader)
        if bad:  # a row of several lines of which one is bad is not what was in
            yield from ((error.line, error) for error in bad)
            bad.clear()
        elif cells is None:
            return
        elif isinstance(cells, str):
            yield line, row_error(line, "line", cells, "a CSV row")
        elif cells and header:
            yield line, _table_row(line, header, cells, columns)
        elif cells:
            header = [name.strip() for name in cells]
            if problem := _header_problem(header, columns):
                yield line, row_error(line, "header", ", ".join(header)[:120], problem)
                return


def _without(bad: list[RowError], lines: Iterator[Line]) -> Iterator[str]:
    """The lines, of the bad ones empty ones, so that the count holds; the bad ones go to `bad`."""
    for _, text in lines:
        if isinstance(text, RowError):
            bad.append(text)
        yield "\n" if isinstance(text, RowError) else text + "\n"


def _cells(reader: Any) -> list[str] | str | None:
    """The next row's; what is wrong with it; None at the end."""
    try:
        found: list[str] | None = next(reader, None)
        return found
    except csv.Error as error:
        return str(error)


def _table_row(
    line: int, header: list[str], cells: list[str], columns: Mapping[str, str]
) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return row_error(line, "line", f"{len(cells)} cells", f"{len(header)} cells")
    fields = {name: field for field, name in columns.items()}
    named = zip(header, cells, strict=True)
    return {name: _cell(fields.get(name, name), text) for name, text in named if text != ""}


def _header_problem(header: list[str], columns: Mapping[str, str]) -> str | None:
    if problem := _missing(header, columns):
        return problem
    if columns.get("prompt", "prompt") not in header:
        return "a first line of field names, `prompt` among them"
    if len(set(header)) != len(header):
        return "each column once"
    unknown = [name for name in header if name not in ROW_FIELDS]
    if unknown and not columns:
        return f"only known fields: {', '.join(ROW_FIELDS)}; or say which columns are which"
    return None


def _missing(names: Iterable[str], columns: Mapping[str, str]) -> str | None:
    missing = sorted(set(columns.values()).difference(names))
    return f"the columns that were named, {', '.join(missing)} among them" if missing else None


def _cell(field: str, text: str) -> Any:
    """A number where the field is one and the cell reads as one; else the text, for the check."""
    try:
        if field in _WHOLE:
            return int(text)
        return float(text) if field in _NUMBERS else text
    except ValueError:
        return text


# ---- Parquet


def _parquet_rows(stream: BinaryIO, columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows of a Parquet file, numbered from 1; a process of its own reads it, see there."""
    if find_spec("pyarrow") is None:
        raise InvalidConfig("Parquet files need pyarrow: pip install 'renderfarm[dataset]'")
    argv = [sys.executable, "-P", parquet_rows.__file__]
    number = 0
    with _as_file(stream) as file, tempfile.TemporaryFile() as told:
        reader = subprocess.Popen(argv, stdin=file, stdout=subprocess.PIPE, stderr=told)
        try:
            assert reader.stdout
            for number, text in _text_lines(cast(BinaryIO, reader.stdout)):
                _, row = _json_row(number, text)
                if isinstance(row, RowError):
                    yield number, row
                    continue
                if problem := _missing(row, columns):  # each row has all columns of the file
                    yield number, row_error(number, "header", ", ".join(row)[:120], problem)
                    return
                yield number, _plain(row)
            if code := reader.wait():
                told.seek(0)
                got = told.read().decode(errors="replace").splitlines()[-1:] or [f"exit {code}"]
                no_file = code == parquet_rows.NO_PARQUET
                expected = "a Parquet file" if no_file else "a readable row"
                yield number + 1, row_error(number + 1, "line", got[0][:120], expected)
        finally:
            reader.kill()
            reader.communicate()


@contextlib.contextmanager
def _as_file(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream as a file of the system at its start; a pipe has no end to look at first."""
    if _is_file(stream):
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
        yield stream
        return
    with tempfile.TemporaryFile() as spool:
        shutil.copyfileobj(stream, spool)
        spool.seek(0)
        yield cast(BinaryIO, spool)


def _is_file(stream: BinaryIO) -> bool:
    try:
        return stream.seekable() and stream.fileno() >= 0
    except OSError:  # it lies in memory
        return False


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Absent cells come as None."""
    return {name: value for name, value in row.items() if value is not None}
