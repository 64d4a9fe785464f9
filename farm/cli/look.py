"""Looking: `farm status`, `watch`, `workers`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import BATCH_HELP, Json, examples, find_target, open_farm
from farm.cli.follow import follow, summary, tell_held, tell_unserved
from farm.cli.output import (
    about,
    clean,
    duration,
    hint,
    moment,
    note,
    pace,
    print_fields,
    print_json,
    print_line,
    print_table,
    short,
)

if TYPE_CHECKING:
    from farm.service import Farm
    from farm.store.batches import BatchStatus
    from farm.store.reads import Job


def status(
    target: Annotated[
        str | None,
        typer.Argument(metavar="BATCH|JOB", help="A batch (an id or 'latest'), or BATCH/INDEX."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many recent batches.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the recent batches, one batch, or one job with its history."""
    with open_farm() as farm:
        if target is None:
            _show_recent(farm, limit, as_json)
            return
        found = find_target(farm, target)
        if isinstance(found, str):
            _show_batch(farm, farm.status(found), as_json)
        else:
            _show_job(farm, farm.job(found), as_json)


def _show_recent(farm: Farm, limit: int, as_json: bool) -> None:
    recent = farm.batches(limit)
    if as_json:
        print_json([batch.as_dict() for batch in recent])
        return
    if not recent:
        hint('no batch yet; submit one: farm submit "a red circle on a blue background"')
        return
    columns = ("batch", "name", "owner", "state", "jobs", "done", "failed", "to go", "age")
    print_table(columns, [_recent_row(batch) for batch in recent])
    tell_unserved(farm)
    tell_held(farm.workers())


def _state(batch: BatchStatus) -> str:
    if not batch.ready:
        return "arriving"
    if batch.done:
        return "done"
    if batch.cancelled:
        return "cancelling"
    if batch.paused:
        return "paused"
    if batch.waits:
        return "waiting"
    return "running" if batch.counts["running"] else "queued"


def _recent_row(batch: BatchStatus) -> tuple[str | int | None, ...]:
    return (
        batch.id,
        short(batch.name, 30),
        short(batch.owner, 16),
        _state(batch),
        batch.total,
        batch.total - batch.open if batch.ready else 0,
        batch.counts["failed"] or None,
        duration(batch.eta_s) if batch.open else None,
        duration(max(0.0, round(time.time() - batch.created_at))),
    )


def _show_batch(farm: Farm, batch: BatchStatus, as_json: bool) -> None:
    failures = farm.failures(batch.id) if batch.counts["failed"] else {}
    if as_json:
        print_json(batch.as_dict() | {"failures": failures})
        return
    counts = ", ".join(f"{n:,} {state}" for state, n in batch.counts.items() if n)
    done = batch.total - batch.open
    share = f"{done * 100 // batch.total} %" if batch.total else "-"
    working = batch.open and not batch.paused and not batch.waits
    print_fields(
        (
            ("batch", batch.id),
            ("name", batch.name),
            ("owner", batch.owner),
            ("priority", batch.priority or None),
            ("state", _state(batch)),
            ("after", f"batch {batch.after}" if batch.after else None),
            ("expires", moment(batch.expires_at) if batch.expires_at else None),
            ("jobs", f"{batch.total:,}: {counts}" if counts else f"{batch.total:,}"),
            ("models", ", ".join(batch.by_model) if len(batch.by_model) > 1 else None),
            ("progress", f"{share} ({done:,} of {batch.total:,})"),
            ("rate", pace(batch.rate) if batch.rate else None),
            ("to go", about(batch.eta_s) if working and batch.eta_s else None),
            ("submitted", moment(batch.created_at)),
            ("started", moment(batch.started_at) if batch.started_at else None),
            ("finished", moment(batch.finished_at) if batch.done else None),
            *((f"failed {code}", n) for code, n in failures.items()),
        )
    )
    _batch_hints(farm, batch, failures)


def _batch_hints(farm: Farm, batch: BatchStatus, failures: dict[str, int]) -> None:
    if batch.paused and batch.open:
        hint(f"paused; go on: farm resume {batch.id}")
    elif batch.waits and batch.open:
        hint(f"it begins when batch {batch.after} is done; next: farm watch {batch.after}")
    elif batch.open:
        tell_unserved(farm, list(batch.by_model))
        workers = [worker for worker in farm.workers() if worker.model in batch.by_model]
        tell_held(workers)
        for worker in workers:
            if worker.note and not worker.spooled:
                where = f"{clean(worker.host)}:{worker.pid}"
                hint(f"worker {where} is {worker.state}: {short(worker.note, 200)}")
        hint(f"next: farm watch {batch.id}")
    elif batch.counts["succeeded"]:
        hint(f"next: farm results {batch.id} --out DIR")
    if failures:
        for job in farm.jobs(batch.id, ["failed"]):
            hint(f"first failure, job {job.id}: {short(job.error, 200)}")
            break
        hint(f"try the failed ones again: farm retry {batch.id} [--code CODE]")


def _asked(spec: dict[str, Any]) -> Iterator[tuple[str, str | int | float | None]]:
    """What the job asks for, as a person reads it."""
    for name, value in spec.items():
        if name == "loras":
            value = ", ".join(f"{lora}:{weight:g}" for lora, weight in value)
        yield "engine asked" if name == "engine" else name.replace("_", " "), value


def _show_job(farm: Farm, job: Job, as_json: bool) -> None:
    history = farm.history(job.ref)
    if as_json:
        same = str(job.rendered_for) if job.rendered_for else None
        print_json(job.as_dict() | {"rendered_for": same, "history": history})
        return
    print_fields(
        (
            ("job", job.id),
            ("state", job.state),
            ("progress", f"{job.progress:.0%}" if job.state == "running" else None),
            *_asked(job.spec),
            ("engine", job.engine),
            ("claims", job.claim_no or None),
            ("failures", job.failures or None),
            ("started", moment(job.started_at) if job.started_at else None),
            ("finished", moment(job.finished_at) if job.finished_at else None),
            ("render time", duration(job.render_s) if job.render_s else None),
            ("picture", job.object_key),
            ("the same as", f"job {job.rendered_for}'s" if job.rendered_for else None),
            ("bytes", job.size_bytes),
            ("sha256", job.sha256),
            ("fingerprint", job.fingerprint),
            ("error", f"{job.error} ({job.error_code})" if job.error_code else None),
        )
    )
    if history:
        print_line("")
        print_table(
            ("when", "what", "claim", "code", "message"),
            [(moment(e["at"]), e["kind"], e["claim_no"], e["code"], e["message"]) for e in history],
        )
    if job.state in ("failed", "cancelled"):
        more = " --cancelled" if job.state == "cancelled" else ""
        hint(f"try it again: farm retry {job.id}{more}")


def watch(
    batches: Annotated[list[str] | None, typer.Argument(metavar="BATCH", help=BATCH_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Follow batches until they are done; without one, all that are not.

    A bar a batch on a terminal, elsewhere one line a change; --json prints a JSON
    object a line. Exits with 1 if jobs failed. Leaving with Ctrl-C stops nothing.
    """
    with open_farm() as farm:
        if batches:
            chosen = list(dict.fromkeys(farm.find(text) for text in batches))
        else:
            chosen = [batch.id for batch in farm.batches(50) if not batch.done]
        if not chosen:
            hint("no batch is under way")
            return
        models = {model for batch in chosen for model in farm.status(batch).by_model}
        tell_unserved(farm, sorted(models))
        ended = follow(farm, chosen, json_lines=as_json)
    for batch in ended:
        note(summary(batch))
    if any(batch.counts["failed"] for batch in ended):
        raise typer.Exit(1)


def workers(as_json: Json = False) -> None:
    """Show the live workers: what they serve, where, how fast."""
    with open_farm() as farm:
        found = farm.workers()
        if as_json:
            print_json([worker.as_dict() for worker in found])
            return
        if found:
            columns = ("model", "engine", "device", "where", "state", "rendered", "held", "each",
                       "note")  # fmt: skip
            rows = [
                (
                    worker.model,
                    worker.engine,
                    worker.device,
                    f"{worker.host}:{worker.pid}",
                    worker.state,
                    worker.rendered,
                    worker.spooled or None,
                    duration(worker.seconds_per_picture) if worker.seconds_per_picture else None,
                    short(worker.note, 80),
                )
                for worker in found
            ]
            print_table(columns, rows)
        else:
            hint("no live worker; `farm up` starts one, or: farm worker --model M --engine E")
        tell_unserved(farm)


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    panel = "Pictures"
    app.command(
        rich_help_panel=panel,
        epilog=examples("farm status", "farm status latest --json", "farm status latest/17"),
    )(status)
    app.command(
        rich_help_panel=panel, epilog=examples("farm watch", "farm watch latest && echo all done")
    )(watch)
    app.command(rich_help_panel="The farm", epilog=examples("farm workers", "farm workers --json"))(
        workers
    )
