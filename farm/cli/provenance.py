"""Who made a picture: `farm provenance init`, `show`, `verify`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.context import Json, examples, find_target, open_farm, settings
from farm.cli.output import clean, hint, note, plural, print_fields, print_json, print_line
from farm.errors import BlobDamaged, BlobNotFound, Invalid, InvalidParameter, NotFound

if TYPE_CHECKING:
    from farm.provenance import Mark
    from farm.service import Farm
    from farm.store.reads import Job

provenance = typer.Typer(rich_markup_mode="rich", no_args_is_help=True)
Pictures = Annotated[
    list[str],
    typer.Argument(
        metavar="PICTURE", help="A PNG, JPEG or WebP file, a job (BATCH/INDEX), or a batch."
    ),
]
Trust = Annotated[
    Path | None,
    typer.Option(
        "--trust", metavar="PEM", help="Certificates whose signers are trusted; else c2pa_trust."
    ),
]


@provenance.callback()
def _provenance() -> None:
    """Sign pictures, and see who made them.

    Every picture carries its parameters and the mark that a model made it. With
    c2pa_certificate and c2pa_key set, workers also sign it (C2PA), so that nobody
    can change either unnoticed.
    """


@provenance.command(
    epilog=examples(
        "farm provenance init --name 'Example Ltd'",
        "farm provenance init --dir /etc/farm/signer >> farm.toml",
    )
)
def init(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where to; default: provenance in home."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", metavar="ORG", help="The organisation that signs.")
    ] = "renderfarm",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Make a certificate to try signing with, and print the settings that use it.

    It comes from a test authority that nobody else trusts: others see that the
    picture is as it was signed, by somebody unknown. For one that they trust, get
    a certificate from an authority on the C2PA trust list (c2pa.org), and name
    the files of its chain and key as c2pa_certificate and c2pa_key.
    """
    from farm.provenance import make_authority

    place = (directory or settings().home / "provenance").absolute()
    made = make_authority(place, name, force=force)
    told = {
        "c2pa_certificate": str(made.certificate),
        "c2pa_key": str(made.key),
        "c2pa_trust": str(made.anchors),
    }
    if as_json:
        print_json(told)
    else:
        for setting, path in told.items():  # a JSON string is a TOML string
            print_line(f"{setting} = {json.dumps(path)}")
    note("this is a test authority: nobody but you trusts what it vouches for")
    hint("put these lines in farm.toml, or set FARM_C2PA_..., where workers run; start them again")


@provenance.command(
    epilog=examples(
        "farm provenance show picture.png",
        "farm provenance show latest/0 --json",
    )
)
def show(pictures: Pictures, trust: Trust = None, as_json: Json = False) -> None:
    """Show what pictures say of their origin: parameters, AI mark, signature."""
    from farm.provenance import read_mark

    anchors, told = _anchors(trust), []
    for n, (name, read) in enumerate(_each(pictures)):
        try:
            mark = read_mark(read(), anchors)
        except InvalidParameter as error:
            raise InvalidParameter(f"{name}: {error.message}") from None
        if as_json:
            told.append({"picture": name, **mark.as_dict(), "fault": mark.fault or None})
        else:
            if n:
                print_line("")
            _show(name, mark)
    if as_json:
        print_json(told)


def _show(name: str, mark: Mark) -> None:
    parameters = enumerate((mark.parameters or "").splitlines())
    print_fields(
        (
            ("picture", name),
            *(("" if n else "parameters", line) for n, line in parameters),
            ("source type", mark.source_type),
            ("C2PA", f"{mark.c2pa}: {mark.fault}" if mark.fault else mark.c2pa),
            ("codes", ", ".join(mark.codes)),
            ("signed source type", mark.signed_source_type),
            ("title", mark.title),
            ("signer", mark.signer),
            ("signed with", mark.claim_generator),
        )
    )


@provenance.command(
    epilog=examples(
        "farm provenance verify pictures/*.png --trust test-ca.pem",
        "farm provenance verify latest --json",
    )
)
def verify(pictures: Pictures, trust: Trust = None, as_json: Json = False) -> None:
    """Prove that pictures are as their signer left them, and that a model made them.

    With --trust, or c2pa_trust set, the signer must also be one of those whom these
    certificates vouch for. Exits with 1 unless all are.
    """
    anchors = _anchors(trust)
    told, wrong = [], 0
    for name, read in _each(pictures):
        state, signer, fault = _judge(read, anchors)
        told.append({"picture": name, "c2pa": state, "signer": signer, "fault": fault or None})
        wrong += bool(fault)
        if not as_json:
            what = fault or f"{state}, signed by {signer}"
            print_line(clean(f"{'wrong' if fault else 'ok':<5}  {name}  {what}"))
    if not told:
        raise Invalid("there is no picture yet")
    if as_json:
        print_json(told)
    if anchors is None and wrong < len(told):
        hint("whom the signer is was taken on trust: give --trust, or set c2pa_trust")
    if wrong:
        note(f"{wrong:,} of {plural(len(told), 'picture')} without a valid mark")
        raise typer.Exit(1)


def _judge(read: Callable[[], bytes], anchors: str | None) -> tuple[str, str | None, str]:
    """The state of a picture's signature, its signer, and what is wrong with it."""
    from farm.provenance import read_mark

    try:
        mark = read_mark(read(), anchors)
    except (InvalidParameter, BlobNotFound, BlobDamaged) as error:
        return "unreadable", None, error.message
    return mark.c2pa, mark.signer, mark.fault


def _anchors(trust: Path | None) -> str | None:
    from farm.provenance import read_anchors

    path = trust or settings().c2pa_trust
    return read_anchors(path) if path else None


def _each(names: list[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each picture's name, and what reads it. Raises NotFound for what names none."""
    from farm.inputs import read_file

    with ExitStack() as stack:
        farm: Farm | None = None
        for name in names:
            if os.path.isfile(name):  # Path's own raises for a name that is too long
                yield name, partial(read_file, Path(name))
                continue
            farm = farm or stack.enter_context(open_farm())
            for job in _jobs(farm, name):
                yield job.id, partial(farm.fetch, job)


def _jobs(farm: Farm, name: str) -> Iterator[Job]:
    try:
        target = find_target(farm, name)
    except NotFound as error:
        raise NotFound(f"there is no file {name[:200]!r}, and {error.message}") from None
    if isinstance(target, str):
        yield from farm.pictures(target)
        return
    job = farm.job(target)
    if not job.object_key:
        raise Invalid(f"{job.id} has no picture: it is {job.state}")
    yield job


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.add_typer(
        provenance,
        name="provenance",
        epilog=examples(
            "farm provenance init", "farm provenance show latest/0",
            "farm provenance verify picture.png",
        ),
        rich_help_panel="Pictures",
    )  # fmt: skip
