"""The files of a diffusers model directory: are they all there and whole, and what is their hash.

Loading alone does not tell: a missing tokenizer directory loads as a tokenizer of two tokens, a
missing tensor as random or empty weights. The layout is that of `save_pretrained`:
model_index.json names the components, each has a directory of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from farm.errors import ModelNotLoaded
from farm.weight_files import sha256_of

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name a component's weights."""
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pb", ".pt", ".pth")
ANY_WEIGHTS = (".safetensors", *OTHER_WEIGHTS)
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
    ("vocab.json",),
)
MOST_HEADER_BYTES = 100_000_000
"""The bound of the safetensors library: https://github.com/huggingface/safetensors#format"""


class Index(NamedTuple):
    """A model_index.json. `components`: name -> (library, class); `pipeline`: its class."""

    file: Path
    pipeline: str
    components: dict[str, tuple[str, str]]


def read_index(folder: Path) -> Index:
    """Raises ModelNotLoaded."""
    if not folder.is_dir():
        raise ModelNotLoaded(f"{folder}: there is no such directory")
    file = folder / "model_index.json"
    told = read_json(file)
    components = {
        name: (value[0], value[1])
        for name, value in told.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2
        if isinstance(value[0], str) and isinstance(value[1], str)
    }
    if not components:
        raise ModelNotLoaded(f"{file}: names no components")
    return Index(file, str(told.get("_class_name")), components)


def checked_files(
    index: Index, variant: str | None, without: Collection[str] = (), weights: bool = True
) -> dict[str, Path]:
    """Every file that the pipeline of `index` is loaded from, by its name relative to that.

    `without`: components that are left out or come from elsewhere. `weights` False: those of the
    models may be missing, for they come from a checkpoint of one file.
    Raises ModelNotLoaded, which names the first file that is missing or broken.
    """
    folder = index.file.parent
    files = [index.file]
    for name, (_, kind) in index.components.items():
        if name not in without:
            files += component_files(folder / name, kind, variant, weights)
    return {file.relative_to(folder).as_posix(): file for file in files}


def manifest_sha256(files: Mapping[str, Path], settings: Mapping[str, str]) -> str:
    """SHA-256 of the sorted lines "<sha256>  <name>", as sha256sum's, and "<value>  <setting>"."""
    with ThreadPoolExecutor(4) as pool:
        hashes = dict(zip(files, pool.map(sha256_of, files.values()), strict=True))
    lines = [f"{value}  {name}\n" for name, value in (hashes | dict(settings)).items()]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelNotLoaded."""
    if not file.is_file():
        raise ModelNotLoaded(f"{file}: missing")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelNotLoaded(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelNotLoaded(f"{file}: not a JSON object")
    return value


def component_files(
    folder: Path, kind: str, variant: str | None, weights_needed: bool = True
) -> Iterator[Path]:
    """The files of one component; `kind` is its class name in the model index.

    Raises ModelNotLoaded, which names the file that is missing or broken.
    """
    if not folder.is_dir():
        raise ModelNotLoaded(f"{folder}: missing, model_index.json wants a {kind} there")
    weights: list[Path] = []
    if "Scheduler" in kind:
        read_json(folder / "scheduler_config.json")
    elif "Tokenizer" in kind:
        _tokenizer(folder)
    elif "Processor" in kind or "FeatureExtractor" in kind:
        if not any(folder.glob("*processor_config.json")):
            raise ModelNotLoaded(f"{folder / 'preprocessor_config.json'}: missing")
    else:
        read_json(folder / "config.json")
        if weights_needed or any(f.name.endswith(ANY_WEIGHTS) for f in folder.iterdir()):
            weights = _weights(folder, variant)
    skipped = (".index.json", *ANY_WEIGHTS)
    plain = (f for f in folder.rglob("*") if f.is_file() and not _hidden(f.relative_to(folder)))
    return chain(weights, (f for f in plain if not f.name.endswith(skipped)))


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _tokenizer(folder: Path) -> None:
    read_json(folder / "tokenizer_config.json")
    for names in VOCABULARIES:
        if all((folder / name).is_file() for name in names):
            break
    else:
        raise ModelNotLoaded(f"{folder / 'tokenizer.json'}: missing, and no other vocabulary file")
    for file in folder.glob("*.json"):
        read_json(file)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The weight files of a model, checked; those of the variant, if it has any."""
    for infix in dict.fromkeys((f".{variant}" if variant else "", "")):
        for stem in WEIGHT_NAMES:
            whole = folder / f"{stem}{infix}.safetensors"
            if whole.is_file():
                _check_safetensors(whole)
                return [whole]
            index = folder / f"{stem}.safetensors.index{infix}.json"
            if index.is_file():
                return [index, *_shards(index)]
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in OTHER_WEIGHTS)
    hint = f" (only {', '.join(pickles)}, which are not read)" if pickles else ""
    stem = WEIGHT_NAMES["_diffusers_version" not in read_json(folder / "config.json")]
    raise ModelNotLoaded(f"{folder / stem}.safetensors: missing{hint}")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelNotLoaded(f"{index}: has no weight_map")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        _check_safetensors(file)
    return files


def _check_safetensors(file: Path) -> None:
    """The file has the length that its header tells.

    Format: the header's length (8 bytes, little endian), a JSON header, the tensors' bytes.
    """
    if not file.is_file():
        raise ModelNotLoaded(f"{file}: missing")
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ModelNotLoaded(f"{file}: truncated, or not a safetensors file ({size:,} bytes)")
        try:
            header = json.loads(opened.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            wanted = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelNotLoaded(f"{file}: its header is broken ({error})") from None
    if not tensors:
        raise ModelNotLoaded(f"{file}: holds no tensors")
    if size != wanted:
        what = "truncated" if size < wanted else "too long"
        raise ModelNotLoaded(f"{file}: {what}, {size:,} bytes where {wanted:,} were expected")
