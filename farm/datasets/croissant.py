"""Croissant metadata: the dataset for machines, by its files, tables and fields.

https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html; `mlcroissant` reads the rows of
each format by it. (It keeps unpacked tars in CROISSANT_CACHE by their path within the dataset, so
two datasets need two of those.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from farm.datasets.about import About, CardSection
from farm.datasets.formats.record import types
from farm.pictures import CONTENT_TYPES, EXTENSIONS

Node = dict[str, Any]
_Told = tuple[list[Node], list[Node]]  # of one format: sets of files, sets of records
_OWN = (
    "arrayShape citeAs column containedIn equivalentProperty extract field fileObject fileProperty "
    "fileSet format includes isArray isLiveDataset jsonPath key md5 parentField path recordSet "
    "references regex repeated replace samplingRate separator source subField transform"
)
CONTEXT: Node = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    **{name: f"cr:{name}" for name in _OWN.split()},
}
_TYPES = {str: "sc:Text", int: "cr:Int64", float: "cr:Float64", bool: "sc:Boolean"}
_ENCODINGS = {
    ".tar": "application/x-tar",
    ".parquet": "application/x-parquet",
    ".jsonl": "application/jsonlines",
}


class FileAbout(NamedTuple):
    """A file of the dataset: its key, its SHA-256, its size in bytes."""

    key: str
    sha256: str
    size: int


def croissant(about: About, files: Iterable[FileAbout]) -> Node:
    """The JSON-LD of croissant.json, which lies in the dataset's root.

    Of an image folder the pictures are told as sets of files; the manifest has each one.
    """
    known = [file for file in files if _encoding(file.key)]
    sets: list[Node] = []
    records: list[Node] = []
    for form in about.formats:
        made = _FORMS[form](about, [file.key for file in known if file.key.startswith(f"{form}/")])
        sets += made[0]
        records += made[1]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        **_told(about),
        "distribution": [*map(_file_object, known), *sets],
        "recordSet": records,
    }


def _told(about: About) -> Node:
    section = about.section
    words = section.description or f"Pictures that AI models rendered, for {about.title}."
    used = ", ".join(f"{model.name} ({model.licence})" for model in about.models)
    told = {
        "name": about.name,
        "alternateName": section.title,
        "description": words,
        "license": _licence(section),
        "url": section.homepage,
        "version": about.version,
        "datePublished": about.published,
        "creator": [{"@type": "sc:Person", "name": name} for name in section.authors],
        "keywords": ["synthetic", "ai-generated", *section.tags],
        "inLanguage": list(section.language),
        "citeAs": section.citation or citation(about),
        "rai:dataCollection": f"All pictures are machine-made, by AI models: {used}.",
        "rai:dataCollectionType": "Machine-generated",
    }
    return {key: value for key, value in told.items() if value}


def _licence(section: CardSection) -> str | Node:
    """Its address, or a work of that name where none is known."""
    if section.licence_url:
        return section.licence_url
    if section.spdx:
        return f"https://spdx.org/licenses/{section.spdx}.html"
    return {"@type": "sc:CreativeWork", "name": section.licence}


def citation(about: About) -> str:
    """BibTeX made of what is known, for a section that has none."""
    told = {
        "title": about.title,
        "author": " and ".join(about.section.authors),
        "year": about.published[:4],
        "url": about.section.homepage,
    }
    clean = {key: value.translate(_NO_BRACES) for key, value in told.items() if value}
    return "\n".join(
        [f"@misc{{{about.name},", *(f"  {key} = {{{text}}}," for key, text in clean.items()), "}"]
    )


_NO_BRACES = str.maketrans({"{": "(", "}": ")", "\\": "/"})


def _encoding(key: str) -> str:
    return next((kind for end, kind in _ENCODINGS.items() if key.endswith(end)), "")


def _file_object(file: FileAbout) -> Node:
    return {
        "@type": "cr:FileObject",
        "@id": file.key,
        "name": file.key,
        "contentUrl": file.key,
        "contentSize": f"{file.size} B",
        "encodingFormat": _encoding(file.key),
        "sha256": file.sha256,
    }


def _file_set(name: str, includes: Sequence[str], encodings: Sequence[str], **more: Any) -> Node:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": list(encodings),
        "includes": list(includes),
        **more,
    }


def _field(form: str, name: str, kind: str, files: str, extract: Node, **more: Any) -> Node:
    source = {"fileSet": {"@id": files}, "extract": extract}
    if "transform" in more:
        source["transform"] = more.pop("transform")
    return {
        "@type": "cr:Field",
        "@id": f"{form}/{name}",
        "name": name,
        "dataType": kind,
        "source": source,
        **more,
    }


def _record_set(form: str, fields: Sequence[Node]) -> Node:
    return {
        "@type": "cr:RecordSet",
        "@id": form,
        "name": form,
        "key": {"@id": f"{form}/row"},
        "field": list(fields),
    }


def _columns(about: About, form: str, files: str) -> list[Node]:
    """The fields of a record, from columns of the same names."""
    return [
        _field(form, name, _TYPES[kind], files, {"column": name})
        for name, kind in types(about.columns).items()
    ]


def _parquet(about: About, keys: Sequence[str]) -> _Told:
    files = "parquet-files"
    image = _field(
        "parquet", "image", "sc:ImageObject", files, {"column": "image"},
        transform={"jsonPath": "bytes"},
    )  # fmt: skip
    sets = [_file_set(files, ["parquet/*.parquet"], [_ENCODINGS[".parquet"]])]
    return sets, [_record_set("parquet", [image, *_columns(about, "parquet", files)])]


def _webdataset(about: About, keys: Sequence[str]) -> _Told:
    """Pictures and prompts apart: `mlcroissant` joins no members of tars, nor reads their JSON."""
    within = {"containedIn": [{"@id": key} for key in keys]}
    endings, encodings = _pictures(about)
    pictures, texts = "webdataset-pictures", "webdataset-texts"
    sets = [
        _file_set(pictures, [f"*.{end}" for end in endings], encodings, **within),
        _file_set(texts, ["*.txt"], ["text/plain"], **within),
    ]
    return sets, [
        _members("webdataset", pictures, "image", "sc:ImageObject"),
        _members("webdataset-prompts", texts, "prompt", "sc:Text"),
    ]


def _members(name: str, files: str, field: str, kind: str) -> Node:
    """Members of tars: their row, which is their name, and their content."""
    row = _field(
        name, "row", "cr:Int64", files, {"fileProperty": "filename"},
        transform={"regex": r"(\d+)\."},
    )  # fmt: skip
    return _record_set(name, [row, _field(name, field, kind, files, {"fileProperty": "content"})])


def _imagefolder(about: About, keys: Sequence[str]) -> _Told:
    """Pictures joined with their records by the names of their files."""
    endings, encodings = _pictures(about)
    form, pictures, rows = "imagefolder", "imagefolder-pictures", "imagefolder-rows"
    sets = [
        _file_set(pictures, [f"imagefolder/*/*.{end}" for end in endings], encodings),
        _file_set(rows, ["imagefolder/*/metadata.jsonl"], [_ENCODINGS[".jsonl"]]),
    ]
    on = {"fileSet": {"@id": rows}, "extract": {"column": "file_name"}}
    name = _field(
        form, "file_name", "sc:Text", pictures, {"fileProperty": "filename"}, references=on
    )
    image = _field(form, "image", "sc:ImageObject", pictures, {"fileProperty": "content"})
    return sets, [_record_set(form, [name, image, *_columns(about, form, rows)])]


def _pictures(about: About) -> tuple[list[str], list[str]]:
    """Endings and encodings of the pictures' files."""
    return [EXTENSIONS[form] for form in about.forms], [CONTENT_TYPES[form] for form in about.forms]


_FORMS: Mapping[str, Callable[[About, Sequence[str]], _Told]] = {
    "parquet": _parquet,
    "webdataset": _webdataset,
    "imagefolder": _imagefolder,
}
