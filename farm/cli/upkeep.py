"""`farm audit` proves the record, `farm reconcile` mends it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import BATCH_HELP, Json, examples, open_farm
from farm.cli.output import clean, hint, live, note, plural, print_json, print_line, print_table
from farm.errors import Invalid
from farm.units import show_size

if TYPE_CHECKING:
    from farm.audit import Audited
    from farm.service import Farm
    from farm.store.ids import JobRef

_PANEL = "The farm"


def audit(
    batches: Annotated[list[str] | None, typer.Argument(metavar="BATCH", help=BATCH_HELP)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Ask for each object's size, and read none.")
    ] = False,
    after: Annotated[
        str | None, typer.Option(metavar="BATCH", help="Go on behind this batch.")
    ] = None,
    lost: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the jobs whose pictures are lost there, as a prompt file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that every picture is there as recorded, and that nothing is counted wrongly.

    Of these batches, or of all. Each object is read and its SHA-256 compared;
    counters are compared with a full count; what no job names, and what dead
    workers hold, is looked for. Changes nothing. Exits with 1 if anything is
    wrong, and says how to mend it.
    """
    if batches and after:
        raise Invalid("--after goes on with an audit of all batches: give no batch with it")
    from farm.audit import audit as look

    with open_farm() as farm:
        farm.check_schema()
        chosen = list(dict.fromkeys(farm.find(text) for text in batches)) if batches else None
        behind = farm.find(after) if after else ""
        with _progress(farm, chosen, behind) as progress, _prompt_file(farm, lost) as write:
            told = look(
                farm.db,
                farm.blobs,
                chosen,
                quick=quick,
                after=behind,
                progress=progress,
                lost=write,
            )
    if as_json:
        print_json(told.as_dict())
    else:
        _tell(told)
    if not told.ok:
        raise typer.Exit(1)


@contextlib.contextmanager
def _prompt_file(farm: Farm, path: Path | None) -> Iterator[Callable[[JobRef], None]]:
    """Writes jobs as lines of a new prompt file, which is there if any was written."""
    if path is None:
        yield lambda ref: None
        return
    from farm.prompts import row_of

    try:
        stream = path.open("x", encoding="utf-8")
    except FileExistsError:
        raise Invalid(f"{path} is there already: name a new file") from None
    with stream:
        yield lambda ref: print(
            json.dumps(row_of(farm.job(ref).spec), ensure_ascii=False), file=stream
        )
    if not path.stat().st_size:
        path.unlink()


def _tell(told: Audited) -> None:
    for finding in told.findings:
        print_line(f"{finding.kind:<8}  {clean(finding.text)}")
    more = told.wrong.total() - len(told.findings)
    if more:
        note(f"and {more:,} more; --json counts them by kind")
    read = f", {show_size(told.bytes)} read" if told.bytes else ""
    looked = f"{plural(told.pictures, 'picture')} of {plural(told.batches, 'batch')}{read}"
    if told.ok:
        note(f"all is well: {looked}, {plural(told.objects, 'object')} listed")
        return
    note(f"wrong: {told.wrong.total():,}; looked at {looked}")
    for mend in dict.fromkeys(finding.mend for finding in told.findings[:200]):
        hint(f"mend: {mend}")


@contextlib.contextmanager
def _progress(
    farm: Farm, chosen: list[str] | None, after: str
) -> Iterator[Callable[[Audited], None]]:
    """A bar on a terminal; elsewhere nothing. Stopped, it says where to go on."""
    last = ""
    bar = _bar(farm, chosen, after) if live(sys.stderr) else contextlib.nullcontext()
    with bar as show:

        def progress(so_far: Audited) -> None:
            nonlocal last
            last = so_far.last
            if show:
                show(so_far)

        try:
            yield progress
        except BaseException:
            if last and chosen is None:
                note(f"stopped; go on with: farm audit --after {last}")
            raise


@contextlib.contextmanager
def _bar(farm: Farm, chosen: list[str] | None, after: str) -> Iterator[Callable[[Audited], None]]:
    from farm.cli.follow import bars
    from farm.store import audit as store

    with farm.db.read() as connection:
        if chosen is None:
            total = store.pictures(connection, after=after)
        else:
            total = sum(store.pictures(connection, batch_id) for batch_id in chosen)
    with bars() as progress:
        task = progress.add_task("pictures", total=total, told="")

        def show(so_far: Audited) -> None:
            told = f"wrong: {so_far.wrong.total():,}" if so_far.wrong else ""
            progress.update(task, completed=so_far.pictures, told=told)

        yield show


def reconcile(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be mended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Mend all that a dispatcher mends, now, and say what it was.

    Jobs that dead workers hold go back, counters are compared with a full
    count, lanes are rung, objects that no job will ever name are deleted. Safe
    beside a farm at work; just after an outage of the database give workers
    half a minute to beat first. Exits with 1 if something was away, and could
    not be looked at.
    """
    from farm.reconcile import mend_all

    with open_farm() as farm:
        farm.check_schema()
        report = mend_all(
            farm.db, lambda: farm.blobs, lambda: farm.broker, farm.settings, dry_run=dry_run
        )
    if as_json:
        print_json(report.as_dict())
    else:
        rows = [(one.kind, one.n, one.text) for one in report.repairs]
        if rows:
            print_table(("kind", "n", "what"), rows)
        elif not report.troubles:
            note("nothing to mend")
        for trouble in report.troubles:
            note(f"not looked at: {trouble}")
    if report.troubles:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command(
        rich_help_panel=_PANEL,
        epilog=examples(
            "farm audit",
            "farm audit latest --quick",
            "farm audit --lost lost.jsonl; farm submit --file lost.jsonl --no-reuse",
        ),
    )(audit)
    app.command(
        rich_help_panel=_PANEL, epilog=examples("farm reconcile --dry-run", "farm reconcile")
    )(reconcile)
