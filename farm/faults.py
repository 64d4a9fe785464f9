"""What pydantic and the operating system find wrong, in the words of the farm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_WORDS = {
    "extra_forbidden": "no such key",
    "missing": "is missing",
    "string_type": "must be a text",
    "string_too_short": "is empty",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
}


def what(item: Mapping[str, Any]) -> str:
    """What is wrong with one value, of `ValidationError.errors()`: `must be a list`."""
    if item["type"] == "too_short" and " at least 1 " in item["msg"]:
        return "name at least one"
    told = item["msg"].removeprefix("Value error, ")
    told = re.sub(r"^(Input|String|Value|List|Tuple|Dictionary) should ", "must ", told)
    return _WORDS.get(item["type"], told)


def where(item: Mapping[str, Any]) -> str:
    """The place of that value: `models.sd15.engines`; empty for a fault of the whole."""
    return ".".join(str(part) for part in item["loc"] if part != "[key]")


def sentence(item: Mapping[str, Any], whole: str = "entry") -> str:
    """`models.sd15.licence: is missing`; a fault of the whole begins with `whole`."""
    return f"{where(item) or whole}: {what(item)}"


def unreadable(error: OSError | ValueError) -> str:
    """Why a file cannot be read, without its name."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)
