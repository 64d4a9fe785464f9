"""`farm submit`: prompts into the queue, and with --wait out again as pictures."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.context import Json, examples, open_farm
from farm.cli.follow import download, follow, summary, tell_unserved
from farm.cli.output import hint, note, plural, print_json, print_line
from farm.cli.sources import Source, show_preview
from farm.units import parse_duration

if TYPE_CHECKING:
    from farm.service import Farm
    from farm.store.batches import BatchStatus

_JOB, _BATCH, _LISTS = "Of each picture", "Of the batch", "Templates"


class Form(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    TXT = "txt"
    PARQUET = "parquet"


class Pick(StrEnum):
    MATRIX = "matrix"
    ZIP = "zip"
    SAMPLE = "sample"


class Output(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"


def _job(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_JOB)


def submit(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to render.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", metavar="FILE", help="A prompt file; - is standard input."),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option("--format", help="Of the prompt file; default: by its ending, jsonl for -."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="FIELD=NAME",
            help="A field's name in the file, such as prompt=caption; others are left out then.",
        ),
    ] = None,
    lists: Annotated[
        list[str] | None,
        typer.Option(
            "--list",
            metavar="NAME=VALUES",
            rich_help_panel=_LISTS,
            help="PROMPT is a template: values for {NAME}, or of a field: a,b,c or 1..9 or @FILE.",
        ),
    ] = None,
    pick: Annotated[
        Pick,
        typer.Option(rich_help_panel=_LISTS, help="Every combination, side by side, or a sample."),
    ] = Pick.MATRIX,
    count: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_LISTS, help="Rows of --pick sample, drawn by --seed."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Queue nothing: the count, a sample, an estimate.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait until all is done; 1 if jobs failed.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Wait, then download the pictures into DIR."),
    ] = None,
    model: Annotated[
        str | None,
        _job("--model", "-m", help="Of `farm models`; default: the one with workers, or shapes."),
    ] = None,
    negative_prompt: Annotated[
        str | None, _job("--negative-prompt", help="What not to render.")
    ] = None,
    width: Annotated[int | None, _job("--width", help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, _job("--height", help="Pixels, a multiple of 8.")] = None,
    steps: Annotated[int | None, _job("--steps", help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, _job("--guidance-scale", help="How closely to follow the prompt.")
    ] = None,
    seed: Annotated[
        int | None, _job("--seed", help="The first picture's; default: drawn and recorded.")
    ] = None,
    scheduler: Annotated[
        str | None, _job("--scheduler", help="Such as euler_a, or its diffusers class name.")
    ] = None,
    engine: Annotated[
        str | None,
        _job("--engine", help="Only this one: diffusers or sdcpp; default: any that can."),
    ] = None,
    init_image: Annotated[
        str | None,
        _job(
            "--init-image",
            metavar="PICTURE",
            help="Begin with it, cut to the size: a file, blob:KEY, or job:BATCH/INDEX.",
        ),
    ] = None,
    mask_image: Annotated[
        str | None,
        _job("--mask-image", metavar="PICTURE", help="Paint anew only where this is white."),
    ] = None,
    strength: Annotated[
        float | None,
        _job("--strength", help="How far from the init image, 0 to 1; default 0.8."),
    ] = None,
    loras: Annotated[
        list[str] | None,
        _job("--lora", metavar="NAME[:WEIGHT]", help="Of the catalogue; can be repeated."),
    ] = None,
    clip_skip: Annotated[
        int | None, _job("--clip-skip", help="Layers of the CLIP text encoder to leave out.")
    ] = None,
    output_format: Annotated[
        Output | None, _job("--output-format", help="Of the pictures; default png.")
    ] = None,
    n: Annotated[
        int,
        typer.Option("-n", min=1, max=10_000, help="Pictures of each prompt, seeds counting up."),
    ] = 1,
    name: Annotated[str, typer.Option(rich_help_panel=_BATCH, help="A name to know it by.")] = "",
    owner: Annotated[str, typer.Option(rich_help_panel=_BATCH, help="Whose it is.")] = "",
    priority: Annotated[int, typer.Option(rich_help_panel=_BATCH, help="Larger goes first.")] = 0,
    eager: Annotated[
        bool,
        typer.Option(
            "--eager",
            rich_help_panel=_BATCH,
            help="Render while the rest is read; bad rows are told and left out.",
        ),
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(metavar="BATCH", rich_help_panel=_BATCH, help="Begin when that one is done."),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            rich_help_panel=_BATCH,
            help="Cancel what has not begun by then, such as 12h or 2d from now.",
        ),
    ] = None,
    no_reuse: Annotated[
        bool,
        typer.Option(
            "--no-reuse",
            rich_help_panel=_BATCH,
            help="Render also what was rendered before; else its picture is linked.",
        ),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            metavar="KEY",
            rich_help_panel=_BATCH,
            help="Submit once: run again, it goes on where it was interrupted, or does nothing.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Queue prompts; prints the id of the new batch.

    A prompt file has a prompt a line (txt), an object a line (jsonl), a first
    line of field names (csv, tsv), or is Parquet; texts may be gzipped. Input
    pictures are found from its directory. If any line is wrong, every fault is
    reported and nothing is queued.
    """
    params: dict[str, Any] = {
        "model": model,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "engine": engine,
        "init_image": init_image,
        "mask_image": mask_image,
        "strength": strength,
        "loras": ", ".join(loras) if loras else None,
        "clip_skip": clip_skip,
        "format": str(output_format) if output_format else None,
    }
    about: dict[str, Any] = {"n": n, "name": name, "owner": owner, "priority": priority}
    about |= {"reuse": not no_reuse, "expires_s": parse_duration(expires) if expires else None}
    source = Source(prompts or [], file, form and str(form), columns or [])
    if lists or count is not None:
        source.template(lists or [], str(pick), count, params)
    if out is not None and not dry_run:
        out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is said at once
    with open_farm() as farm:
        about["after"] = farm.find(after) if after else None
        if dry_run:
            show_preview(source.preview(farm, params | about), as_json)
            return
        status = source.submit(farm, params | about, eager=eager, key=key, as_json=as_json)
        _tell(farm, status, wait=wait or out is not None, out=out, as_json=as_json)


def _tell(farm: Farm, status: BatchStatus, *, wait: bool, out: Path | None, as_json: bool) -> None:
    if not as_json:
        print_line(status.id)
        sys.stdout.flush()
    note(f"queued {plural(status.total, 'job')} as batch {status.id}")
    tell_unserved(farm, list(status.by_model))
    if wait:
        _wait(farm, status.id, out, as_json)
        return
    hint(f"next: farm watch {status.id}, then farm results {status.id} --out DIR")
    if as_json:
        print_json(status.as_dict())


def _wait(farm: Farm, batch_id: str, out: Path | None, as_json: bool) -> None:
    try:
        status = follow(farm, [batch_id])[0]
    except KeyboardInterrupt:
        note(
            f"interrupted; the batch goes on: `farm watch {batch_id}` follows it, "
            f"`farm cancel {batch_id}` ends it"
        )
        raise
    result = status.as_dict()
    note(summary(status))
    if out is not None:
        fetched = download(farm, status, out)
        note(f"{plural(fetched, 'picture')} in {out}")
        result |= {"directory": str(out), "pictures": fetched}
    else:
        hint(f"next: farm results {batch_id} --out DIR")
    if as_json:
        print_json(result)
    if status.counts["failed"]:
        hint(f"why: farm status {batch_id}; again: farm retry {batch_id}")
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command(
        rich_help_panel="Pictures",
        epilog=examples(
            'farm submit "a red circle on a blue background"',
            'farm submit "a green star on a black background" -n 16 --seed 7 --out pictures',
            "farm submit --file prompts.jsonl --name nightly --priority 5 --wait",
            'farm submit "the cat in snow" --init-image cat.png --strength 0.5',
            'farm submit "a red hat" --init-image job:latest/0 --mask-image head.png',
            'farm submit "a castle" --model sd15 --lora pixelart:0.8 --clip-skip 1 --engine sdcpp',
            "cat prompts.txt | farm submit --file - --format txt --json",
            'farm submit "a {colour} {animal}" --list colour=red,blue --list animal=@animals.txt',
            'farm submit "a cat" --list steps=10,20,30 --list seed=1..100 --dry-run',
            "farm submit --file captions.parquet --column prompt=caption --idempotency-key night1",
        ),
    )(submit)
