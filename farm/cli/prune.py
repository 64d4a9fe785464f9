"""`farm prune`: old batches go, with their pictures; so do objects that nothing names."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import BATCH_HELP, Json, examples, open_farm
from farm.cli.output import console, hint, live, note, plural, print_json
from farm.errors import Invalid
from farm.units import parse_duration, show_size

if TYPE_CHECKING:
    from farm.retention import Pruned
    from farm.service import Farm

Dry = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


def prune(
    batches: Annotated[list[str] | None, typer.Argument(metavar="BATCH", help=BATCH_HELP)] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Batches that ended longer ago, such as 30d; of orphans, those written before "
            "(1d if not said).",
        ),
    ] = None,
    orphans: Annotated[
        bool,
        typer.Option("--orphans", help="Instead: pictures in the blob store that no job names."),
    ] = False,
    dry_run: Dry = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove batches that are done, with their jobs and pictures; for good.

    A picture that other batches share goes with the last of them, an input
    picture when no batch has named it for a day. Interrupted, it goes on when
    it is run again. On a terminal it asks first.
    """
    if orphans and batches:
        raise Invalid("--orphans looks through the whole blob store: give no batch with it")
    if not orphans and bool(batches) == (older_than is not None):
        raise Invalid("say which batches: their names, or --older-than TIME (such as 30d)")
    age = parse_duration(older_than) if older_than else None
    with open_farm() as farm:
        if orphans:
            told = _orphans(farm, age, dry_run, yes)
        else:
            told = _batches(farm, batches or [], age, dry_run, yes)
    if as_json:
        print_json(told.as_dict() | {"dry_run": dry_run})
    else:
        _tell(told, dry_run, orphans)


def _batches(farm: Farm, given: list[str], age: float | None, dry_run: bool, yes: bool) -> Pruned:
    from farm import retention

    if age is not None:
        chosen = retention.old_batches(farm.db, age)
    else:
        chosen = list(dict.fromkeys(farm.find(text) for text in given))
    if dry_run:
        with _progress("would go") as progress:
            return retention.would_prune(farm.db, chosen, progress)
    if chosen:
        what = plural(len(chosen), "batch") if len(chosen) > 1 else f"batch {chosen[0]}"
        _ask(f"remove {what} with all jobs and pictures, for good?", yes)
    with _progress("removed") as progress:
        return retention.prune(farm.db, farm.blobs, chosen, progress)


def _orphans(farm: Farm, age: float | None, dry_run: bool, yes: bool) -> Pruned:
    from farm import retention

    if not dry_run:
        place = f"{farm.settings.blobs} that {farm.db.shown} does not name"
        _ask(f"delete the pictures of {place}, for good?", yes)
    age = retention.SAFE_S if age is None else age
    with _progress("found") as progress:
        return retention.prune_orphans(
            farm.db, farm.blobs, older_than_s=age, dry_run=dry_run, progress=progress
        )


def _ask(question: str, yes: bool) -> None:
    if not yes and _on_a_terminal():
        typer.confirm(question, abort=True, err=True)


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


@contextlib.contextmanager
def _progress(verb: str) -> Iterator[Callable[[Pruned], None]]:
    """A line on a terminal that counts; elsewhere nothing."""
    if not live(sys.stderr):
        yield lambda so_far: None
        return
    with console(sys.stderr).status(f"{verb}: nothing yet") as line:
        yield lambda so_far: line.update(f"{verb}: {_counted(so_far)}")


def _counted(told: Pruned) -> str:
    parts = [plural(told.batches, "batch")] if told.batches else []
    parts += [plural(told.jobs, "job")] if told.jobs else []
    return ", ".join([*parts, f"{plural(told.objects, 'object')} ({show_size(told.bytes)})"])


def _tell(told: Pruned, dry_run: bool, orphans: bool) -> None:
    if not (told.batches or told.jobs or told.objects):
        note("nothing to prune")
    elif dry_run:
        shared = "" if orphans else "; pictures that other batches share stay"
        note(f"would go: {_counted(told)}{shared}")
    else:
        note(f"removed: {_counted(told)}")
    if told.kept:
        hint(f"{plural(told.kept, 'batch')} not done, and left; cancel first: farm cancel BATCH")


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command(
        rich_help_panel="The farm",
        epilog=examples(
            "farm prune --older-than 30d --dry-run",
            "farm prune --older-than 30d --yes",
            "farm prune 1m7xtvrya07c0x88",
            "farm prune --orphans --dry-run",
        ),
    )(prune)
