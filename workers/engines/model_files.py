"""The files of a diffusers model directory: are they all there and whole, and what is their hash.

Loading alone does not tell: a missing tokenizer directory loads as a tokenizer of two tokens, a
missing tensor as random or empty weights. The layout is that of `save_pretrained`:
model_index.json names the components, each has a directory of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from farm.errors import ModelNotLoaded

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers name a component's weights."""
OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pb", ".pt", ".pth")
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


def checked_files(folder: Path, variant: str | None) -> list[Path]:
    """Every file that the pipeline in `folder` is loaded from, sorted.

    Raises ModelNotLoaded, which names the first file that is missing or broken.
    """
    if not folder.is_dir():
        raise ModelNotLoaded(f"{folder}: there is no such directory")
    index = folder / "model_index.json"
    files = [index]
    for name, value in _json(index).items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        if isinstance(value[0], str) and isinstance(value[1], str):
            files += _component(folder / name, value[1], variant)
    if len(files) == 1:
        raise ModelNotLoaded(f"{index}: names no components")
    return sorted(files)


def manifest_sha256(folder: Path, files: list[Path]) -> str:
    """SHA-256 of the sorted lines "<sha256>  <name relative to the folder>", as sha256sum's."""
    with ThreadPoolExecutor(4) as pool:
        lines = [
            f"{digest}  {file.relative_to(folder).as_posix()}\n"
            for digest, file in zip(pool.map(sha256_of, files), files, strict=True)
        ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelNotLoaded(f"{file}: missing")
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelNotLoaded(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelNotLoaded(f"{file}: not a JSON object")
    return value


def _component(folder: Path, kind: str, variant: str | None) -> Iterator[Path]:
    """The files of one component; `kind` is its class name in the model index."""
    if not folder.is_dir():
        raise ModelNotLoaded(f"{folder}: missing, model_index.json wants a {kind} there")
    weights: list[Path] = []
    if "Scheduler" in kind:
        _json(folder / "scheduler_config.json")
    elif "Tokenizer" in kind:
        _tokenizer(folder)
    elif "Processor" in kind or "FeatureExtractor" in kind:
        if not any(folder.glob("*processor_config.json")):
            raise ModelNotLoaded(f"{folder / 'preprocessor_config.json'}: missing")
    else:
        _json(folder / "config.json")
        weights = _weights(folder, variant)
    skipped = (".safetensors", ".index.json", *OTHER_WEIGHTS)
    plain = (f for f in folder.rglob("*") if f.is_file() and not _hidden(f.relative_to(folder)))
    return chain(weights, (f for f in plain if not f.name.endswith(skipped)))


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _tokenizer(folder: Path) -> None:
    _json(folder / "tokenizer_config.json")
    for names in VOCABULARIES:
        if all((folder / name).is_file() for name in names):
            break
    else:
        raise ModelNotLoaded(f"{folder / 'tokenizer.json'}: missing, and no other vocabulary file")
    for file in folder.glob("*.json"):
        _json(file)


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
    stem = WEIGHT_NAMES["_diffusers_version" not in _json(folder / "config.json")]
    raise ModelNotLoaded(f"{folder / stem}.safetensors: missing{hint}")


def _shards(index: Path) -> list[Path]:
    names = _json(index).get("weight_map")
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
