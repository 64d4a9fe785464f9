"""The HTTP API: `farm serve`, `farm token`."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from typing import Annotated

import typer

from farm.cli.context import Json, examples, log_service, open_farm
from farm.cli.output import hint, moment, note, print_json, print_line, print_table
from farm.errors import InvalidConfig

_PANEL = "The farm"
_DAY_S = 86_400
token = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)


class Scope(StrEnum):
    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
) -> None:
    """Serve the farm over HTTP until SIGTERM or Ctrl-C; /v1/openapi.json tells all it does.

    On 127.0.0.1 it asks for tokens once there are some (`farm token create`), on
    any other address always. Put a proxy with TLS before it: it speaks plain HTTP.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if not importlib.util.find_spec(name)]:
        raise InvalidConfig(f"{' and '.join(missing)} missing: pip install 'renderfarm[http]'")
    from farm.http.run import serve as run

    with open_farm() as farm:
        log_service(farm.settings, "http")
        run(farm, host, port, note)


@token.callback()
def _token() -> None:
    """Make, list and revoke the tokens of the HTTP API."""


@token.command(
    "create",
    epilog=examples(
        "farm token create laptop --scope read --scope submit --owner ada --days 90",
        "farm token create prometheus --scope read",
    ),
)
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    scopes: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="May be given several times. Default: read."),
    ] = None,
    owner: Annotated[
        str, typer.Option(help="Sees and submits this owner's batches alone; default: all.")
    ] = "",
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="Valid for so long; default: for ever.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it, this once: the farm keeps its SHA-256 only.

    read: look. submit: queue, and change the owner's batches. admin: both, and
    change every batch.
    """
    from farm.store import tokens

    with open_farm() as farm, farm.db.write() as connection:
        token_id, text = tokens.create(
            connection,
            name,
            tuple(scopes or [Scope.READ]),
            owner=owner,
            valid_s=None if days is None else days * _DAY_S,
        )
    if as_json:
        print_json({"id": token_id, "token": text})
        return
    print_line(text)
    hint(f"keep it, it is not shown again; undo: farm token revoke {token_id}")


@token.command("list", epilog=examples("farm token list", "farm token list --json"))
def list_tokens(as_json: Json = False) -> None:
    """Show the tokens, never their secrets."""
    from farm.store import tokens

    with open_farm() as farm, farm.db.read() as connection:
        found = tokens.known(connection)
    if as_json:
        print_json([one.as_dict() for one in found])
        return
    if not found:
        hint("no token yet; make one: farm token create NAME")
        return
    rows = [
        (
            one.id,
            one.name,
            " ".join(one.scopes),
            one.owner,
            moment(one.expires_at),
            moment(one.last_used_at),
            moment(one.revoked_at),
        )
        for one in found
    ]
    print_table(("token", "name", "scopes", "owner", "expires", "last used", "revoked"), rows)


@token.command("revoke", epilog=examples("farm token revoke 771be64c86f0"))
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, as `list` shows it.")],
    as_json: Json = False,
) -> None:
    """Let a token open nothing any more, from its next request on."""
    from farm.store import tokens

    with open_farm() as farm, farm.db.write() as connection:
        tokens.revoke(connection, token_id)
    if as_json:
        print_json({"id": token_id, "revoked": True})
        return
    note(f"token {token_id} is revoked")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command(
        rich_help_panel=_PANEL,
        epilog=examples("farm serve", "farm serve --host 0.0.0.0 --port 8000"),
    )(serve)
    app.add_typer(
        token, name="token", epilog=examples("farm token create laptop"), rich_help_panel=_PANEL
    )
