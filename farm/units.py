"""Sizes and times as people write them."""

from __future__ import annotations

import math
import re

from farm.errors import InvalidConfig, InvalidParameter

GB = 10**9
_LETTERS = " KMGT"
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?([{_LETTERS}]?)(I?)B", re.IGNORECASE)

_TIME = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?(s|min|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 15min (15m), 12h, 30d or 2w. Raises InvalidParameter."""
    match = _TIME.fullmatch(text.strip().lower())
    if not match:
        raise InvalidParameter(f"{text[:40]!r} is no time; such as 90s, 15min, 12h, 30d or 2w")
    return float(match[1]) * _SECONDS[match[2]]


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
    """`17 B`, `39.1 kB`, `537 MB`, `25.8 GB`: the digits that matter to a person."""
    for power, unit in ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 0.9995 * 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size} B"
