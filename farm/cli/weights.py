"""`farm models fetch`: weights onto this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Json, examples, settings
from farm.cli.output import clean, note, plural, print_json, print_line
from farm.errors import Invalid
from farm.units import show_size

if TYPE_CHECKING:
    from farm.catalog import Catalog, Lane, LoraEntry, ModelEntry
    from farm.config import Settings

Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help="Models and LoRAs of the catalogue.")
]
Engine = Annotated[
    str | None, typer.Option("--engine", "-e", help="Only the weights for this engine.")
]
FREE = ("apache-2.0", "mit", "cc0-1.0", "cc0", "cc-by-4.0")  # asked for nothing before a fetch


def catalog_of(conf: Settings) -> Catalog:
    """The catalogue as it is written, wherever weights were fetched to."""
    from farm.catalog import load_catalog

    return load_catalog(conf.catalog_path)


def lanes_of(catalog: Catalog, names: list[str], engine: str | None = None) -> list[Lane]:
    """The lanes of the named models, and Lane(NAME, LORA) for LoRAs. Raises UnknownModel."""
    from farm.catalog import LORA, Lane, LoraEntry

    lanes = []
    for name in dict.fromkeys(names):
        entry = catalog.entry(name)
        if isinstance(entry, LoraEntry):
            lanes.append(Lane(name, LORA))
            continue
        engines = [engine] if engine else list(entry.engines)
        lanes += [Lane(name, each) for each in engines]
    for lane in lanes:
        catalog.weights(lane)
    return lanes


def lane_title(lane: Lane) -> str:
    """`NAME (ENGINE)`; for a LoRA `NAME (LoRA)`."""
    from farm.catalog import LORA

    return f"{lane.model} ({'LoRA' if lane.engine == LORA else lane.engine})"


def parse_rate(text: str | None) -> float | None:
    """Bytes a second from `500K`, `5M`, `1.5G`; K, M and G are powers of 1,024, as curl's."""
    if text is None:
        return None
    number, unit = text.strip(), 1.0
    for place, letter in enumerate("KMG", start=1):
        if number.upper().endswith(letter):
            number, unit = number[:-1], 1024.0**place
    try:
        rate = float(number) * unit
    except ValueError:
        rate = 0.0
    if not 1024 <= rate < 2**50:
        raise Invalid(f"--limit-rate {text[:40]!r}: such as 500K, 5M or 1G; at least 1K")
    return rate


def fetch(
    names: Names,
    engine: Engine = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="DIR|URL", help="A directory or mirror that has the files."),
    ] = None,
    limit_rate: Annotated[
        str | None, typer.Option(metavar="RATE", help="Bytes a second at most: 500K, 5M, 1G.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, max=100, help="Attempts after a failure, ever slower.")
    ] = 5,
    update: Annotated[
        bool, typer.Option("--update", help="Take what is there now, whatever the lock says.")
    ] = False,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Yes to the terms that are shown.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring weights to this machine, checked by SHA-256; goes on where it stopped.

    They land in FARM_MODELS_DIR, whole or not at all, and models.lock beside
    models.toml records them. HF_TOKEN opens gated models.
    """
    from farm.cli.transfer_bar import transfer_bar
    from farm.models.fetch import Fetcher, Order, lock_of

    conf = settings()
    catalog = catalog_of(conf)
    lanes = lanes_of(catalog, names, engine)
    order = Order(source, parse_rate(limit_rate), retries, update, hub_token())
    done = []
    lock_file = lock_of(conf)
    for name in dict.fromkeys(lane.model for lane in lanes):
        _agree(name, catalog.entry(name), lock_file, accept_licence)
    for lane in lanes:
        with transfer_bar() as bar:
            found = Fetcher(conf, order, bar).fetch(lane, catalog.weights(lane))
        done.append(found.as_dict())
        if not as_json:
            print_line(clean(found.path))
        told = f"{plural(found.files, 'file')}, {show_size(found.size)}"
        note(f"{lane_title(lane)}: {found.state}, {told}")
    if as_json:
        print_json({"fetched": done})


def hub_token() -> str:
    """HF_TOKEN, or nothing. Raises Invalid for one that cannot be sent."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise Invalid("HF_TOKEN holds characters that no token has")
    return token


def _agree(name: str, entry: ModelEntry | LoraEntry, lock_file: Path, accept: bool) -> None:
    """Show the licence; have its terms accepted once, unless it asks for nothing before use."""
    from farm.models.lock import put_accepted, read_lock

    parts = (f"licence {entry.licence}", entry.licence_url, entry.terms, entry.attribution)
    note(clean(f"{name}: {'; '.join(filter(None, parts))}"))
    if entry.licence.lower() in FREE:
        return
    model = read_lock(lock_file).models.get(name)
    if model and model.accepted == entry.licence:
        return
    if not accept:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise Invalid(
                f"the licence of {name}, {clean(entry.licence)}, has terms: read them, then say "
                "--accept-licence"
            )
        typer.confirm(f"Do you accept the terms of {clean(entry.licence)}?", abort=True, err=True)
    put_accepted(lock_file, name, entry.licence)


def register(models: typer.Typer) -> None:
    """Put the commands on the group."""
    models.command(
        epilog=examples(
            "farm models fetch sdxl-base",
            "farm models fetch sdxl-base --limit-rate 5M --accept-licence",
            "farm models fetch pixel-art",
            "farm models fetch sdxl-base --from /mnt/usb/models",
        )
    )(fetch)
