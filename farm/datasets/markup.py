"""Any text as Markdown that shows just that text, and plain values as YAML."""

from __future__ import annotations

import json
import re
from typing import Any

_INLINE = re.compile(r"([\\`*_\[\]<>&|~$#{}])")
_START = re.compile(r"^([-+=:]|\d+(?=[.)]))", re.MULTILINE)
_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def plain(text: str) -> str:
    """As text of one paragraph or several: nothing in it is markup (https://spec.commonmark.org)."""
    lines = [_INLINE.sub(r"\\\1", line.strip()) for line in text.splitlines()]
    return _START.sub(_escaped_start, "\n".join(lines)).strip()


def _escaped_start(match: re.Match[str]) -> str:
    """The mark of a list, a rule or a heading; after a number it is what follows that marks."""
    found = match.group()
    return f"{found}\\" if found.isdigit() else f"\\{found}"


def one_line(text: str) -> str:
    """As `plain`, its lines joined."""
    return plain(" ".join(text.split()))


def code(text: str) -> str:
    """As code within a line."""
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{' '.join(text.splitlines())}{pad}{fence}"


def block(text: str, language: str) -> str:
    """As a block of code, within a longer fence than any in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def yaml(value: dict[str, Any] | list[Any], indent: int = 0) -> str:
    """Mappings with plain keys, lists and scalars as YAML 1.2 in block style."""
    pad = " " * indent
    if isinstance(value, list):
        return "".join(f"{pad}- {_item(one, indent + 2)}" for one in value)
    return "".join(f"{pad}{key}:{_under(one, indent)}" for key, one in value.items())


def _under(value: Any, indent: int) -> str:
    nested = isinstance(value, dict | list)
    return f"\n{yaml(value, indent + 2)}" if nested else f" {_scalar(value)}\n"


def _item(value: Any, indent: int) -> str:
    nested = isinstance(value, dict | list)
    return yaml(value, indent).removeprefix(" " * indent) if nested else f"{_scalar(value)}\n"


def _scalar(value: Any) -> str:
    """JSON is YAML, but for characters that YAML wants escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return _ODD.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
