"""`farm models add` and `convert`: new entries of models.toml."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Json, examples, settings
from farm.cli.output import clean, hint, note, print_json
from farm.cli.weights import hub_token
from farm.errors import HubUnavailable, Invalid
from farm.units import show_size

if TYPE_CHECKING:
    from farm.config import Settings
    from farm.models.add import NewEntry
    from farm.models.lock import Locked

Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name in the catalogue.")]


def add(
    name: Name,
    engine: Annotated[
        str | None, typer.Option("--engine", "-e", help="Of a model: diffusers or sdcpp.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="It is a LoRA, no model.")] = False,
    fits: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="MODEL", help="A model that the LoRA fits; may be repeated."),
    ] = None,
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
    family: Annotated[
        str | None,
        typer.Option(help="Such as sd1, sdxl or flux2-klein; default: what the pipeline tells."),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(metavar="GB", help="What it needs of the device's memory.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Its licence's id; default: what the hub tells.")
    ] = None,
    licence_url: Annotated[str | None, typer.Option(help="Where its licence can be read.")] = None,
    terms: Annotated[str | None, typer.Option(help="What it asks of users, in a sentence.")] = None,
    attribution: Annotated[str | None, typer.Option(help="Whom to name as its makers.")] = None,
    description: Annotated[str | None, typer.Option(help="What it is, in a few words.")] = None,
    as_json: Json = False,
) -> None:
    """Add a model or a LoRA to models.toml, and to models.lock what its files are.

    A model of a known family gets the family's size, steps and guidance as
    defaults; change them, or set limits, in models.toml. For a model that is
    there already, the weights for another engine are added to it.
    """
    from farm.catalog import LORA, load_catalog
    from farm.models.add import NewEntry
    from farm.models.add import add as added
    from farm.models.entry import extends

    if [repo, path, url].count(None) != 2:
        raise Invalid("give one of --repo, --path and --url")
    _check_kind(engine, lora, fits, {"--family": family, "--memory-gb": memory_gb})
    weights = _given(
        repo=repo,
        revision=revision,
        path=str(path.expanduser().absolute()) if path else None,
        url=url,
        sha256=sha256.lower() if sha256 else None,
        files=files,
        variant=variant,
    )
    about = _given(
        licence=licence,
        licence_url=licence_url,
        terms=terms,
        description=description,
        attribution=attribution,
        family=family,
        memory_gb=memory_gb,
        models=list(dict.fromkeys(fits)) if fits else None,
    )
    new = NewEntry(name, engine or LORA, weights, about)
    new.checked()
    conf = settings()
    for model in fits or ():
        load_catalog(conf.catalog_path).get(model)
    more = extends(conf, name, [] if lora else [new.engine])
    if more and about:
        raise Invalid(f"{', '.join(about)}: of {name} that stands in models.toml; change it there")
    new, locked = _ask_hub(conf, new) if repo else (new, None)
    place, new = added(conf, new, locked)
    _tell_added(new, place, more)
    if as_json:
        print_json({"name": name, "file": str(place), **new.table, "weights": new.weights})


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def _check_kind(
    engine: str | None, lora: bool, fits: list[str] | None, of_models: dict[str, object]
) -> None:
    """Raises Invalid when the options belong to a model and to a LoRA, or to neither."""
    if lora != bool(fits):
        raise Invalid("a LoRA is added with --lora and, for each model it fits, --for MODEL")
    if lora and engine:
        raise Invalid("a LoRA has no engine: all engines of its models load it; leave out --engine")
    if not lora and not engine:
        raise Invalid("give --engine, diffusers or sdcpp; or, for a LoRA, --lora --for MODEL")
    if wrong := [name for name, value in of_models.items() if lora and value]:
        raise Invalid(f"a LoRA has no {', '.join(wrong)}")


def _tell_added(new: NewEntry, place: Path, more: bool) -> None:
    """`more`: the model was there, and got weights for one more engine."""
    note(f"added {f'weights for {new.engine}, of ' if more else ''}{new.name}, to {place}")
    told = new.about.get("defaults")
    if told and not more:
        size = f"{told['width']}x{told['height']}, {told['steps']} steps"
        note(f"defaults of {new.about['family']}: {size}, guidance {told['guidance_scale']:g}")
    if "path" not in new.weights:
        hint(f"next: farm models fetch {new.name}")


def _ask_hub(conf: Settings, new: NewEntry) -> tuple[NewEntry, Locked | None]:
    """The entry pinned and its files; as it is, with a word, where the hub does not answer."""
    from farm.models.add import asked_of_hub

    try:
        return asked_of_hub(conf, new, hub_token(), retries=1)
    except HubUnavailable as error:
        note(f"{clean(error.message)}; added unpinned, a fetch finds out the rest")
        return new, None


def convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of the catalogue.")],
    wtype: Annotated[
        str, typer.Option("--type", "-t", metavar="TYPE", help="Such as q8_0, q5_1, q4_k or f16.")
    ],
    new: Annotated[
        str | None,
        typer.Option("--name", metavar="NEW", help="The new model; default: NAME-TYPE."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processors to use; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a smaller copy of a model for sdcpp: a GGUF file with weights of another type.

    The copy is a model of its own, with the licence, defaults and limits of
    NAME. It is made once, where a worker's option wtype would pay for it at
    each start. NAME must be a checkpoint of one file or a model in parts,
    .safetensors or .gguf; of parts, VAE and CLIP stay as they are. It takes as
    much memory as the copy has bytes.
    """
    from farm.models.convert import convert as converted

    def begins(*files: Path) -> None:
        for file in files:
            note(f"reads {clean(file)}, {show_size(file.stat().st_size)}")
        note(f"converting to {wtype}; large models take minutes")

    made = converted(settings(), name, wtype, new=new, threads=threads, begins=begins)
    if as_json:
        print_json(made.as_dict())
    before, after = map(show_size, (made.before, made.after))
    note(f"{made.name}: {before} became {after} in {made.seconds:g} s, {clean(made.path)}")
    hint(f"next: farm worker --model {made.name} --engine sdcpp")


def register(models: typer.Typer) -> None:
    """Put the commands on the group."""
    models.command(
        epilog=examples(
            "farm models add sd-turbo -e diffusers --repo stabilityai/sd-turbo",
            "farm models add mine -e sdcpp --path mine.gguf --family sdxl",
            "farm models add felt --lora --for sdxl-base --path felt.safetensors",
        )
    )(add)
    models.command(
        epilog=examples(
            "farm models convert sdxl-base --type q8_0",
            "farm models convert sdxl-base --type q4_k --name sdxl-small",
        )
    )(convert)
