"""The catalogue: `farm models`, list, show, verify; beside it fetch, add, convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Json, examples, settings
from farm.cli.model_entries import register as register_entries
from farm.cli.output import hint, note, plural, print_json, print_table
from farm.cli.weights import catalog_of, lanes_of
from farm.cli.weights import register as register_weights

if TYPE_CHECKING:
    from farm.models.verify import Fault

models = typer.Typer(rich_markup_mode="rich")


@models.callback(invoke_without_command=True)
def _models(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the models that jobs may name, and bring their weights to this machine."""
    if ctx.invoked_subcommand is None:
        list_models(as_json)


@models.command("list", epilog=examples("farm models list", "farm models list --json"))
def list_models(as_json: Json = False) -> None:
    """List the model catalogue, and whose weights are on this machine."""
    from farm.cli.model_view import show_all

    show_all(settings(), as_json)


@models.command("show", epilog=examples("farm models show shapes"))
def show_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model's or a LoRA's name.")],
    as_json: Json = False,
) -> None:
    """Show a model or a LoRA: licence, defaults, limits, need of memory, and its weights."""
    from farm.cli.model_view import show

    show(settings(), name, as_json)


@models.command("verify", epilog=examples("farm models verify", "farm models verify sdxl-base"))
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Default: all that are here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash the weights on this machine against models.lock; exits with 1 if any differ."""
    from farm.cli.transfer_bar import transfer_bar
    from farm.models.verify import locked_size
    from farm.models.verify import verify as verified

    conf = settings()
    catalog = catalog_of(conf)
    lanes = lanes_of(catalog, names or sorted({**catalog.models, **catalog.loras}))
    found = []
    with transfer_bar() as bar:
        for lane in lanes:
            weights = catalog.weights(lane)
            if size := locked_size(conf, lane, weights):
                bar.start(lane, size, 0)
            found.append(verified(conf, lane, weights, bar.advance))
    faults = [fault for each in found for fault in each.faults]
    if not names:  # what was never brought here cannot have changed here
        faults = [fault for fault in faults if fault.file]
    if as_json:
        files, size = sum(each.files for each in found), sum(each.size for each in found)
        told = [fault.as_dict() for fault in faults]
        print_json({"ok": not faults, "files": files, "bytes": size, "faults": told})
    else:
        _tell_faults(faults, sum(each.files for each in found))
    if faults:
        raise typer.Exit(1)


def _tell_faults(faults: list[Fault], files: int) -> None:
    if faults:
        rows = [(fault.model, fault.engine, fault.what, fault.file) for fault in faults]
        print_table(("model", "engine", "what", "file"), rows)
        hint("farm models fetch NAME locks what is not locked, and brings what is missing")
    note(f"{plural(files, 'file')} hashed, {len(faults)} not as the lock says")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    register_weights(models)
    register_entries(models)
    app.add_typer(
        models,
        name="models",
        epilog=examples("farm models", "farm models show shapes", "farm models fetch sdxl-base"),
        rich_help_panel="The farm",
    )
