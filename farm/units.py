"""Sizes as people write them."""

from __future__ import annotations

import math
import re

from farm.errors import InvalidConfig

GB = 10**9
_LETTERS = " KMGT"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?([{_LETTERS}]?)(I?)B", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GB, 512MB (powers of 1000) or 1.5GiB (powers of 1024).

    Raises InvalidConfig.
    """
    match = _SIZE.fullmatch(text.strip())
    number, letter, binary = match.groups() if match else ("0", "", "")
    power = _LETTERS.index(letter.upper() or " ")
    size = float(number) * (1024 if binary else 1000) ** power
    if not math.isfinite(size) or size < 1 or (binary and not power):
        raise InvalidConfig(f"{text[:40]!r} is no size; such as 8GB, 512MB or 1.5GiB")
    return int(size)


def show_size(size: int) -> str:
    """In GB or MB, with the digits that matter to a person."""
    return f"{size / GB:.3g} GB" if size >= GB else f"{size / 10**6:.3g} MB"
