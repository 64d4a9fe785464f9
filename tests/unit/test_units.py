"""Sizes as people write them."""

from __future__ import annotations

import pytest

from farm.errors import InvalidConfig
from farm.units import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("512mb", 512 * 10**6),
        ("1.5GiB", 3 * 2**29),
        (" 24 GiB ", 24 * 2**30),
        ("64KiB", 65536),
        ("2TB", 2 * 10**12),
        ("4096B", 4096),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "8", "8G", "GB", "-1GB", "0GB", "0.1B", "1iB", "1e3GB", "8 GBit", "9" * 400 + "GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidConfig, match=r"such as 8GB, 512MB or 1\.5GiB"):
        parse_size(text)


def test_shown() -> None:
    assert [show_size(n) for n in (24 * 2**30, 8 * 10**9, 2**29)] == ["25.8 GB", "8 GB", "537 MB"]
    assert [show_size(n) for n in (0, 999, 39_100, 10**6 - 1)] == [
        "0 B",
        "999 B",
        "39.1 kB",
        "1 MB",
    ]
    assert [show_size(n) for n in (10**9 - 1, 25 * 10**11)] == ["1 GB", "2.5 TB"]
