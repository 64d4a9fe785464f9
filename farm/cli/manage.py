"""Changing what was submitted: `farm cancel`, `retry`, `pause`, `resume`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from farm.cli.context import Batch, Json, Target, examples, find_target, open_farm
from farm.cli.follow import tell_unserved
from farm.cli.output import hint, note, plural, print_json
from farm.errors import Invalid


def cancel(target: Target, as_json: Json = False) -> None:
    """Cancel a batch or one job: queued jobs at once, running ones at their next step."""
    with open_farm() as farm:
        found = find_target(farm, target)
        batch_id, idx = (found, None) if isinstance(found, str) else found
        cancelled, asked = farm.cancel(batch_id, idx)
    if as_json:
        print_json({"batch": batch_id, "job": idx, "cancelled": cancelled, "stopping": asked})
        return
    if not cancelled and not asked:
        note("nothing to cancel: all had ended, or were asked to stop before")
        return
    note(f"cancelled {plural(cancelled, 'job')}" + (f", {asked:,} stopping" if asked else ""))


def retry(
    target: Target,
    code: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="Only failures of this code, as `farm status` shows it."),
    ] = None,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Cancelled jobs too.")] = False,
    as_json: Json = False,
) -> None:
    """Queue failed jobs again, of a batch or a single one; their failures count anew."""
    if code and not code.startswith("ERR_"):
        raise Invalid(f"error codes begin with ERR_, {code[:40]!r} does not; see `farm status`")
    with open_farm() as farm:
        found = find_target(farm, target)
        batch_id, idx = (found, None) if isinstance(found, str) else found
        moved = farm.retry(batch_id, idx=idx, cancelled=cancelled, code=code)
        if as_json:
            print_json({"batch": batch_id, "job": idx, "queued": moved})
            return
        if not moved:
            note("nothing to queue again" + ("" if cancelled else "; --cancelled takes those too"))
            return
        note(f"queued {plural(moved, 'job')} again")
        tell_unserved(farm, list(farm.status(batch_id).by_model))
        hint(f"next: farm watch {batch_id}")


def pause(batch: Batch, as_json: Json = False) -> None:
    """Hand out no more jobs of a batch; those that run are finished."""
    _set_paused(batch, True, as_json)


def resume(batch: Batch, as_json: Json = False) -> None:
    """Go on with a paused batch."""
    _set_paused(batch, False, as_json)


def _set_paused(batch: str, paused: bool, as_json: bool) -> None:
    with open_farm() as farm:
        batch_id = farm.find(batch)
        farm.pause(batch_id, paused)
        if as_json:
            print_json(farm.status(batch_id).as_dict())
            return
    if paused:
        note(f"batch {batch_id} is paused; go on: farm resume {batch_id}")
    else:
        note(f"batch {batch_id} goes on")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    told: dict[Callable[..., None], tuple[str, ...]] = {
        cancel: ("farm cancel latest", "farm cancel latest/17"),
        retry: (
            "farm retry latest",
            "farm retry latest --code ERR_OUT_OF_MEMORY",
            "farm retry latest/17 --cancelled",
        ),
        pause: ("farm pause latest",),
        resume: ("farm resume latest",),
    }
    for command, lines in told.items():
        app.command(rich_help_panel="Pictures", epilog=examples(*lines))(command)
