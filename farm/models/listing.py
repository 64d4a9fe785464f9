"""Which files a model has, as the hub, a directory or the lock tells, and which are wanted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from farm.catalog import LORA, Weights
from farm.errors import InvalidConfig, UntrustedModel
from farm.models.guard import shown
from farm.models.lock import Locked, safe_name
from farm.models.transfer import Client
from farm.weight_files import PICKLES

MOST_FILES, MOST_BYTES = 20_000, 2**50
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # SHA-1 or SHA-256
_OTHER_FRAMEWORKS = (".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite")
# diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors,
# model-00001-of-00002.fp16.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(
    r"(?:\.(?P<a>\w+)(?:-\d+-of-\d+)?|-\d+-of-\d+\.(?P<b>\w+))\.(?:safetensors|bin)$"
    r"|\.(?:safetensors|bin)\.index\.(?P<c>\w+)\.json$"
)


@dataclass(frozen=True)
class Remote:
    """One file of a model. `place`: its URL, or where it lies on this machine.

    `git_oid`: SHA-1 of git's blob, all that the hub tells of a small file.
    """

    name: str
    place: str | Path
    size: int | None = None
    sha256: str | None = None
    git_oid: str | None = None


@dataclass(frozen=True)
class Listing:
    """`pipeline`: the class that the model's index names, where the hub tells it."""

    revision: str | None
    files: tuple[Remote, ...]
    licence: str = ""
    pipeline: str = ""


def from_hub(client: Client, hub: str, repo: str, revision: str | None) -> Listing:
    """The files of a hub repository at one commit, every name and number checked.

    The hub's API: https://huggingface.co/docs/hub/api
    """
    asked = revision or "main"
    url = f"{hub.rstrip('/')}/api/models/{quote(repo)}/revision/{quote(asked, safe='')}?blobs=true"
    told = client.json(url)
    commit = told.get("sha") if isinstance(told, dict) else None
    rows = told.get("siblings") if isinstance(told, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not isinstance(rows, list):
        raise UntrustedModel(f"{shown(url)}: the answer names no commit and files")
    if _COMMIT.fullmatch(asked) and asked != commit:
        raise UntrustedModel(f"{shown(url)}: asked for {asked}, got {commit}")
    base = f"{hub.rstrip('/')}/{repo}/resolve/{commit}"
    files = [_hub_file(row, base) for row in rows[: MOST_FILES + 1]]
    pipeline = _word(told, "config", "diffusers", "_class_name")
    return Listing(commit, checked(files), _word(told, "cardData", "license"), pipeline)


def _hub_file(row: Any, base: str) -> Remote:
    row = row if isinstance(row, dict) else {}
    name = safe_name(row.get("rfilename"))
    lfs = row.get("lfs")
    lfs = lfs if isinstance(lfs, dict) else {}
    size, digest = lfs.get("size", row.get("size")), lfs.get("sha256")
    oid = None if lfs else row.get("blobId")
    if size is not None and not (type(size) is int and 0 <= size < MOST_BYTES):
        raise UntrustedModel(f"{name}: the hub tells no believable size")
    if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", str(digest)):
        raise UntrustedModel(f"{name}: the hub tells no believable SHA-256")
    oid = oid if isinstance(oid, str) and re.fullmatch(r"[0-9a-f]{40}", oid) else None
    return Remote(name, f"{base}/{quote(name)}", size, digest, oid)


def _word(told: Any, *keys: str) -> str:
    """The short name that stands there in what the hub tells; empty for anything else."""
    for key in keys:
        told = told.get(key) if isinstance(told, dict) else None
    return told if isinstance(told, str) and re.fullmatch(r"[\w.+-]{1,64}", told) else ""


def from_directory(root: Path) -> Listing:
    """The files of a directory on this machine, hidden ones left out."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                inside = safe_name(path.relative_to(root).as_posix())
                files.append(Remote(inside, path, path.stat().st_size))
    return Listing(None, checked(files))


def from_lock(locked: Locked, base: str) -> Listing:
    """The files that the lock names, on a plain mirror."""
    files = [
        Remote(name, f"{base.rstrip('/')}/{quote(name)}", file.size, file.sha256)
        for name, file in locked.files.items()
    ]
    return Listing(locked.revision, checked(files))


def checked(files: Iterable[Remote]) -> tuple[Remote, ...]:
    """Sorted by name. Raises UntrustedModel for too many files, or two that are in the way."""
    found = {file.name: file for file in files}
    folders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
    if len(found) > MOST_FILES or folders & set(found):
        raise UntrustedModel(f"more than {MOST_FILES:,} files, or a file named as a folder")
    return tuple(found[name] for name in sorted(found))


def wanted(listing: Listing, weights: Weights, engine: str) -> Listing:
    """The files that the engine loads. Raises UntrustedModel for pickles that were not allowed."""
    files = [f for f in listing.files if not any(p.startswith(".") for p in f.name.split("/"))]
    if weights.files:
        files = [f for f in files if any(fnmatchcase(f.name, p) for p in weights.files)]
    if engine == LORA:
        return replace(listing, files=(_of_lora(files),))
    if not weights.files:
        files = list(_of_engine(files, weights, engine))
    safe = {_folder(f) for f in files if f.name.endswith((".safetensors", ".gguf"))}
    files = [f for f in files if not (_is_pickle(f) and _folder(f) in safe)]
    pickles = [f.name for f in files if _is_pickle(f)]
    if pickles and not weights.allow_pickle:
        raise UntrustedModel(
            f"pickled weights may run code, and there are no others: {', '.join(pickles)[:300]}; "
            "allow_pickle = true in its entry takes them"
        )
    if not files:
        raise InvalidConfig("none of its files is wanted; see files and variant of its entry")
    return replace(listing, files=tuple(files))


def _of_engine(files: list[Remote], weights: Weights, engine: str) -> Iterable[Remote]:
    """What an engine loads where no file was named: a pipeline, the parts, or one checkpoint."""
    if engine == "diffusers":
        return _of_pipeline(files, weights.variant)
    if "diffusion_model" in weights.options:  # stable-diffusion.cpp: a model in parts
        parts = [part for part in weights.options.values() if isinstance(part, str)]
        return [f for f in files if f.name in parts]
    if len(found := [f.name for f in files if f.name.endswith(".gguf")]) > 1:
        raise InvalidConfig(
            f"several weights are there; say with files = [...] which: {', '.join(found)[:500]}"
        )
    return files


def _of_lora(files: list[Remote]) -> Remote:
    """The one file of a LoRA: jobs add it by the LoRA's name, so there is one of them."""
    found = [f for f in files if f.name.lower().endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if not found and any(_is_pickle(f) for f in files):
        raise UntrustedModel("pickled weights may run code: a LoRA is one .safetensors file")
    names = ", ".join(f.name for f in found) or "none"
    raise InvalidConfig(
        f"a LoRA is one .safetensors file, there are: {names[:500]}; say with files = [...] which"
    )


def _of_pipeline(files: list[Remote], variant: str | None) -> Iterator[Remote]:
    """Without other frameworks' weights, other variants and whole checkpoints beside the index."""
    indexed = any(file.name == "model_index.json" for file in files)
    plain = {_folder(f) for f in files if f.name.endswith(".safetensors") and not _variant(f)}
    varied = {
        _folder(f)
        for f in files
        if variant and _variant(f) == variant and not (_is_pickle(f) and _folder(f) in plain)
    }
    for file in files:
        name = PurePosixPath(file.name)
        if name.suffix in _OTHER_FRAMEWORKS or name.name.startswith(("openvino_", "flax_", "tf_")):
            continue
        if not _is_weight(file):
            yield file
        elif not (indexed and len(name.parts) == 1):
            own = variant if _folder(file) in varied else None
            if not indexed or _variant(file) == own:
                yield file


def _folder(file: Remote) -> str:
    return str(PurePosixPath(file.name).parent)


def _is_pickle(file: Remote) -> bool:
    return file.name.lower().endswith(PICKLES)


def _is_weight(file: Remote) -> bool:
    ends = (".safetensors", ".gguf", *PICKLES)
    return file.name.lower().endswith(ends) or bool(re.search(r"\.index\.(\w+\.)?json$", file.name))


def _variant(file: Remote) -> str | None:
    found = _VARIANT.search(PurePosixPath(file.name).name)
    return next(filter(None, found.groups()), None) if found else None
