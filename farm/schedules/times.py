"""When a schedule is due, and until when its window is open.

Cron has five fields (minute, hour, day of month, month, day of week) in the schedule's time zone,
and goes by Debian's rules where clocks change. A time of day (no * begins its minute and hour) that
the spring skips is due right after the gap; one that the autumn has twice is due at the first. What
comes by intervals (`0 * * * *`, `*/20 2 * * *`) goes by the time that really passes: twice in the
hour that comes twice, never in the one that is skipped.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from datetime import datetime, time, timedelta
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from farm.errors import InvalidParameter

_CLOCK = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
_FIRST_LOOK_S = 7200.0


def zone(name: str) -> ZoneInfo:
    """Raises InvalidParameter for a time zone that the IANA database does not know."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # no such name; no name at all; a directory
        raise InvalidParameter(
            f"{name[:60]!r} is no time zone; expected a name such as Europe/Madrid or UTC"
        ) from None


def local_zone() -> str:
    """The name of this machine's time zone; UTC if it does not tell."""
    place = os.environ.get("TZ", "").removeprefix(":") or str(Path("/etc/localtime").resolve())
    name = place.rpartition("zoneinfo/")[2]
    try:
        return zone(name).key
    except InvalidParameter:
        return "UTC"


def check_until(text: str) -> None:
    """Raises InvalidParameter for what is no time of day."""
    if not _CLOCK.fullmatch(text):
        raise InvalidParameter(
            f"until {text[:20]!r} is no time of day; expected HH:MM, such as 07:00"
        )


def due_times(cron: str, tz: str, after: float) -> Iterator[float]:
    """The due times after a moment, without end. Raises InvalidParameter for a cron that is none.

    A time that never comes, such as 30 February, gives no due time.
    """
    found: float | None = None
    for moment in _simulated(cron, datetime.fromtimestamp(after, zone(tz))):
        due = moment.timestamp()
        if due > (after if found is None else found):  # the autumn's first 02:30 may lie behind
            found = due
            yield due


def _simulated(cron: str, start: datetime) -> Iterator[datetime]:
    try:
        if len(cron.split()) != 5:
            raise CronSimError("Wrong number of fields")
        moments: Iterator[datetime] = CronSim(cron, start)
    except CronSimError as error:
        raise InvalidParameter(
            f"cron {cron[:60]!r}: {str(error).lower()}; expected minute, hour, day of month, month "
            'and day of week, such as "0 2 * * *" (each night at two) or "30 1 * * MON-FRI"'
        ) from None
    return moments


def next_due(cron: str, tz: str, after: float) -> float:
    """Raises InvalidParameter for a cron that is none, or whose time never comes."""
    for due in due_times(cron, tz, after):
        return due
    raise InvalidParameter(
        f'cron {cron[:60]!r} names a day that never comes; such as "0 2 * * *" does'
    )


def coming(cron: str, tz: str, after: float, n: int) -> list[float]:
    """The next `n` due times."""
    return list(islice(due_times(cron, tz, after), n))


def latest(cron: str, tz: str, since: float, at: float, most: int) -> list[float]:
    """The last due times from `since` up to `at`, both included: `most` of them at most.

    Looks back further and further, so that a long absence costs no more than a short one.
    """
    span, since = _FIRST_LOOK_S, since - 1e-3
    while True:
        start = max(since, at - span)
        found: deque[float] = deque(maxlen=most)
        for due in due_times(cron, tz, start):
            if due > at:
                break
            found.append(due)
        if len(found) == most or start == since:
            return list(found)
        span *= 4


def closes(until: str, tz: str, due: float) -> float:
    """When the window closes that opened at `due`: the first time that it is `until` after it."""
    opened = datetime.fromtimestamp(due, zone(tz))
    clock = time.fromisoformat(until)
    for days in range(3):
        day = opened.date() + timedelta(days=days)
        closing = datetime.combine(day, clock, opened.tzinfo).timestamp()
        if closing > due:
            return closing
    raise AssertionError(until)  # no change of clocks takes two days


def label(due: float, tz: str) -> str:
    """What a run's files are called: its local time, such as 2026-11-25t0200.

    Seconds stand in the labels of manual runs; the hour that comes twice in autumn has `-2` behind
    it the second time. So no two runs of a schedule share a label.
    """
    moment = datetime.fromtimestamp(due, zone(tz))
    form = "%Y-%m-%dt%H%M" if due % 60 == 0 else "%Y-%m-%dt%H%M%S"
    return f"{moment:{form}}{'-2' if moment.fold else ''}"


def shown(at: float, tz: str) -> str:
    """A moment for a person, in a schedule's own time zone."""
    return f"{datetime.fromtimestamp(at, zone(tz)):%Y-%m-%d %H:%M} ({tz})"
