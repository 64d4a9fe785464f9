"""How much an owner may have at once: `farm owner list`, `set`, `unset`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Json, examples, open_farm
from farm.cli.output import hint, note, print_json, print_table, short
from farm.errors import Invalid

if TYPE_CHECKING:
    from farm.store.owners import OwnerStatus

owner = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
Name = Annotated[
    str,
    typer.Argument(
        metavar="OWNER", help="As in `farm submit --owner`; '*': all without their own."
    ),
]


@owner.callback()
def _owner() -> None:
    """Limit how many jobs an owner may have queued and running at once.

    Without limits owners share each model in proportion; a limit holds even when
    nobody else wants the workers.
    """


@owner.command("list", epilog=examples("farm owner list", "farm owner list --json"))
def show(as_json: Json = False) -> None:
    """Show the owners who have jobs under way or limits of their own."""
    from farm.store import owners

    with open_farm() as farm, farm.db.read() as connection:
        found = owners.listing(connection)
    if as_json:
        print_json([one.as_dict() for one in found])
    elif found:
        columns = ("owner", "queued", "running", "most queued", "most running")
        print_table(columns, [_row(one) for one in found])
    else:
        hint("no owner has jobs under way or a limit; set one: farm owner set NAME --max-running N")


def _row(one: OwnerStatus) -> tuple[str | int | None, ...]:
    name = short(one.owner, 30) or "(none)"
    return name, one.queued, one.running, one.max_queued, one.max_running


@owner.command(
    "set",
    epilog=examples(
        "farm owner set alice --max-queued 100000 --max-running 64",
        "farm owner set '*' --max-running 128",
    ),
)
def change(
    name: Name,
    max_queued: Annotated[
        int | None, typer.Option(min=0, help="A submit that would pass it is refused.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(min=0, help="Further jobs wait; 0 stops the owner.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set an owner's limits; one that is not given stays as it was."""
    from farm.store import owners

    if max_queued is None and max_running is None:
        raise Invalid("nothing to set; give --max-queued or --max-running")
    with open_farm() as farm, farm.db.write() as connection:
        limits = owners.limits_of(connection, name)
        if max_queued is not None:
            limits = replace(limits, max_queued=max_queued)
        if max_running is not None:
            limits = replace(limits, max_running=max_running)
        owners.set_limits(connection, name, limits)
    if as_json:
        print_json({"owner": name, **asdict(limits)})
        return
    told = [
        f"{'any number of' if most is None else format(most, ',')} jobs {what}"
        for most, what in ((limits.max_queued, "queued"), (limits.max_running, "running"))
    ]
    who = "every owner without limits of their own" if name == owners.ALL else short(name) or "''"
    note(f"{who} may have {' and '.join(told)}")


@owner.command("unset", epilog=examples("farm owner unset alice"))
def unset(name: Name, as_json: Json = False) -> None:
    """Take an owner's own limits away; those of '*' hold again, if there are any."""
    from farm.store import owners

    with open_farm() as farm, farm.db.write() as connection:
        owners.set_limits(connection, name, None)
        limits = owners.limits_of(connection, name)
    if as_json:
        print_json({"owner": name, **asdict(limits)})
        return
    note(f"{short(name) or repr('')} has no limits of their own")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.add_typer(
        owner,
        name="owner",
        epilog=examples("farm owner list", "farm owner set alice --max-running 64"),
        rich_help_panel="The farm",
    )
