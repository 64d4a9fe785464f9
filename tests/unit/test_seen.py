"""The index of marks against a dict."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from farm.datasets.seen import Seen, mark_of


def mark(number: int) -> int:
    return mark_of(b"%d" % number)


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


@given(st.lists(st.integers(0, 3), max_size=30))
def test_marks_are_counted(numbers: list[int]) -> None:
    seen, counts = Seen(), Counter[int]()
    for number in numbers:
        assert seen.count(number << 32) == counts[number]
        counts[number] += 1


def test_ten_thousand_marks_are_counted_while_it_grows() -> None:
    seen = Seen()
    for nth in range(3):
        assert {seen.count(mark(number)) for number in range(10_000)} == {nth}
