"""The dataset's card: a README.md that the Hub and people read.

https://huggingface.co/docs/hub/datasets-cards. The library `datasets` reads all configurations of
a directory with the reader of the first, so the head has one, of the first format; the others are
loaded by their directories.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from farm.datasets.about import About, CardSection, ModelAbout
from farm.datasets.formats import first
from farm.datasets.formats.record import types
from farm.datasets.markup import block, code, one_line, plain, yaml
from farm.datasets.reading import reading
from farm.pictures import EXTENSIONS

__all__ = ["About", "CardSection", "ModelAbout", "card"]

# Of https://huggingface.co/docs/hub/repositories-licenses; any other is `other` there.
_HUB_LICENCES = """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 mit mpl-2.0 ms-pl odbl odc-by openrail openrail++ osl-3.0 pddl unlicense wtfpl zlib
"""
_PLACES = {
    "webdataset": "webdataset/*.tar",
    "parquet": "parquet/*.parquet",
    "imagefolder": "imagefolder/**",
}
_DTYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}
_MEANING = {
    "row": "the row's place in the dataset, from 0; gaps are rows that were not accepted",
    "model": "name of the model, see below",
    "engine": "the engine that the row asked for; empty for any",
    "width": "pixels",
    "height": "pixels",
    "guidance_scale": "classifier-free guidance",
    "seed": "with all else here, it makes the picture again",
    "scheduler": "name of the sampler; empty for the model's own",
    "format": "of the picture's file",
    "init_image": "the picture it began with, by its SHA-256; empty for none",
    "mask_image": "white was painted anew; empty for none",
    "strength": "how far from the init image, from 0 to 1; 1 without one",
    "loras": "NAME:WEIGHT,NAME:WEIGHT; empty for none",
    "clip_skip": "layers of the text encoder left out, counted from the last",
    "sha256": "of the picture's file",
}


def card(about: About) -> str:
    """The text of the README. What people wrote stands in it as text, whatever it holds."""
    section = about.section
    parts = [
        f"---\n{yaml(_head(about))}---\n",
        f"# {one_line(about.title)}\n",
        "All pictures of this dataset are machine-made: AI models rendered them from the prompts "
        "beside them. None is a photograph.\n",
        *([f"{plain(section.description)}\n"] if section.description else []),
        *([f"Home: <{section.homepage}>\n"] if section.homepage else []),
        *([f"By {one_line(', '.join(section.authors))}\n"] if section.authors else []),
        f"## What is in it\n\n{_contents(about)}",
        f"## How to load it\n\n{reading(about)}",
        f"## What a row tells\n\n{_columns(about)}",
        f"## How it was made\n\n{_models(about.models)}",
        f"## The AI mark\n\n{_mark(about)}",
        f"## Licence\n\n{_licence(section)}",
        *([f"## Citation\n\n{block(section.citation, 'bibtex')}"] if section.citation else []),
        *([f"## The recipe\n\n{block(about.recipe, 'toml')}"] if about.recipe else []),
    ]
    return "\n".join(parts)


def _head(about: About) -> dict[str, Any]:
    section, form = about.section, first(about.formats)
    licence = section.licence.lower()
    head: dict[str, Any] = {"license": licence if licence in _HUB_LICENCES.split() else "other"}
    if head["license"] == "other":
        head |= {"license_name": licence, "license_link": section.licence_url or "README.md"}
    if section.language:
        head["language"] = list(section.language)
    return head | {
        "pretty_name": about.title,
        "task_categories": ["text-to-image"],
        "size_categories": [_size_category(about.rows)],
        "annotations_creators": ["machine-generated"],
        "tags": list(dict.fromkeys(["synthetic", "ai-generated", "renderfarm", *section.tags])),
        **_configuration(form, about),
    }


def _configuration(form: str, about: About) -> dict[str, Any]:
    """With the types of all columns, which else are guessed from rows that may lack a value."""
    told = {
        "config_name": form,
        "data_files": [{"split": "train", "path": _PLACES[form]}],
        "default": True,
    }
    features = _features(form, about)
    if form == "imagefolder":  # its reader looks only here, the one of tars only there
        return {"configs": [{**told, "features": features}]}
    return {
        "configs": [told],
        "dataset_info": [{"config_name": form, "features": features}],
    }


def _features(form: str, about: About) -> list[dict[str, Any]]:
    told = [{"name": name, "dtype": _DTYPES[k]} for name, k in types(about.columns).items()]
    if form == "parquet":
        return [told[0], {"name": "image", "dtype": "image"}, *told[1:]]
    if form == "imagefolder":
        return [{"name": "image", "dtype": "image"}, *told]
    pictures = [{"name": EXTENSIONS[kind], "dtype": "image"} for kind in about.forms]
    texts = [{"name": name, "dtype": "string"} for name in ("txt", "__key__", "__url__")]
    return [*pictures, {"name": "json", "struct": told}, *texts]


def _size_category(rows: int) -> str:
    edges = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M")]
    below = "n<1K"
    for (edge, name), (_, upper) in zip(edges, [*edges[1:], (0, "100M")], strict=True):
        if rows >= edge:
            below = f"{name}<n<{upper}"
    return below


def _contents(about: About) -> str:
    sizes = ", ".join(f"{size} ({n:,})" for size, n in sorted(about.sizes.items()))
    counts = ", ".join(f"{n:,} {one_line(name)}" for name, n in about.counts.items() if n)
    lines = [
        f"- {_n(about.rows, 'picture')} with prompt and parameters, in {_n(about.shards, 'shard')}",
        *([f"- of all rows: {counts}"] if counts else []),
        *([f"- sizes in pixels: {sizes}"] if sizes else []),
    ]
    for form in about.formats:
        files, size = about.files.get(form, (0, 0))
        lines.append(f"- `{_PLACES[form]}`: {_n(files, 'file')}, {size:,} bytes")
    lines.append(
        "- `manifest.json`: every file with its SHA-256; `stats/`: one file a shard; "
        "`croissant.json`: [Croissant](https://docs.mlcommons.org/croissant/) metadata; "
        "`recipe.toml`: what it was made from"
    )
    return "\n".join(lines) + "\n"


def _columns(about: About) -> str:
    meaning = {**_MEANING, **dict.fromkeys(about.columns, "carried along from the prompts")}
    names = {name: _DTYPES[kind] for name, kind in types(about.columns).items()}
    rows = [f"| `{name}` | {kind} | {meaning.get(name, '')} |" for name, kind in names.items()]
    return "\n".join(["| key | type | |", "|---|---|---|", *rows]) + "\n"


def _models(models: Iterable[ModelAbout]) -> str:
    """Each with the terms of its licence, which bind whoever uses what it made."""
    lines = []
    for model in models:
        engines = f", rendered by {', '.join(model.engines)}" if model.engines else ""
        what = f": {one_line(model.description)}" if model.description else ""
        lines.append(f"- {code(model.name)}{engines}{what}")
        link = f" ({one_line(model.licence_url)})" if model.licence_url else ""
        lines.append(f"  - licence: {one_line(model.licence)}{link}")
        told = {"terms": model.terms, "attribution": model.attribution}
        lines += [f"  - {name}: {one_line(text)}" for name, text in told.items() if text]
    return "\n".join(lines) + "\n"


def _mark(about: About) -> str:
    signed = " Each is signed: its C2PA manifest says the same." if about.signed else ""
    return (
        "Every picture says inside its file that it was made by an AI model (XMP "
        "`Iptc4xmpExt:DigitalSourceType` = `trainedAlgorithmicMedia`), and with which parameters "
        f"(text `parameters`, as A1111 writes it).{signed} Please keep the mark in copies.\n"
    )


def _licence(section: CardSection) -> str:
    link = f" (<{section.licence_url}>)" if section.licence_url else ""
    return (
        f"The dataset: {plain(section.licence)}{link}. The licences of the models above may "
        "ask more of those who use the pictures.\n"
    )


def _n(n: int, one: str) -> str:
    return f"{n:,} {one}" if n == 1 else f"{n:,} {one}s"
