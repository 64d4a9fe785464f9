"""What `--help` shows, the same for every command."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from typer._click import Context

_BREAK = re.compile(r"(?<!\n)\n(?!\n)")


class _Command(TyperCommand):
    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """`NAME` and `NAME...` where typer has braces around what must be given."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"^\{(.*)\}(\.\.\.)?$", r"\1\2", piece) for piece in pieces]


def set_help(app: typer.Typer) -> None:
    """A paragraph of a docstring becomes one line, which typer wraps to the terminal."""
    for command in app.registered_commands:
        command.cls, command.help = _Command, _told_by(command.callback)
    if app.registered_callback:
        app.registered_callback.help = _told_by(app.registered_callback.callback)
    for group in app.registered_groups:
        if group.typer_instance:
            set_help(group.typer_instance)


def _told_by(function: object) -> str:
    return _BREAK.sub(" ", inspect.getdoc(function) or "")
