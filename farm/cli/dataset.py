"""`farm dataset`: recipes into shards. What is shown stands in `dataset_view`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Json, examples, open_farm, settings
from farm.cli.output import hint, note, plural, print_json, print_line
from farm.errors import Invalid, InvalidConfig

if TYPE_CHECKING:
    from farm.blobs import BlobStore
    from farm.datasets.recipe import Recipe

dataset = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
File = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
Label = Annotated[
    str,
    typer.Option(
        metavar="LABEL",
        help="Of this run, such as its date; another label is another run, with its own batch.",
    ),
]
Priority = Annotated[
    int | None, typer.Option(help="Instead of the recipe's; larger goes first.", show_default=False)
]
_PLACE = "A dataset's place (a directory or s3:// URL), or the recipe that says it."
_TO = "A directory, an s3:// URL, or hf://datasets/OWNER/NAME, a repository of the model hub."
Place = Annotated[str, typer.Argument(metavar="DATASET", help=_PLACE)]


@dataset.callback()
def _dataset() -> None:
    """Make datasets: a recipe says all of one, a run renders and writes what is missing of it."""


@dataset.command(epilog=examples("farm dataset init", "farm dataset init nightly.toml"))
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(
        "dataset.toml"
    ),
    as_json: Json = False,
) -> None:
    """Write a recipe to begin with: the demo model's shapes, each section explained."""
    from farm.cli.dataset_view import command

    example = Path(__file__).parents[1] / "datasets" / "example.toml"
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(example.read_text(encoding="utf-8"))
    except FileExistsError:
        raise Invalid(f"{file} is there already; give another name") from None
    except OSError as error:
        raise Invalid(f"{file}: {error.strerror}") from None
    if as_json:
        print_json({"recipe": str(file)})
        return
    print_line(str(file))
    hint(f"next: edit it, then `{command('plan', file)}` and `{command('run', file)}`")


@dataset.command(
    epilog=examples(
        "farm dataset plan dataset.toml",
        "farm dataset plan dataset.toml --preview 8 --sheet preview.png",
        "farm dataset plan dataset.toml --label 2026-12-01 --json",
    )
)
def plan(
    file: File,
    label: Label = "",
    preview: Annotated[
        int,
        typer.Option(min=0, max=200, metavar="N", help="Render N pictures, spread over the rows."),
    ] = 0,
    sheet: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the preview's contact sheet goes.")
    ] = Path("preview.png"),
    as_json: Json = False,
) -> None:
    """Say what a run would do: rows, shards, what was rendered before, time and bytes.

    Nothing is queued but the pictures of a preview, which the run then need not
    render again.
    """
    from farm.cli.dataset_view import show_plan
    from farm.datasets.plan import plan as make_plan

    recipe = _recipe(file)
    with open_farm() as farm:
        told = make_plan(farm, recipe, label)
        if not as_json:
            show_plan(told)
        if preview:
            _preview(farm, recipe, label, preview, sheet)
        if as_json:
            print_json(told.as_dict() | ({"sheet": str(sheet)} if preview else {}))


def _preview(farm: Any, recipe: Recipe, label: str, n: int, sheet: Path) -> None:
    from farm.cli.follow import follow, tell_unserved
    from farm.datasets.plan import preview_rows

    rows = enumerate(preview_rows(recipe, label, n), start=1)
    about: Any = {**recipe.shared, "name": f"{recipe.name} preview", "owner": recipe.owner}
    status = farm.submit_rows(rows, recipe.folder, **about)
    tell_unserved(farm, list(status.by_model))
    try:
        follow(farm, [status.id])
    except KeyboardInterrupt:
        note(f"interrupted; the preview goes on, `farm cancel {status.id}` ends it")
        raise
    shown = farm.contact_sheet(status.id, sheet)
    note(f"{plural(shown, 'picture')} in {sheet}")


@dataset.command(
    epilog=examples(
        "farm dataset run dataset.toml",
        "farm dataset run nightly.toml --label 2026-12-01 --notify",
        "farm dataset run dataset.toml --json | tail -n 1 > summary.json",
    )
)
def run(
    file: File,
    label: Label = "",
    priority: Priority = None,
    notify: Annotated[
        bool, typer.Option("--notify", help="Tell the recipe's webhook or command at the end.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Render and write a dataset, or what is missing of it.

    It can be stopped at any moment, also by force, and run again anywhere with the
    same farm: rows that are rendered stay so, shards that are whole are left as they
    are. With --json an object a line is printed: the batch, each shard, the summary.
    Exit status 1: rows failed, or none was accepted.
    """
    _carry_out(file, label, priority, notify, as_json, redrive=False)


@dataset.command(epilog=examples("farm dataset redrive dataset.toml"))
def redrive(
    file: File, label: Label = "", priority: Priority = None, as_json: Json = False
) -> None:
    """Queue again the rows that failed or were cancelled, and write their shards anew.

    They land in the same shards at the same places; other shards are not touched. Pictures that
    a shard needs, and that the blob store has lost, are rendered again too.
    """
    _carry_out(file, label, priority, False, as_json, redrive=True)


def _carry_out(
    file: Path, label: str, priority: int | None, notify: bool, as_json: bool, *, redrive: bool
) -> None:
    from farm.cli.dataset_view import Lines, command, tell_summary, telling
    from farm.datasets.run import run as carry_out

    recipe = _recipe(file)
    with open_farm() as farm, _stoppable(), telling(farm, as_json) as tell:
        try:
            told = carry_out(farm, recipe, label, priority=priority, redrive=redrive, tell=tell)
        except KeyboardInterrupt:
            again = command("run", file, label)
            note(f"interrupted; the batch goes on, and `{again}` goes on with it")
            raise
        except Exception as error:
            if notify:
                _notify(recipe, {"name": recipe.name, "label": label, "error": str(error)})
            raise
    summary = told.as_dict()
    if notify:
        _notify(recipe, summary)
    tell_summary(told, file)
    if as_json:
        Lines.print(summary)
    else:
        print_line(told.out)
    if not told.ok:
        raise typer.Exit(1)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is a Ctrl-C: what is open is closed in order."""
    import signal

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _notify(recipe: Recipe, summary: dict[str, Any]) -> None:
    from farm.notify import notify

    if recipe.notify is None:
        note("the recipe has no [notify]: nobody was told")
        return
    for trouble in notify(recipe.notify, summary | {"failed": not summary.get("ok")}):
        note(f"notify: {trouble}")


@dataset.command(
    epilog=examples("farm dataset status dataset.toml", "farm dataset status dataset.toml --json")
)
def status(file: File, label: Label = "", as_json: Json = False) -> None:
    """Show how far a run is: its rows, its shards, and what its dataset holds."""
    from farm.cli.dataset_view import show_status
    from farm.datasets.status import status as look

    with open_farm() as farm:
        told = look(farm, _recipe(file), label)
    if as_json:
        print_json(told.as_dict())
    else:
        show_status(told, file, label)


@dataset.command(
    epilog=examples(
        "farm dataset verify datasets/shapes", "farm dataset verify s3://sets/shapes --json"
    )
)
def verify(where: Place, label: Label = "", as_json: Json = False) -> None:
    """Read all of a dataset and compare every file with its SHA-256; 1 if one is wrong."""
    from farm.cli.dataset_view import show_verdict
    from farm.datasets.manifest import verify as check

    with _place(where, label) as (place, shown):
        told = check(place, shown)
    if as_json:
        print_json(told.as_dict())
    else:
        show_verdict(told)
    if told.wrong:
        raise typer.Exit(1)


@dataset.command(
    epilog=examples(
        "farm dataset publish dataset.toml s3://public/shapes",
        "farm dataset publish s3://sets/shapes ./shapes",
        "farm dataset publish dataset.toml hf://datasets/me/shapes --private",
    )
)
def publish(
    where: Place,
    to: Annotated[str, typer.Argument(metavar="TO", help=_TO)],
    label: Label = "",
    private: Annotated[
        bool, typer.Option("--private", help="A hub's repository that is made now is private.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a finished dataset, each file checked on its way, the manifest last.

    What lies there already, to the byte, is not copied again. A hub gets it in one commit, or in a
    few if it has more than 1,000 files; HF_TOKEN, or `hf auth login`, must allow to write there.
    """
    from farm.cli.dataset_view import copying
    from farm.datasets.publish import publish as copy

    hub, url = to.startswith("hf://"), ""
    if private and not hub:
        raise Invalid("--private is for a repository of the hub, hf://datasets/OWNER/NAME")
    with _place(where, label) as (place, shown), copying() as done:
        if hub:
            from farm.cli.weights import hub_token

            try:
                from farm.datasets.hub import publish_to_hub
            except ImportError:
                raise InvalidConfig(f"{to} needs: pip install 'renderfarm[dataset]'") from None
            url = publish_to_hub(place, shown, to, settings().hub_url, hub_token(), private, done)
        else:
            with _place(to, "") as (target, _):
                copy(place, shown, target, done)
    if as_json:
        print_json(done.as_dict() | {"to": to} | ({"url": url} if url else {}))
    else:
        note(f"{plural(done.copied, 'file')} copied to {to}, {done.kept:,} were there")
        if url:
            print_line(url)


@dataset.command(
    epilog=examples(
        "farm dataset diff sets/2026-11-30 sets/2026-12-01",
        "farm dataset diff s3://public/shapes dataset.toml --json",
        "farm dataset diff n.toml n.toml --old-label 2026-11-30 --label 2026-12-01",
    )
)
def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help=_PLACE)],
    new: Annotated[str, typer.Argument(metavar="NEW", help=_PLACE)],
    old_label: Annotated[str, typer.Option(metavar="LABEL", help="If OLD is a recipe.")] = "",
    label: Annotated[str, typer.Option(metavar="LABEL", help="If NEW is a recipe.")] = "",
    as_json: Json = False,
) -> None:
    """Tell what NEW has and OLD has not, row by row: by job, and by picture."""
    from farm.cli.dataset_view import show_diff
    from farm.datasets.diff import diff as compare

    with _place(old, old_label) as (before, a), _place(new, label) as (after, b):
        found = compare(before, a, after, b)
    if as_json:
        print_json(found.as_dict())
    else:
        show_diff(found)


def _recipe(file: Path) -> Recipe:
    from farm.datasets.recipe import load_recipe

    return load_recipe(file)


@contextlib.contextmanager
def _place(where: str, label: str) -> Iterator[tuple[BlobStore, str]]:
    """The store that a dataset lies in, by its place or its recipe."""
    from farm.datasets.place import open_place

    if where.endswith(".toml"):
        where = _recipe(Path(where)).place(label)
    place = open_place(where, settings())
    try:
        yield place, where
    finally:
        place.close()


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.add_typer(
        dataset,
        name="dataset",
        epilog=examples(
            "farm dataset init",
            "farm dataset plan dataset.toml",
            "farm dataset run dataset.toml",
        ),
        rich_help_panel="Pictures",
    )
