"""The `farm` command: a face on the Python API.

Standard output carries data alone (with --json: JSON alone); words and progress go to standard
error. Exit codes: 0; 1 jobs failed, or something is away; 2 bad usage or input; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from farm.cli import (
    admin,
    dataset,
    jobs,
    look,
    manage,
    models,
    owners,
    provenance,
    prune,
    results,
    run,
    schedule,
    serve,
    submit,
    upkeep,
)
from farm.cli.context import examples, options, use
from farm.cli.help import set_help
from farm.cli.output import clean, print_json, print_row_errors
from farm.errors import EnvironmentFault, FarmError, Invalid

app = typer.Typer(
    name="farm",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "farm up",
        'farm submit "a red circle on a blue background" -n 4 --out pictures',
        "farm submit --file prompts.jsonl --model shapes && farm watch latest",
        "farm status latest",
    ),
)
_ROOMS = (
    submit, dataset, schedule, look, jobs, results, manage, prune, upkeep, run, serve, models,
    owners, provenance, admin,
)  # fmt: skip
for room in _ROOMS:
    room.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"farm {version('renderfarm')}")
        raise typer.Exit


@app.callback()
def _globals(
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory of the embedded farm.", show_default=False),
    ] = None,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Say more; -vv for all.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """An asynchronous render farm for AI images: prompts in, pictures out.

    Settings come from options, FARM_* variables and farm.toml; `farm config show` lists them.
    """
    use(home, verbose, quiet)


set_help(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in (args[: args.index("--")] if "--" in args else args)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = app(args, prog_name="farm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        return _broken_pipe()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            return _broken_pipe()
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return _failed(error, as_json)
    return code if isinstance(code, int) else 0


def _broken_pipe() -> int:
    """The reader went away, as `head` does: no more output, not even at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return 141  # what a shell shows for SIGPIPE


def _failed(error: Exception, as_json: bool) -> int:
    """Say what went wrong in one sentence; the exit code."""
    code, message, exit_code = _verdict(error)
    if not message:  # help was shown instead
        return exit_code
    rows = getattr(error, "errors", []) if isinstance(error, FarmError) else []
    if as_json:
        told = [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in rows]
        print_json({"error": {"code": code, "message": message, "errors": told}})
    else:
        if rows:
            print_row_errors(rows)
        first, *more = [clean(line) for line in message.splitlines()] or [""]
        sys.stderr.write("\n".join([f"error: {first} ({code})", *more]) + "\n")
    if code == FarmError.code:
        if options.verbose:
            raise error
        if not as_json:
            sys.stderr.write("this is a fault of the farm; -v before the command shows more\n")
    return exit_code


def _verdict(error: Any) -> tuple[str, str, int]:
    """(stable code, sentence, exit code) of anything that a command raised."""
    if isinstance(error, FarmError):
        return error.code, error.message, 2 if isinstance(error, Invalid) else 1
    if isinstance(error, typer.Abort):
        return "ERR_INTERRUPTED", "interrupted", 130
    if hasattr(error, "format_message"):  # typer's own: wrong usage
        usage = error.format_message().strip().rstrip(".")
        if not usage:
            return "ERR_USAGE", "", 2
        where = getattr(getattr(error, "ctx", None), "command_path", "farm")
        return "ERR_USAGE", f"{usage}; see `{where} --help`", 2
    if isinstance(error, FileExistsError) and os.path.isfile(error.filename or ""):
        return Invalid.code, f"{error.filename} is a file, not a directory", 2
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return EnvironmentFault.code, f"{place}{error.strerror or error}", 1
    return FarmError.code, f"{type(error).__name__}: {error}", 1
