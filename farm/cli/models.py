"""The catalogue: `farm models`, list, show, fetch, verify, add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Json, examples, settings
from farm.cli.output import (
    hint,
    note,
    plural,
    print_fields,
    print_json,
    print_table,
)
from farm.cli.weights import catalog_of, lanes_of
from farm.cli.weights import register as register_weights

if TYPE_CHECKING:
    from farm.catalog import ModelEntry
    from farm.config import Settings
    from farm.models.verify import Fault

models = typer.Typer(rich_markup_mode="rich")


@models.callback(invoke_without_command=True)
def _models(ctx: typer.Context, as_json: Json = False) -> None:
    """Show the models that jobs may name, and bring their weights to this machine."""
    if ctx.invoked_subcommand is None:
        _list_models(as_json)


@models.command("list", epilog=examples("farm models list", "farm models list --json"))
def list_models(as_json: Json = False) -> None:
    """List the model catalogue, and whose weights are on this machine."""
    _list_models(as_json)


def _list_models(as_json: bool) -> None:
    conf = settings()
    catalog = catalog_of(conf)
    found = sorted(catalog.models.items())
    states = {name: _states(conf, name, entry) for name, entry in found}
    if as_json:
        print_json(
            [
                {"name": name, **entry.model_dump(mode="json"), "weights": states[name]}
                for name, entry in found
            ]
        )
        return
    rows = [
        (
            name,
            ", ".join(f"{engine} ({told['state']})" for engine, told in states[name].items()),
            f"{entry.defaults.width}x{entry.defaults.height}",
            entry.defaults.steps,
            entry.licence,
            entry.description,
        )
        for name, entry in found
    ]
    print_table(("model", "engines", "size", "steps", "licence", "description"), rows)


def _states(conf: Settings, name: str, entry: ModelEntry) -> dict[str, dict[str, str | None]]:
    """Engine -> whether its weights are here (fetched, local, missing, not fetched), and where."""
    from farm.catalog import Lane, local_path

    told: dict[str, dict[str, str | None]] = {}
    for engine, weights in entry.engines.items():
        path = weights.path or local_path(conf.models_path, Lane(name, engine), weights)
        if weights.path:
            state = "local" if weights.path.exists() else "missing"
        else:
            state = "fetched" if path else "not fetched"
        told[engine] = {"state": state, "path": str(path) if path else None}
    return told


@models.command("show", epilog=examples("farm models show shapes"))
def show_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")],
    as_json: Json = False,
) -> None:
    """Show one model: licence, defaults, limits, and where each engine finds its weights."""
    conf = settings()
    entry = catalog_of(conf).get(name)
    whole = {"name": name, **entry.model_dump(mode="json", exclude_none=True)}
    whole["weights"] = _states(conf, name, entry)
    if as_json:
        print_json(whole)
        return
    print_fields(_flat(whole))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    if not isinstance(value, dict):
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        return [(prefix, shown)]
    return [
        pair
        for key, item in value.items()
        for pair in _flat(item, f"{prefix}.{key}" if prefix else key)
    ]


@models.command("verify", epilog=examples("farm models verify", "farm models verify sdxl-base"))
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Default: all that are here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hash the weights on this machine against models.lock; exits with 1 if any differ."""
    from farm.cli.transfer_bar import transfer_bar
    from farm.models.verify import locked_size
    from farm.models.verify import verify as verified

    conf = settings()
    catalog = catalog_of(conf)
    lanes = lanes_of(catalog, names or sorted(catalog.models))
    found = []
    with transfer_bar() as bar:
        for lane in lanes:
            weights = catalog.weights(lane)
            bar.start(lane, locked_size(conf, lane, weights), 0)
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
    app.add_typer(
        models,
        name="models",
        epilog=examples("farm models", "farm models show shapes", "farm models fetch sdxl-base"),
        rich_help_panel="The farm",
    )
