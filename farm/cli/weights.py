"""`farm models fetch` and `add`: weights onto this machine, entries into models.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Json, examples, settings
from farm.cli.output import clean, hint, note, plural, print_json, print_line
from farm.errors import HubUnavailable, Invalid

if TYPE_CHECKING:
    from farm.catalog import Catalog, Lane, ModelEntry
    from farm.config import Settings
    from farm.models.add import NewModel
    from farm.models.lock import Locked

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Models of the catalogue.")]
Engine = Annotated[
    str | None, typer.Option("--engine", "-e", help="Only the weights for this engine.")
]
FREE = ("apache-2.0", "mit", "cc0-1.0", "cc0", "cc-by-4.0")  # asked for nothing before a fetch


def catalog_of(conf: Settings) -> Catalog:
    """The catalogue as it is written, wherever weights were fetched to."""
    from farm.catalog import load_catalog

    return load_catalog(conf.catalog_path)


def lanes_of(catalog: Catalog, names: list[str], engine: str | None = None) -> list[Lane]:
    """The lanes of the named models. Raises UnknownModel."""
    from farm.catalog import Lane

    lanes = []
    for name in dict.fromkeys(names):
        engines = [engine] if engine else list(catalog.get(name).engines)
        lanes += [Lane(name, each) for each in engines]
    for lane in lanes:
        catalog.weights(lane)
    return lanes


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
    """Bring models' weights to this machine, checked by SHA-256; goes on where it stopped.

    They land in FARM_MODELS_DIR, whole or not at all, and models.lock beside
    models.toml records them. HF_TOKEN opens gated models.
    """
    from farm.cli.transfer_bar import transfer_bar
    from farm.models.fetch import Fetcher, Order, lock_of

    conf = settings()
    catalog = catalog_of(conf)
    lanes = lanes_of(catalog, names, engine)
    order = Order(source, parse_rate(limit_rate), retries, update, _token())
    done = []
    lock_file = lock_of(conf)
    for name in dict.fromkeys(lane.model for lane in lanes):
        _agree(name, catalog.get(name), lock_file, accept_licence)
    for lane in lanes:
        with transfer_bar() as bar:
            found = Fetcher(conf, order, bar).fetch(lane, catalog.weights(lane))
        done.append(found.as_dict())
        if not as_json:
            print_line(clean(found.path))
        told = f"{plural(found.files, 'file')}, {found.size / 1e6:,.1f} MB"
        note(f"{lane.model} for {lane.engine}: {found.state}, {told}")
    if as_json:
        print_json({"fetched": done})


def _token() -> str:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise Invalid("HF_TOKEN holds characters that no token has")
    return token


def _agree(name: str, entry: ModelEntry, lock_file: Path, accept: bool) -> None:
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


def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name in the catalogue.")],
    engine: Annotated[str, typer.Option("--engine", "-e", help="Such as diffusers or sdcpp.")],
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="A repository of the model hub.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of it; default: main's commit now.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="A directory or file of this machine.")] = None,
    url: Annotated[str | None, typer.Option(help="One file at an http or https URL.")] = None,
    sha256: Annotated[str | None, typer.Option(help="SHA-256 of the url's file.")] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only such files of the repository, as *-q8_0.gguf."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Weights of a variant, such as fp16.")] = None,
    licence: Annotated[
        str, typer.Option(help="Its licence's id; default: what the hub tells.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Add a model to models.toml, and to models.lock what its files are.

    Sizes, steps and other defaults are yours to write into models.toml.
    """
    from farm.models.add import NewModel
    from farm.models.add import add as added

    if [repo, path, url].count(None) != 2:
        raise Invalid("give one of --repo, --path and --url")
    said = {
        "repo": repo,
        "revision": revision,
        "path": str(path.expanduser().absolute()) if path else None,
        "url": url,
        "sha256": sha256.lower() if sha256 else None,
        "files": files,
        "variant": variant,
    }
    new = NewModel(name, engine, {key: value for key, value in said.items() if value}, licence)
    new.checked()
    conf = settings()
    if name in catalog_of(conf).models:
        raise Invalid(f"there is a model {name} already; change it in {conf.catalog_path}")
    new, locked = _ask_hub(conf, new) if repo else (new, None)
    place = added(conf, new, locked)
    note(f"added {name} to {place}")
    if not path:
        hint(f"next: farm models fetch {name}")
    if as_json:
        print_json({"name": name, "file": str(place), "weights": new.weights})


def _ask_hub(conf: Settings, new: NewModel) -> tuple[NewModel, Locked | None]:
    """The entry pinned and its files; as it is, with a word, where the hub does not answer."""
    from farm.models.add import asked_of_hub

    try:
        return asked_of_hub(conf, new, _token(), retries=1)
    except HubUnavailable as error:
        note(f"{clean(error.message)}; added unpinned, a fetch finds out the rest")
        return new, None


def register(models: typer.Typer) -> None:
    """Put the commands on the group."""
    models.command(
        epilog=examples(
            "farm models fetch sdxl-base",
            "farm models fetch sdxl-base --limit-rate 5M --accept-licence",
            "farm models fetch sdxl-base --from /mnt/usb/models",
        )
    )(fetch)
    models.command(
        epilog=examples(
            "farm models add sd-turbo --repo stabilityai/sd-turbo -e diffusers --variant fp16",
            "farm models add mine --path /models/mine --engine diffusers --licence mit",
        )
    )(add)
