"""What a person or a pipe gets to see: data on standard output, all else on standard error."""

from __future__ import annotations

import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING, Any

from farm.cli.context import options

if TYPE_CHECKING:
    from rich.console import Console

    from farm.errors import RowError

_COMMAND = re.compile(
    r"\bfarm (?=(?:watch|results|status|retry|cancel|resume|up|worker|submit|prune|audit"
    r"|reconcile|dataset|schedule|provenance)\b)"
)
_GAP = 2  # between the columns of a table
_TEXT = 8  # least cells of a column of texts
_CODE = 24  # cells of what is never folded on a terminal: ids, states, error codes
Cell = str | int | float | None


def console(stream: IO[str]) -> Console:
    """A console that prints texts as they are: no markup, no highlighting."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


def live(stream: IO[str]) -> bool:
    """Whether a progress bar may be drawn on the stream."""
    if options.quiet or not stream.isatty():
        return False
    return not console(stream).is_dumb_terminal


def clean(text: object) -> str:
    """A text that can do nothing to a terminal: control and format characters made visible."""
    return "".join(_visible(char) for char in str(text))


def _visible(char: str) -> str:
    if char == "\u200d" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return char
    return char.encode("unicode_escape").decode()


def short(text: object, width: int = 60) -> str:
    """`clean`, cut to `width` characters."""
    shown = clean(text)
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"


def print_json(value: Any) -> None:
    """The one thing on standard output."""
    indent = 2 if sys.stdout.isatty() else None
    sys.stdout.write(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")


def print_line(text: str) -> None:
    """A line of data; a caller cleans what strangers wrote."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """A line for the person at the terminal; -q leaves it out."""
    if not options.quiet:
        sys.stderr.write(_with_home(text) + "\n")


def _with_home(text: str) -> str:
    """Commands in an advice lead to the same farm: `farm watch` -> `farm --home DIR watch`."""
    if options.home is None:
        return text
    return _COMMAND.sub(f"farm --home {shlex.quote(str(options.home))} ", text)


def hint(text: str) -> None:
    """What to do next, dimmed on a terminal."""
    if options.quiet:
        return
    if sys.stderr.isatty():
        console(sys.stderr).print(_with_home(text), style="dim", soft_wrap=True)
    else:
        note(text)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], stream: IO[str] | None = None
) -> None:
    """A table: drawn on a terminal, aligned plain text elsewhere."""
    stream = stream or sys.stdout
    cells = [[clean("-" if cell in (None, "") else cell) for cell in row] for row in rows]
    if stream.isatty():
        _draw(columns, cells, stream)
        return
    from rich.cells import cell_len

    head = [name.upper() for name in columns]
    widths = [max(map(cell_len, column)) for column in zip(head, *cells, strict=True)]
    for row in (head, *cells):
        padded = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        stream.write("  ".join(padded).rstrip() + "\n")


def _draw(columns: Sequence[str], rows: list[list[str]], stream: IO[str]) -> None:
    from rich.table import Table

    drawn = console(stream)
    found = [column for column in zip(columns, *rows, strict=True) if {*column[1:]} != {"-"}]
    widths = _widths(found, drawn.width - _GAP * (len(found) - 1))
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for place, ((name, *cells), width) in enumerate(zip(found, widths, strict=True)):
        numeric = all(cell.replace(".", "").isdigit() for cell in cells)
        table.add_column(
            name,
            justify="right" if cells and numeric else "left",
            overflow="fold",
            no_wrap=place == 0,
            width=width,
        )
    for row in zip(*(cells for _, *cells in found), strict=True):
        table.add_row(*row)
    drawn.print(table)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int] | list[None]:
    """Of each column, so that only texts are folded, between words; None: there is no room."""
    from rich.cells import cell_len

    whole = [max(map(cell_len, column)) for column in columns]
    least = [
        width if width <= _CODE or not place else _longest_word(column)
        for place, (column, width) in enumerate(zip(columns, whole, strict=True))
    ]
    spare, wanted = room - sum(least), sum(whole) - sum(least)
    if spare < 0:
        return [None] * len(columns)
    share = min(1.0, spare / wanted) if wanted else 0.0
    return [low + int((high - low) * share) for low, high in zip(least, whole, strict=True)]


def _longest_word(texts: Iterable[str]) -> int:
    """Cells of it; a longer one than a code, such as a path, may be folded."""
    from rich.cells import cell_len

    return max(n for n in (_TEXT, *map(cell_len, " ".join(texts).split())) if n <= _CODE)


def print_fields(pairs: Iterable[tuple[str, Cell]]) -> None:
    """Names and values, one pair a line; empty ones are left out."""
    shown = [(name, clean(value)) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print_line(f"{name.ljust(width)}  {value}")


def print_row_errors(errors: Sequence[RowError]) -> None:
    """Bad lines of a prompt file: a table on a terminal, one a line elsewhere."""
    if sys.stderr.isatty():
        rows = [(str(e.line), e.field, e.got, e.expected) for e in errors]
        print_table(("line", "field", "got", "expected"), rows, sys.stderr)
        return
    for error in errors:
        sys.stderr.write(clean(error) + "\n")


def plural(n: int, one: str) -> str:
    """`1 job`, `1,200 jobs`."""
    many = f"{one}es" if one.endswith("ch") else f"{one}s"
    return f"{n:,} {one if n == 1 else many}"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `12 s`, `3 min 20 s`, `5 h 07 min`, `2 d 3 h`; a dash when unknown."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        places = 2 if 0 < seconds < 1 else 1
        return f"{max(seconds, 0):.{places}f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def about(seconds: float) -> str:
    """An estimate: `about 12 s`, `less than a second`."""
    return "less than a second" if seconds < 1 else f"about {duration(seconds)}"


def pace(rate: float | None) -> str:
    """Pictures in a second, a minute or an hour, whichever reads well; a dash when unknown."""
    if not rate:
        return "-"
    for factor, unit in ((1, "s"), (60, "min")):
        if rate * factor >= 1:
            return f"{rate * factor:.1f}/{unit}"
    return f"{rate * 3600:.1f}/h"


def moment(at: float | None) -> str:
    """A time of the database as local time; a dash when unknown."""
    from datetime import datetime

    if at is None:
        return "-"
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
