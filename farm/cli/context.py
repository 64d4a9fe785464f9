"""What the global options say, and the farm that they lead to. Heavy imports only when called."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from farm.config import Settings
    from farm.service import Farm
    from farm.store.ids import JobRef

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
BATCH_HELP = "A batch: its id, a unique beginning or end of it, or 'latest'."
Batch = Annotated[str, typer.Argument(metavar="BATCH", help=BATCH_HELP)]
Target = Annotated[
    str,
    typer.Argument(metavar="BATCH|JOB", help="A batch (an id or 'latest'), or a job: BATCH/INDEX."),
]


@dataclass
class Globals:
    """The options before the command."""

    home: Path | None = None
    verbose: int = 0
    quiet: bool = False


options = Globals()


def use(home: Path | None, verbose: int, quiet: bool) -> None:
    """Take over the global options of this run."""
    options.home, options.verbose, options.quiet = home, verbose, quiet
    set_logging("error" if quiet else ("warning", "info", "debug")[min(verbose, 2)])


def set_logging(level: str) -> None:
    """Log records from `level` on as short lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogLine())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("alembic").setLevel("WARNING")


def log_service(conf: Settings, role: str) -> None:
    """Log as a service does, unless -v or -q say how."""
    from farm import logs

    if not options.verbose and not options.quiet:
        logs.begin(conf.log_level, conf.log_format, role=role)


class _LogLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from farm.logs import escaped

        lines = super().format(record).splitlines()
        return f"{record.levelname.lower()}: " + "\n  ".join(map(escaped, lines))


def settings() -> Settings:
    """The settings in force."""
    from farm.config import load_settings

    return load_settings(home=options.home)


def open_farm() -> Farm:
    """The farm by the settings in force."""
    from farm.service import Farm

    return Farm.open(home=options.home)


def find_target(farm: Farm, text: str) -> str | JobRef:
    """The batch id, or the job, that `text` means. Raises NotFound."""
    from farm.store.ids import JobRef

    batch, slash, place = text.partition("/")
    if not slash:
        return farm.find(text)
    ref = JobRef.parse(f"{farm.find(batch)}/{place}")
    return farm.job(ref).ref


def examples(*lines: str) -> str:
    """The epilog of a command's help: what one would type."""
    shown = [f"[cyan]$ {line}[/cyan]" for line in (text.replace("[", "\\[") for text in lines)]
    return "\n\n".join(["[bold]Examples[/bold]", *shown])
