"""`make chaos`: the whole chaos run on PostgreSQL and on SQLite, with its figures."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tests.chaos.run import FULL, SHORT, run
from tests.servers import PostgresServer, RedisServer, S3Server

DATABASES = ("postgres", "sqlite")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("databases", nargs="*", metavar="DATABASE", help="postgres, sqlite")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--jobs", type=int, help="at least 2,000 unless it is the short run")
    parser.add_argument("--short", action="store_true", help="the run of CI")
    parser.add_argument("--keep", type=Path, help="a directory for the logs")
    args = parser.parse_args()
    if unknown := set(args.databases) - set(DATABASES):
        parser.error(f"no database {', '.join(sorted(unknown))}, there are: {', '.join(DATABASES)}")
    plan = SHORT if args.short else FULL
    plan = replace(plan, jobs=args.jobs) if args.jobs else plan
    wrong, reports = 0, []
    with ExitStack() as stack:
        home = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory("-chaos")))
        redis, s3 = stack.enter_context(RedisServer()), stack.enter_context(S3Server())
        for database in args.databases or DATABASES:
            server = stack.enter_context(PostgresServer()) if database == "postgres" else None
            print(f"{database}, seed {args.seed}", flush=True)
            report = run(home / database, plan, args.seed, redis, s3, server, say=True)
            reports.append(report.text())
            wrong += len(report.audit.wrong)
    print("\n".join(reports))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
