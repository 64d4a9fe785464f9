"""What is told of a picture, the same in every format and shard: a flat record of fixed keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from farm.datasets.sample import Sample, Value
from farm.errors import InvalidParameter
from farm.spec import FIELDS

_FLOATS = ("guidance_scale", "strength")
TYPES: dict[str, type] = {
    "row": int,
    **dict.fromkeys(FIELDS, str),
    **dict.fromkeys(("width", "height", "steps", "seed", "clip_skip"), int),
    **dict.fromkeys(_FLOATS, float),
}
"""Keys of every record, in their order; then come the dataset's own columns, then sha256."""
_EMPTY: dict[type, Value] = {str: "", int: 0, float: 1.0}  # without an init image, strength is 1
_MEMBERS = ("png", "jpg", "webp", "txt", "json", "__key__", "__url__")
_TAKEN = {*TYPES, *_MEMBERS, "sha256", "image", "file_name", "file_names"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


def check_columns(names: Iterable[str]) -> None:
    """Raises InvalidParameter for names that a dataset's own columns cannot have."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidParameter(
                f"column {name[:80]!r}: a name has letters, digits and _, and begins with no digit"
            )
        if name in _TAKEN or name.endswith(("_file_name", "_file_names")):
            raise InvalidParameter(f"column {name!r}: readers take this name for another thing")


def types(columns: Mapping[str, type]) -> dict[str, type]:
    """The type of each key of `record`, in order."""
    return {**TYPES, **columns, "sha256": str}


def record(sample: Sample, columns: Mapping[str, type]) -> dict[str, Value]:
    """Flat, and never None but in own columns of numbers and truths.

    Readers guess types from the first rows, so what a job does not have is an empty text, 0 or, for
    `strength`, 1. `loras` is as prompt files have it: NAME:WEIGHT,NAME:WEIGHT.
    """
    given = sample.params
    told: dict[str, Value] = {"row": sample.row}
    for name in FIELDS:
        value = given.get(name)
        told[name] = _EMPTY[TYPES[name]] if value is None else value
    for name in _FLOATS:  # JSON of a whole number has no point
        told[name] = float(told[name] or 0)
    told["loras"] = ",".join(f"{name}:{weight}" for name, weight in given.get("loras", ()))
    for name, kind in columns.items():
        told[name] = _typed(sample.columns.get(name), kind)
    told["sha256"] = sample.sha256
    return told


def _typed(value: Any, kind: type) -> Value:
    """As its column has it; no NaN or infinity, which JSON lacks, and no halves of characters."""
    if kind is str:
        return "" if value is None else str(value).encode(errors="replace").decode()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    typed: Value = kind(value)
    return typed


def line(told: Mapping[str, Value]) -> bytes:
    """One line of JSON, UTF-8, with its line end."""
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
