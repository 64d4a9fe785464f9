from __future__ import annotations

import gzip
import io
import json
import resource
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from farm import prompt_files
from farm.errors import InvalidPromptFile, RowError
from farm.prompt_files import guess_format, read_rows

TEXTS = ["a red circle", "赤い円, “quoted”", "دائرة 🟥"]


def rows(data: bytes, form: str, columns: dict[str, str] | None = None) -> list[Any]:
    return list(read_rows(io.BytesIO(data), form, columns))


def parquet(**columns: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, row_group_size=2)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.jsonl", "jsonl"), ("a.NDJSON.gz", "jsonl"), ("a.csv.gz", "csv"), ("b.tsv", "tsv"),
     ("c.txt", "txt"), ("d.parquet", "parquet")],
)  # fmt: skip
def test_the_format_is_told_by_the_ending(name: str, form: str) -> None:
    assert guess_format(Path(name)) == form


@pytest.mark.parametrize("name", ["a.gz", "a.xlsx", "a", "a.jsonl.bz2"])
def test_an_unknown_ending_is_refused(name: str) -> None:
    with pytest.raises(InvalidPromptFile, match="--format"):
        guess_format(Path(name))


@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_same_rows(zipped: bool) -> None:
    table = "prompt\tseed\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(TEXTS))
    quoted = [text.replace('"', '""') for text in TEXTS]
    comma = "prompt,seed\n" + "".join(f'"{text}",{n}\n' for n, text in enumerate(quoted))
    lines = "".join(json.dumps({"prompt": t, "seed": n}) + "\n" for n, t in enumerate(TEXTS))
    wanted = [{"prompt": text, "seed": n} for n, text in enumerate(TEXTS)]
    for form, text, first in (("tsv", table, 2), ("csv", comma, 2), ("jsonl", lines, 1)):
        data = text.encode()
        found = rows(gzip.compress(data) if zipped else data, form)
        assert found == list(enumerate(wanted, start=first))
    data = parquet(prompt=TEXTS, seed=[0, 1, 2])
    assert rows(data, "parquet") == list(enumerate(wanted, start=1))


def test_columns_are_renamed_and_the_others_left_out() -> None:
    columns = {"prompt": "TEXT", "negative_prompt": "bad"}
    wanted = [(2, {"prompt": "a", "negative_prompt": "b", "seed": 7})]
    assert rows(b"TEXT,bad,url,seed\na,b,http://x,7\n", "csv", columns) == wanted
    line = b'\n{"TEXT": "a", "bad": "b", "url": "x", "seed": 7}\n'
    assert rows(line, "jsonl", columns) == wanted
    data = parquet(TEXT=["a"], bad=["b"], url=["x"], seed=[7])
    assert rows(data, "parquet", columns) == [(1, wanted[0][1])]


HEADER = "line 1: header: the columns that were named, idd among them (got prompt, id)"


@pytest.mark.parametrize(
    ("data", "form", "told"),
    [
        (b"prompt,id\na,1\n", "csv", HEADER),
        (parquet(prompt=["a", "b"], id=[1, None]), "parquet", HEADER),
        (
            b'{"prompt": "a", "id": 1}\n[]\n{"prompt": "b"}\n', "jsonl",
            "line 4: fields: rows with idd, as was named (got prompt, id in the first)",
        ),
        (
            b"a\nb\n", "txt",
            "line 3: fields: rows with id, idd, as was named (got prompt in the first)",
        ),
    ],
)  # fmt: skip
def test_a_column_that_the_file_has_not_is_told(data: bytes, form: str, told: str) -> None:
    *_, (_, error) = rows(data, form, {"id": "id", "name": "idd"})
    assert str(error) == told


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (b"prompt,id\na,\nb,\n", "csv"),
        (parquet(prompt=["a", "b"], id=pyarrow.array([None, None], pyarrow.int64())), "parquet"),
        (b'{"prompt": "a"}\n{"prompt": "b", "id": null}\n', "jsonl"),
        (b"\n", "jsonl"),
    ],
)
def test_a_column_may_be_empty(data: bytes, form: str) -> None:
    assert not any(isinstance(row, RowError) for _, row in rows(data, form, {"id": "id"}))


def test_absent_cells_of_parquet_count_as_not_given() -> None:
    data = parquet(prompt=["a", "b"], steps=[None, 4])
    assert [row for _, row in rows(data, "parquet")] == [
        {"prompt": "a"}, {"prompt": "b", "steps": 4},
    ]  # fmt: skip


def test_parquet_from_a_pipe() -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    stream: BinaryIO = Pipe(parquet(prompt=TEXTS))
    assert [row["prompt"] for _, row in read_rows(stream, "parquet")] == TEXTS


@pytest.mark.parametrize(
    ("data", "form", "expected"),
    [
        # No time in it: the bytes are part of the test's name, the same in every process.
        (gzip.compress(b"a\n" * 1000, mtime=0)[:-9], "txt", "a whole gzip file"),
        (b"\x1f\x8bnot so", "txt", "a whole gzip file"),
        (b"", "parquet", "a Parquet file"),
        (b"PAR1" + b"x" * 100 + b"PAR1", "parquet", "a Parquet file"),
        (b"a\tb\n", "tsv", "a first line of field names"),
        (b"prompt,colour\na,b\n", "csv", "only known fields"),
        (b"prompt,seed\na\n", "csv", "2 cells"),
        (b'prompt\n"a\n', "csv", "a CSV row"),
        (b"[1]\n", "jsonl", "one JSON object"),
        (b'{"prompt": "a", "prompt": "b"}\n', "jsonl", "one JSON object"),
        (b"\xff\n", "txt", "UTF-8 text"),
        (b"x" * (2**20 + 1), "txt", "a line of at most 1 MiB"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(data: bytes, form: str, expected: str) -> None:
    wrong = [row for _, row in rows(data, form) if isinstance(row, RowError)]
    assert expected in wrong[-1].expected


def test_damaged_parquet_is_told_at_its_row() -> None:
    data = bytearray(parquet(prompt=[f"prompt {n}" for n in range(6)]))
    data[10:40] = b"\xff" * 30
    assert any(isinstance(row, RowError) for _, row in rows(bytes(data), "parquet"))


def test_a_parquet_bomb_hurts_nobody() -> None:
    """7 kB, in each row the same cell of 20 MB: read in this process it would take 40 GB."""
    cell = pyarrow.array(["a" * 20_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), cell)
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), file, compression="zstd")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [(number, fault)] = list(read_rows(io.BytesIO(file.getvalue()), "parquet"))
    assert isinstance(fault, RowError)
    assert (number, fault.expected) == (1, "a readable row")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000, "kilobytes"


def test_rows_that_nobody_wants_any_more_are_not_read() -> None:
    before = psutil.Process().children()
    found = read_rows(io.BytesIO(parquet(prompt=["a"] * 5_000)), "parquet")
    assert next(found) == (1, {"prompt": "a"})
    found.close()  # type: ignore[attr-defined]
    assert psutil.Process().children() == before


@pytest.mark.parametrize("text", ["\n", "a\n", "a" * 1000 + "\n"])
def test_a_gzip_bomb_is_not_unpacked_to_its_end(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "BOMB_BYTES", 1 << 20)
    file = gzip.compress((text * (30_000_000 // len(text))).encode())
    *good, (number, fault) = list(read_rows(io.BytesIO(file), "txt"))
    assert isinstance(fault, RowError)
    assert "250 times" in fault.got
    assert number * len(text) < 10_000_000
    assert len(good) == (0 if text == "\n" else number - 1)


def test_texts_that_compress_well_are_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "BOMB_BYTES", 1 << 20)
    lines = [
        f'{{"prompt": "a red circle on a blue background", "seed": {n}}}' for n in range(50_000)
    ]
    found = list(read_rows(io.BytesIO(gzip.compress("\n".join(lines).encode(), 9)), "jsonl"))
    assert len(found) == 50_000
    assert not any(isinstance(row, RowError) for _, row in found)


def test_memory_is_bounded_by_a_line_not_by_the_file() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            Endless.given += len(buffer)
            buffer[:] = (b"a cat\n" * (len(buffer) // 6 + 1))[: len(buffer)]
            return len(buffer)

    stream: Any = io.BufferedReader(Endless())
    found = read_rows(stream, "txt")
    assert [next(found)[0] for _ in range(1000)] == list(range(1, 1001))
    assert Endless.given < 2**20


def test_a_row_of_several_lines_with_a_bad_one_is_told_once_and_left_out() -> None:
    data = b'prompt\na\n"b\n\xff\nb"\nc\n'
    found = rows(data, "csv")
    assert [number for number, _ in found] == [2, 4, 6]
    assert isinstance(found[1][1], RowError)
    assert found[2] == (6, {"prompt": "c"})
