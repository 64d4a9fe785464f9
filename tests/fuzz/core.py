"""One part of the fuzz corpus: its cases in a row, each drawn from seed, part and number.

A case is a function of a `Case`, which draws from `case.rng` and says in `case.told` what it made.
It returns what became of it ("accepted", a code); whatever it raises is a finding, and so are more
than `SLOW_S` seconds, which a part may have of its own, and a file outside the run's directory. A
part of many cases runs in a process of its own, which may die: its parent knows the number of the
case under way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.guard import Guard

SLOW_S = 5.0
STUCK_S = 60.0  # native code that no signal reaches: the process ends and shows where it was
MOST_FINDINGS = 20
FRAMES = 8  # of a finding's traceback, the last ones


class Finding(AssertionError):
    """Something that the farm must not do."""


class Hang(BaseException):
    """A case that did not end in time; no `except Exception` of the farm may swallow it."""


@dataclass
class Case:
    """One case. `one_in`: whether it is one of the few that look into what is costly."""

    rng: random.Random
    told: str = ""

    def one_in(self, n: int) -> bool:
        return self.rng.randrange(n) == 0


Judge = Callable[[Case], str]


@dataclass
class Report:
    """What a part did, as it goes to the parent process."""

    part: str
    cases: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest: int = 0
    peak_mb: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def text(self) -> str:
        most = sorted(self.outcomes.items(), key=lambda item: -item[1])[:5]
        told = ", ".join(f"{n:,} {name}" for name, n in most)
        return (
            f"{self.part:9} {self.cases:6,} cases in {self.seconds:5.1f} s, the slowest "
            f"(case {self.slowest}) {self.slowest_s:.2f} s, {self.peak_mb:,} MB at most: {told}"
        )


@dataclass(frozen=True)
class Orders:
    """What a part is to do: cases `first` to `first + cases - 1` of a seed, within `home`."""

    part: str
    seed: int
    first: int
    cases: int
    home: Path


def run(orders: Orders) -> Report:
    """Run a part in this process, which it changes: its directories, its limits, its audit hook."""
    guard = Guard(orders.home)
    guard.enter()
    faulthandler.enable()
    module: Any = importlib.import_module(f"tests.fuzz.{orders.part}")
    slow_s = getattr(module, "SLOW_S", SLOW_S)
    report, outcomes = Report(orders.part), Counter[str]()
    began = time.monotonic()
    try:
        with module.opened(guard.data, guard) as judge, guard.watching():
            for number in range(orders.first, orders.first + orders.cases):
                outcomes[_one(orders, number, judge, guard, report, slow_s)] += 1
                if len(report.findings) >= MOST_FINDINGS:
                    break
    except Exception:
        report.findings.append(
            f"{orders.part}, after the last case\n{traceback.format_exc(limit=-FRAMES)}"
        )
    report.findings += [f"{orders.part}: {what}" for what in guard.left()]
    report.seconds = time.monotonic() - began
    report.outcomes = dict(outcomes)
    report.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return report


class _Clock:
    """Seconds of one case, without those in which others had the processor (Linux tells them)."""

    def __init__(self, slow_s: float) -> None:
        self._slow_s = slow_s
        self._began, self._waited = time.monotonic(), _waited_s()
        signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, slow_s)

    def seconds(self) -> float:
        return time.monotonic() - self._began - (_waited_s() - self._waited)

    def _ring(self, *_: object) -> None:
        left = self._slow_s - self.seconds()
        if left <= 0:
            raise Hang
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))


def _waited_s() -> float:
    """How long this thread has waited for a processor, of which it had none."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, LookupError, ValueError):
        return 0.0


def _one(
    orders: Orders, number: int, judge: Judge, guard: Guard, report: Report, slow_s: float
) -> str:
    """Run one case; what became of it. A finding is noted in the report."""
    _tell_number(orders.home, number)
    case = Case(random.Random(f"{orders.seed}/{orders.part}/{number}"))
    clock, found = _Clock(slow_s), ""
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    try:
        outcome = judge(case)
    except Hang:
        outcome, found = "HANG", traceback.format_exc(limit=-FRAMES)
        found = f"not done after {slow_s:g} s\n{found}"
    except Exception:
        outcome, found = "FINDING", traceback.format_exc(limit=-FRAMES)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    took = clock.seconds()
    found = found or "".join(f"outside of its directory: {what}\n" for what in guard.taken())
    report.cases += 1
    if took > report.slowest_s:
        report.slowest_s, report.slowest = took, number
    if found and not _like_before(found, report):
        again = f"python -m tests.fuzz {orders.part} --seed {orders.seed} --case {number}"
        report.findings.append(f"{again}\n{case.told[:2000]}\n{found}")
    return outcome


def _like_before(found: str, report: Report) -> bool:
    """Whether two findings from the same line of code are told already."""
    place = [text for text in found.splitlines() if text.startswith("  File ")][-1:]
    return bool(place) and sum(place[0] in told for told in report.findings) >= 2


# ---- a part in a process of its own


def _tell_number(home: Path, number: int) -> None:
    with contextlib.suppress(OSError):
        os.pwrite(_number_fd(home), b"%12d" % number, 0)


_fds: dict[Path, int] = {}


def _number_fd(home: Path) -> int:
    if home not in _fds:
        _fds[home] = os.open(home / "case", os.O_RDWR | os.O_CREAT)
    return _fds[home]


def main(told: str) -> None:
    """Carry out orders given as JSON, which end this process; the report goes into home/report."""
    fields = json.loads(told)
    orders = Orders(**{**fields, "home": Path(fields["home"])})
    logging.disable(logging.CRITICAL)  # what is said of ten thousand bad inputs is not read
    report = run(orders)
    (orders.home / "report").write_text(json.dumps(asdict(report)))
    os._exit(0)  # threads that a finding left behind must not hold it
