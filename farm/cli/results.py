"""`farm results`: pictures out of the farm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Batch, Json, examples, open_farm
from farm.cli.follow import download, sentence
from farm.cli.output import hint, note, plural, print_json, print_line, short
from farm.errors import Invalid

if TYPE_CHECKING:
    from farm.service import Farm
    from farm.store.batches import BatchStatus

_SHEETS = (".png", ".jpg", ".jpeg", ".webp")


def results(
    batch: Batch,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to; default pictures/BATCH.")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a contact sheet (png, jpg or webp)."),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the pictures, download none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download a batch's pictures, or make a contact sheet, or list them.

    The directory also gets BATCH.jsonl: file, SHA-256 and parameters of each
    picture. What is there already is not fetched again. Exits with 1 if jobs
    failed.
    """
    if sheet is not None and sheet.suffix.lower() not in _SHEETS:
        raise Invalid(f"{sheet}: a contact sheet ends in one of {', '.join(_SHEETS)}")
    with open_farm() as farm:
        found = farm.status(farm.find(batch))
        if listing:
            _list(farm, found, as_json)
        else:
            if out is None and sheet is None:
                out = Path("pictures") / found.id
            _fetch(farm, found, out, sheet, as_json)
        if not found.done:
            hint(f"not all is done: {sentence(found, found.rate)}")
        if found.counts["failed"]:
            hint(f"{plural(found.counts['failed'], 'job')} failed: farm status {found.id}")
            raise typer.Exit(1)


def _fetch(
    farm: Farm, batch: BatchStatus, out: Path | None, sheet: Path | None, as_json: bool
) -> None:
    result: dict[str, Any] = {"batch": batch.id, "counts": batch.counts}
    if out is not None:
        fetched = download(farm, batch, out)
        note(f"{plural(fetched, 'picture')} in {out}")
        result |= {"directory": str(out), "pictures": fetched}
    if sheet is not None:
        shown = farm.contact_sheet(batch.id, sheet)
        note(f"contact sheet of {plural(shown, 'picture')}: {sheet}" if shown else "no picture yet")
        result |= {"sheet": str(sheet) if shown else None, "on_sheet": shown}
    if as_json:
        print_json(result)
    else:
        for place in (out, sheet):
            if place is not None and place.exists():
                print_line(str(place))


def _list(farm: Farm, batch: BatchStatus, as_json: bool) -> None:
    """Streams: a batch may have a million pictures."""
    import json

    comma = ""
    if as_json:
        sys.stdout.write("[")
    for job in farm.pictures(batch.id):
        if as_json:
            sys.stdout.write(comma + json.dumps(job.as_dict(), ensure_ascii=False))
            comma = ",\n"
        else:
            prompt = short(job.spec["prompt"])
            print_line(f"{job.id}  {job.object_key}  {job.spec['seed']}  {prompt}")
    if as_json:
        sys.stdout.write("]\n")


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command(
        rich_help_panel="Pictures",
        epilog=examples(
            "farm results latest --out pictures",
            "farm results latest --sheet sheet.png",
            "farm results latest --list --json",
        ),
    )(results)
