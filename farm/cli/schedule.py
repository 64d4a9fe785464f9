"""Recipes that are run again and again: `farm schedule`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Json, examples, open_farm
from farm.cli.output import (
    Cell,
    duration,
    hint,
    note,
    print_fields,
    print_json,
    print_line,
    print_table,
    short,
)

if TYPE_CHECKING:
    from farm.service import Farm
    from farm.store.schedules import Run, Schedule

_COMING = 5  # due times that `show` tells
schedule = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A schedule, as `list` shows it.")]


@schedule.callback()
def _schedule() -> None:
    """Have datasets made every night: recipes, when they are due, and what became of it.

    The dispatcher (`farm up`, `farm dispatcher`) runs what is due, each due time
    once, however many dispatchers there are; the recipe must be a file that it can
    read. It is read anew each time.
    """


@schedule.command(
    epilog=examples(
        'farm schedule add nightly.toml --cron "0 2 * * *" --tz Europe/Madrid --until 07:00',
        'farm schedule add weekly.toml --cron "30 1 * * SUN" --catch-up --name weekly',
    )
)
def add(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Its TOML file.")],
    cron: Annotated[
        str, typer.Option(help="Minute, hour, day of month, month and day of week it is due.")
    ],
    tz: Annotated[
        str | None,
        typer.Option(metavar="ZONE", help="Such as Europe/Madrid. Default: this machine's."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="HH:MM", help="Pauses what is left then; it goes on when next due."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Default: the recipe's.")] = None,
    catch_up: Annotated[
        bool, typer.Option("--catch-up", help="Make up for a due time when the farm was down.")
    ] = False,
    priority: Annotated[
        int | None,
        typer.Option(
            help="Instead of the recipe's; larger goes first, a submit has 0.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe whenever it is due, below all that people submit.

    Clocks that change: a time of day that the spring skips is due right after, one
    that the autumn has twice is due once.
    """
    from farm.datasets.recipe import load_recipe
    from farm.schedules import policy
    from farm.schedules.times import local_zone
    from farm.store.schedules import Terms
    from farm.store.tables import clock

    path = recipe.absolute()
    found = load_recipe(path)
    found.digest("")  # its files are there
    terms = Terms(
        name or found.name,
        str(path),
        cron,
        tz or local_zone(),
        until=until,
        priority=priority,
        catch_up=catch_up,
        owner=found.owner,
    )
    with open_farm() as farm:
        with farm.db.write() as connection:
            made = policy.add(connection, terms, clock(connection))
        _tell_idle(farm)
    if as_json:
        _print(made)
        return
    print_line(made.name)
    note(f"next due: {_when(made, made.next_due)}")
    if not found.fresh:
        hint(
            "each run renders what is new in the recipe; for new pictures every time: fresh = true "
            'and {label} in out, such as out = "sets/{label}"'
        )
    hint(f"see it: farm schedule show {made.name}; now: farm schedule run {made.name}")


def _tell_idle(farm: Farm) -> None:
    """Say so if nobody would begin a run."""
    from farm.store import leases

    with farm.db.read() as connection:
        if not leases.is_held(connection, leases.DISPATCHER):
            hint("no dispatcher runs, so nothing is begun; start one: farm up, or farm dispatcher")


@schedule.command("list", epilog=examples("farm schedule list", "farm schedule list --json"))
def list_schedules(as_json: Json = False) -> None:
    """Show the schedules, when each is due next, and what it does now."""
    from farm.store import schedules as store

    with open_farm() as farm:
        with farm.db.read() as connection:
            found = store.listing(connection)
            runs = store.open_runs(connection)
        if found:
            _tell_idle(farm)
    under_way = {one.id: [run for run in runs if run.schedule_id == one.id] for one in found}
    if as_json:
        print_json([one.as_dict() | {"now": _now(one, under_way[one.id])} for one in found])
    elif found:
        columns = ("name", "now", "next due", "cron", "until", "recipe")
        rows = [_row(one, _now(one, under_way[one.id])) for one in found]
        print_table(columns, rows)
    else:
        hint('no schedule yet; make one: farm schedule add RECIPE --cron "0 2 * * *"')


def _now(one: Schedule, runs: list[Run]) -> str:
    """The state of what is under way, else `paused` or `idle`."""
    states = [run.state for run in runs if run.begun] or [run.state for run in runs]
    return states[0] if states else "paused" if one.paused else "idle"


def _row(one: Schedule, now: str) -> tuple[Cell, ...]:
    following = "paused" if one.paused else _when(one, one.next_due)
    return one.name, now, following, one.cron, one.until, short(one.recipe, 50)


def _when(one: Schedule, at: float) -> str:
    from farm.schedules.times import shown

    return shown(at, one.tz)


@schedule.command(
    epilog=examples("farm schedule show nightly", "farm schedule show nightly --json")
)
def show(name: Name, as_json: Json = False) -> None:
    """Show a schedule, its next due times, and its last run."""
    from farm.schedules.times import coming
    from farm.store import schedules as store
    from farm.store.tables import clock

    with open_farm() as farm:
        with farm.db.read() as connection:
            one = store.find(connection, name)
            runs = store.open_runs(connection, one.id)
            last = store.history(connection, one.id, 1)
            at = clock(connection)
        _tell_idle(farm)
    due = [] if one.paused else coming(one.cron, one.tz, max(at, one.next_due - 1), _COMING)
    if as_json:
        told = {"now": _now(one, runs), "coming": due}
        print_json(one.as_dict() | told | {"last": last[0].as_dict() if last else None})
        return
    print_fields(
        [
            ("name", one.name), ("recipe", one.recipe), ("owner", one.owner),
            ("cron", f"{one.cron} ({one.tz})"), ("until", one.until),
            ("priority", "the recipe's" if one.priority is None else one.priority),
            ("catches up", "yes" if one.catch_up else "no"),
            ("now", _now(one, runs)),
            *(("next due" if at == due[0] else "", _when(one, at)) for at in due),
        ]
    )  # fmt: skip
    if last:
        hint(f"last run: {last[0].state}; all of them: farm schedule history {one.name}")


@schedule.command(epilog=examples("farm schedule pause nightly"))
def pause(name: Name, as_json: Json = False) -> None:
    """Begin no more runs that are due; what is under way is finished."""
    from farm.schedules import policy

    _change(name, policy.pause, as_json, "is paused; go on: farm schedule resume {name}")


@schedule.command(epilog=examples("farm schedule resume nightly"))
def resume(name: Name, as_json: Json = False) -> None:
    """Go on with the next due time; those of the pause are not made up for."""
    from farm.schedules import policy

    _change(name, policy.resume, as_json, "goes on; next due: {next_due}")


@schedule.command(epilog=examples("farm schedule run nightly"))
def run(name: Name, as_json: Json = False) -> None:
    """Run a schedule now, whatever the time; a run that waits for its window goes on.

    The dispatcher that leads begins it within a second or two.
    """
    from farm.schedules import policy

    told = "is asked for a run; see: farm schedule history {name}"
    _change(name, policy.ask, as_json, told)


@schedule.command(epilog=examples("farm schedule remove nightly"))
def remove(name: Name, as_json: Json = False) -> None:
    """Remove a schedule with its history; a run under way is stopped, its batch is not."""
    from farm.store import schedules as store

    with open_farm() as farm, farm.db.write() as connection:
        one = store.find(connection, name)
        waiting = [run for run in store.open_runs(connection, one.id) if run.state == "waiting"]
        store.remove(connection, one.id)
    if as_json:
        _print(one)
        return
    note(f"{one.name} is removed; its datasets are where they were")
    for run in waiting:
        hint(f"its batch {run.batch_id} stays paused; farm resume or farm cancel {run.batch_id}")


@schedule.command(
    epilog=examples("farm schedule history nightly", "farm schedule history nightly -n 90 --json")
)
def history(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest N runs.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what became of each due time, the newest first, and why."""
    from farm.schedules.times import label
    from farm.store import schedules as store

    with open_farm() as farm, farm.db.read() as connection:
        one = store.find(connection, name)
        found = store.history(connection, one.id, limit)
    if as_json:
        print_json([run.as_dict() | {"label": label(run.due_at, one.tz)} for run in found])
        return
    columns = ("label", "kind", "state", "took", "batch", "why")
    print_table(columns, [_past(run, label(run.due_at, one.tz)) for run in found])


def _past(run: Run, name: str) -> tuple[Cell, ...]:
    took = None
    if run.started_at and run.finished_at:
        took = duration(run.finished_at - run.started_at)
    return name, run.kind, run.state, took, run.batch_id, short(" ".join(run.why.split()), 80)


def _change(name: str, change: Any, as_json: bool, told: str) -> None:
    """Do `change` to a schedule, and say what it is then."""
    from farm.store import schedules as store
    from farm.store.tables import clock

    with open_farm() as farm:
        with farm.db.write() as connection:
            change(connection, store.find(connection, name), clock(connection))
            one = store.find(connection, name)
        if not one.paused:
            _tell_idle(farm)
    if as_json:
        _print(one)
    else:
        due = _when(one, one.next_due)
        note(f"{one.name} {told.format(name=one.name, next_due=due)}")


def _print(one: Schedule) -> None:
    print_json(one.as_dict())


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.add_typer(
        schedule,
        name="schedule",
        epilog=examples(
            'farm schedule add nightly.toml --cron "0 2 * * *" --until 07:00',
            "farm schedule history nightly",
        ),
        rich_help_panel="Pictures",
    )
