"""`farm jobs`: the jobs of a batch, those in a state or with an error, page by page."""

from __future__ import annotations

from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Batch, Json, examples, open_farm
from farm.cli.output import duration, hint, print_json, print_table, short
from farm.units import parse_duration

if TYPE_CHECKING:
    from farm.store.reads import Job


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


def jobs(
    batch: Batch,
    states: Annotated[
        list[State] | None, typer.Option("--state", help="In this state; can be repeated.")
    ] = None,
    code: Annotated[
        str | None, typer.Option(metavar="CODE", help="With this error, such as ERR_OUT_OF_MEMORY.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Ended in the last so much, such as 2h.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Of one page.")] = 50,
    after: Annotated[
        int, typer.Option(metavar="INDEX", help="Begin behind this place: the next page.")
    ] = -1,
    as_json: Json = False,
) -> None:
    """List the jobs of a batch in order; at once, also a few out of a million."""
    within_s = parse_duration(since) if since else None
    with open_farm() as farm:
        batch_id = farm.find(batch)
        chosen = [str(state) for state in states or ()]
        listed = farm.jobs(batch_id, chosen, code=code, within_s=within_s, after=after)
        found = list(islice(listed, limit + 1))
    page, more = found[:limit], len(found) > limit
    if as_json:
        following = page[-1].idx if more else None
        print_json({"jobs": [job.as_dict() for job in page], "next": following})
        return
    if not page:
        hint("no such job")
        return
    print_table(("job", "state", "engine", "took", "prompt", "what"), map(_row, page))
    if more:
        hint(f"there are more: the same with --after {page[-1].idx}")


def _row(job: Job) -> tuple[str | None, ...]:
    took = duration(job.render_s) if job.render_s is not None else None
    what = f"{job.error_code}: {short(job.error, 80)}" if job.error_code else job.object_key
    return job.id, job.state, job.engine, took, short(job.spec["prompt"], 40), what


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    lines = (
        "farm jobs latest",
        "farm jobs latest --state failed --code ERR_OUT_OF_MEMORY",
        "farm jobs latest --state succeeded --since 1h --limit 500 --json",
    )
    app.command(rich_help_panel="Pictures", epilog=examples(*lines))(jobs)
