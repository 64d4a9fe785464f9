"""`make fuzz`: bad inputs by the ten thousand, with their figures; 1 if anything was found.

The same seed makes the same inputs; a finding is shown with the words that repeat it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.core import Orders, Report

# part -> cases in full, and in CI
PARTS = {
    "schema": (5_600, 0),
    "worker": (1_000, 40),
    "cli": (4_000, 100),
    "prompts": (14_000, 700),
    "pictures": (8_000, 300),
    "http": (12_000, 600),
    "jobs": (5_000, 300),
    "configs": (5_000, 400),
    "wire": (1_000, 30),
}
LIMIT_S = 1500
SCHEMA_CASES = 31  # operations of the HTTP API, each by its schema and against it
_APART = "import sys; from tests.fuzz.core import main; main(sys.argv[1])"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--short", action="store_true", help="the run of CI")
    parser.add_argument("--cases", type=int, help="of each part")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--at-once", type=int, default=2, help="parts that run side by side")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}, there are: {', '.join(PARTS)}")
    first, reports = args.case or 0, []
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory("-fuzz") as home, ThreadPoolExecutor(args.at_once) as pool:
        work = []
        for part in args.parts or PARTS:
            cases = args.cases or PARTS[part][args.short]
            cases = 1 if args.case is not None else cases
            if cases:
                work.append(Orders(part, args.seed, first, cases, Path(home) / part))
        for done in as_completed([pool.submit(run_apart, orders) for orders in work]):
            report = done.result()
            print(report.text(), flush=True)
            reports.append(report)
    findings = [finding for report in reports for finding in report.findings]
    for finding in findings:
        print(f"\n--- {finding}")
    total = sum(report.cases for report in reports)
    print(f"{total:,} cases, {len(findings):,} findings")
    return 1 if findings or not total else 0


def run_apart(orders: Orders) -> Report:
    """Run a part in a process of its own; if that dies, its report says at which case."""
    if orders.part == "schema":
        return _schemathesis(orders)
    orders.home.mkdir(parents=True)
    told = json.dumps({**asdict(orders), "home": str(orders.home)})
    argv = [sys.executable, "-c", _APART, told]
    with (orders.home / "log").open("wb") as log:
        try:
            code = subprocess.run(argv, stdout=log, stderr=log, timeout=LIMIT_S).returncode
        except subprocess.TimeoutExpired:
            code = -1
    place = orders.home / "report"
    if place.is_file():
        return Report(**json.loads(place.read_text()))
    number = orders.home / "case"
    at = int(number.read_text()) if number.is_file() else 0
    again = f"python -m tests.fuzz {orders.part} --seed {orders.seed} --case {at}"
    last = (orders.home / "log").read_text(errors="replace")[-4000:]
    died = f"{again}\nits process ended with {code}\n{last}"
    return Report(orders.part, at - orders.first + 1, findings=[died])


def _schemathesis(orders: Orders) -> Report:
    """tests/integration/test_http_schema.py, with more requests for each operation."""
    began = time.monotonic()
    each = max(1, orders.cases // SCHEMA_CASES)
    test = "tests/integration/test_http_schema.py"
    argv = [sys.executable, "-m", "pytest", "-qs", "-o", f"timeout={LIMIT_S}", test]
    argv += ["-p", "no:cacheprovider", f"--hypothesis-seed={orders.seed}"]
    env = os.environ | {"HTTP_CASES": str(each), "CI": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    found = re.search(r"^(\d+) cases$", done.stdout, re.MULTILINE)
    report = Report(orders.part, int(found[1]) if found else 0, time.monotonic() - began)
    if done.returncode or not found:
        again = f"python -m tests.fuzz schema --seed {orders.seed} --cases {orders.cases}"
        report.findings.append(f"{again}\n{done.stdout[-6_000:]}{done.stderr[-2_000:]}")
    return report


if __name__ == "__main__":
    sys.exit(main())
