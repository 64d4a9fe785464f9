"""The index of marks against a dict."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from farm.datasets.seen import BYTES, Seen


def mark(number: int) -> int:
    return int.from_bytes(blake2b(b"%d" % number, digest_size=BYTES).digest())


def test_ten_thousand_marks_grow_it_and_keep_their_first_rows() -> None:
    seen = Seen()
    for row in range(10_000):
        assert seen.get(mark(row)) is None
        assert seen.add(mark(row), row)
    assert not any(seen.add(mark(row), row + 1) for row in range(10_000))
    assert [seen.get(mark(row)) for row in range(10_000)] == list(range(10_000))


@given(st.lists(st.integers(0, 3), max_size=30))
def test_marks_that_want_one_place(numbers: list[int]) -> None:
    seen, rows = Seen(), dict[int, int]()
    for row, number in enumerate(numbers):
        told = number << 32
        assert seen.add(told, row) is (told not in rows)
        rows.setdefault(told, row)
        assert seen.get(told) == rows[told]
