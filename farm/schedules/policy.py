"""What becomes of a due time: recorded once, begun one after the other, paused with its window.

Every function takes `at`, the time in seconds since 1970, so a simulated clock can drive it all.

- Of the due times that came since the last look only the newest is run. One that nobody saw for
  GRACE_S is missed: it is made up for if the schedule catches up, else skipped.
- What is under way goes on before anything new begins; of the due times that wait meanwhile the
  newest is kept.
- With a window a due run goes on only from a due time until the window closes; then it waits, its
  batch paused, for the next due time. What a person asked for knows no window.
"""

from __future__ import annotations

import re

from sqlalchemy import Connection

from farm.errors import Invalid, InvalidParameter
from farm.schedules.times import check_until, closes, latest, next_due, shown
from farm.spec import NAME_PATTERN
from farm.store import batches
from farm.store import schedules as store
from farm.store.schedules import Run, Schedule, Terms
from farm.submitting import check_priority

GRACE_S = 600.0  # a due time that is older was missed
KEPT = 100  # missed due times that get rows of their own


def add(connection: Connection, terms: Terms, at: float) -> Schedule:
    """A new schedule; its log is called by its name.

    Raises InvalidParameter for what it cannot be, and Invalid when its name is taken.
    """
    if not re.fullmatch(NAME_PATTERN, terms.name):
        raise InvalidParameter(
            f"name {terms.name[:63]!r}: expected small letters, digits, - and _, such as nightly"
        )
    if terms.until is not None:
        check_until(terms.until)
    if terms.priority is not None:
        check_priority(terms.priority)
    return store.add(connection, terms, next_due(terms.cron, terms.tz, at), at)


def record_due(connection: Connection, schedule: Schedule, at: float) -> bool:
    """Give each due time up to now its row, and move the schedule on; False: another one did.

    After a long absence the KEPT newest have rows; the oldest of them tells of those before.
    """
    cron, tz = schedule.cron, schedule.tz
    dues = latest(cron, tz, schedule.next_due, at, KEPT)
    if not dues:  # the zone's rules are other ones now
        return store.advance(connection, schedule, schedule.last_due, next_due(cron, tz, at))
    newest = dues[-1]
    if not store.advance(connection, schedule, newest, next_due(cron, tz, at)):
        return False
    late_s = at - newest
    made_up = late_s > GRACE_S
    runs = not made_up or schedule.catch_up
    if runs:
        why = f"the newer one of {shown(newest, tz)} is run instead"
        store.skip_pending(connection, schedule.id, why, at)
    whys = [_skipped(at - due, runs) for due in dues]
    if dues[0] > schedule.next_due:
        whys[0] += f"; so were all since {shown(schedule.next_due, tz)}"
    rows = [_row(schedule, due, why, at) for due, why in zip(dues, whys, strict=True)]
    if runs:
        late = f"made up for: no dispatcher ran for {_ago(late_s)}" if made_up else ""
        rows[-1] |= {"state": "pending", "why": late, "finished_at": None}
    store.record(connection, rows)
    return True


def _row(schedule: Schedule, due: float, why: str, at: float) -> dict[str, object]:
    return {
        "schedule_id": schedule.id, "due_at": due, "kind": "due",
        "state": "skipped", "why": why, "finished_at": at,
    }  # fmt: skip


def _skipped(late_s: float, newer: bool) -> str:
    if late_s <= GRACE_S:
        return "a newer one is run instead"
    then = "a newer one is run instead" if newer else "the schedule does not catch up"
    return f"missed by {_ago(late_s)}, for no dispatcher ran; {then}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


# ---- windows


def is_open(schedule: Schedule, at: float) -> bool:
    """Whether due runs may go on now; always, if the schedule has no window."""
    if schedule.until is None:
        return True
    last = schedule.last_due
    return last is not None and at < closes(schedule.until, schedule.tz, last)


def may_go_on(schedule: Schedule, run: Run, at: float) -> bool:
    return run.kind == "manual" or is_open(schedule, at)


def hold_back(
    connection: Connection, schedule: Schedule, run: Run, holder: str | None, at: float
) -> bool:
    """The window closed on a run that nobody carries out: it waits, its batch paused."""
    following = shown(schedule.next_due, schedule.tz)
    why = f"its window closed at {schedule.until}; it goes on at {following}"
    if not store.release(connection, run, holder, "waiting", at, why):
        return False
    if run.batch_id:
        batches.set_paused(connection, run.batch_id, True)
    return True


# ---- who is next


def choose(schedule: Schedule, runs: list[Run], at: float) -> tuple[Run, bool] | None:
    """The run to see to now, and whether to carry it out (else to hold it back).

    `runs`: those of the schedule that are not over, oldest first.
    """
    begun = next((run for run in runs if run.begun), None)
    if begun is not None:
        if begun.state == "running" and not _abandoned(begun, at):
            return None
        if not may_go_on(schedule, begun, at):
            return None if begun.state == "waiting" else (begun, False)
    for run in [begun] if begun else runs:
        wanted = run.begun or run.kind == "manual" or not schedule.paused
        if wanted and may_go_on(schedule, run, at):
            return run, True
    return None


def _abandoned(run: Run, at: float) -> bool:
    return run.lease_until is not None and run.lease_until < at


def claim(
    connection: Connection, schedule_id: str, holder: str, at: float, ttl_s: float
) -> tuple[Schedule, Run] | None:
    """Take what is next of a schedule for `ttl_s` seconds; its batch goes on if it waited.

    What nobody carries out while its window is closed is held back.
    """
    schedule = store.lock(connection, schedule_id)
    if schedule is None:
        return None
    chosen = choose(schedule, store.open_runs(connection, schedule_id), at)
    if chosen is None:
        return None
    run, starts = chosen
    if not starts:
        hold_back(connection, schedule, run, run.holder, at)
        return None
    if not store.take(connection, run, holder, at, ttl_s):
        return None
    if run.state == "waiting" and run.batch_id:
        batches.set_paused(connection, run.batch_id, False)
    return schedule, run


# ---- what a person does


def ask(connection: Connection, schedule: Schedule, at: float) -> float:
    """Have the schedule run now, whatever its window; the `due_at` of the run.

    What waits for its window goes on instead. Raises Invalid when a run is under way, or asked for.
    """
    store.lock(connection, schedule.id)
    for run in store.open_runs(connection, schedule.id):
        if run.state == "running" or run.kind == "manual":
            raise Invalid(
                f"a run of {schedule.name} is under way or asked for already, since "
                f"{shown(run.started_at or run.due_at, schedule.tz)}; see: "
                f"farm schedule history {schedule.name}"
            )
        if run.begun:
            store.as_manual(connection, run)
            return run.due_at
    store.record(connection, [{"schedule_id": schedule.id, "due_at": at, "kind": "manual"}])
    return at


def pause(connection: Connection, schedule: Schedule, at: float) -> None:
    """Begin nothing more that is due; what is under way is finished."""
    store.lock(connection, schedule.id)
    store.skip_pending(connection, schedule.id, "the schedule was paused", at)
    store.set_paused(connection, schedule.id, True, schedule.next_due)


def resume(connection: Connection, schedule: Schedule, at: float) -> None:
    """Go on with the next due time from now; those of the pause are not missed."""
    following = next_due(schedule.cron, schedule.tz, at)
    store.set_paused(connection, schedule.id, False, following)
