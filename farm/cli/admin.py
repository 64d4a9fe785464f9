"""Keeping the farm: `farm doctor`, `config`, `db`."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from farm.cli.context import Json, examples, options, settings
from farm.cli.output import (
    console,
    hint,
    note,
    print_json,
    print_line,
    print_table,
    short,
)

_PANEL = "The farm"
config = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
db = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)


def doctor(as_json: Json = False) -> None:
    """Check that all the farm needs is there, and say how to mend what is not.

    Exits with 1 if a check fails; warnings are no failure.
    """
    from farm.doctor import examine

    checks = examine(home=options.home)
    bad = [check for check in checks if check.verdict == "fail"]
    if as_json:
        print_json({"ok": not bad, "checks": [check.as_dict() for check in checks]})
    else:
        for check in checks:
            _show_check(check)
        warned = sum(check.verdict == "warn" for check in checks)
        note(f"{len(checks) - len(bad) - warned} ok, {warned} to look at, {len(bad)} failed")
    if bad:
        raise typer.Exit(1)


def _show_check(check: Any) -> None:
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.verdict]
    text = Text.assemble(
        (f"{check.verdict:<4}", colour), f"  {check.name}: {short(check.message, 1000)}"
    )
    console(sys.stdout).print(text, soft_wrap=True)
    if check.mend:
        console(sys.stdout).print(Text(f"      {short(check.mend, 1000)}", "dim"), soft_wrap=True)


@config.command("show", epilog=examples("farm config show", "farm config show --json"))
def show_config(as_json: Json = False) -> None:
    """Show every setting in force, its FARM_* name, and whether it was set; secrets redacted."""
    from farm.config import redact

    conf = settings()
    values = conf.shown()
    values["database_url"] = values["database_url"] or redact(conf.database)
    values["broker_url"] = values["broker_url"] or redact(conf.broker)
    values["blobs_url"] = values["blobs_url"] or redact(conf.blobs)
    values["models_file"] = values["models_file"] or (conf.catalog_path and str(conf.catalog_path))
    env = {name: f"FARM_{name.upper()}" for name in values}
    given = conf.model_fields_set
    if as_json:
        print_json(
            {
                name: {"value": value, "env": env[name], "set": name in given}
                for name, value in values.items()
            }
        )
        return
    rows = [
        (
            env[name],
            _as_toml(value),
            "set" if name in given else "default",
        )
        for name, value in values.items()
    ]
    print_table(("setting", "value", "from"), rows)
    hint("in farm.toml the names are lower case, without FARM_")


def _as_toml(value: Any) -> str | None:
    """Texts without their quotes."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


@config.callback()
def _config() -> None:
    """Look at the settings."""


@db.callback()
def _db() -> None:
    """Create, upgrade or look at the database's schema."""


@db.command("upgrade", epilog=examples("farm db upgrade"))
def upgrade(as_json: Json = False) -> None:
    """Create the schema, or bring it to this version's; run it before the workers start."""
    from farm.service import Farm
    from farm.store import schema

    with Farm(settings()) as farm:
        before = schema.current(farm.db)
        schema.upgrade(farm.db)
        after = schema.current(farm.db)
        if as_json:
            print_json({"before": before, "current": after})
        elif before == after:
            note(f"{farm.db.shown} is at {after} already")
        else:
            note(f"{farm.db.shown} is at {after} now (was: {before or 'empty'})")


@db.command("current", epilog=examples("farm db current"))
def current(as_json: Json = False) -> None:
    """Show the schema's revision; exits with 1 if this version cannot work with it."""
    from farm.service import Farm
    from farm.store import schema

    with Farm(settings()) as farm:
        found, head, fit = schema.current(farm.db), schema.head(), schema.fit(farm.db)
    if as_json:
        print_json({"current": found, "head": head})
    else:
        print_line(found or "empty")
    if fit is schema.Fit.NEWER:
        hint(f"it is newer than this version's, {head}, which works with it still")
    elif fit is schema.Fit.TOO_NEW:
        hint(f"this version knows {head}: install the version of the farm that upgraded it")
        raise typer.Exit(1)
    elif fit is not schema.Fit.CURRENT:
        hint(f"this version needs {head}: farm db upgrade")
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command(epilog=examples("farm doctor", "farm doctor --json"), rich_help_panel=_PANEL)(
        doctor
    )
    app.add_typer(
        config, name="config", epilog=examples("farm config show"), rich_help_panel=_PANEL
    )
    app.add_typer(
        db, name="db", epilog=examples("farm db upgrade", "farm db current"), rich_help_panel=_PANEL
    )
