"""Which row a mark was seen in first: a million rows take 25 MB, in a dict they take 140."""

from __future__ import annotations

import hashlib
from array import array

BYTES = 8  # of a mark; that two of a million are one by chance happens once in 37 million times
_FIRST = 2**10  # places; twice as many when two of three are taken


def mark_of(data: str | bytes) -> int:
    """A hash's first 64 bits."""
    data = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(data, digest_size=BYTES).digest())


class Seen:
    """Marks are numbers of 64 bits, and a hash's, for their own bits say where they are kept."""

    def __init__(self) -> None:
        self._n = 0
        self._marks, self._rows = _empty(_FIRST)

    def get(self, mark: int) -> int | None:
        """The row that it was first seen in."""
        row = self._rows[self._place(mark)]
        return row - 1 if row else None

    def add(self, mark: int, row: int) -> bool:
        """Whether the mark is new; one that is not keeps its row."""
        place = self._place(mark)
        if self._rows[place]:
            return False
        self._take(place, mark, row)
        return True

    def count(self, mark: int) -> int:
        """How often the mark was counted before. A `Seen` that counts tells no rows."""
        place = self._place(mark)
        if n := self._rows[place]:
            self._rows[place] = n + 1
        else:
            self._take(place, mark, 0)
        return n

    def _place(self, mark: int) -> int:
        """Where the mark is, or will be."""
        last = len(self._rows) - 1
        place = mark & last
        while self._rows[place] and self._marks[place] != mark:
            place = (place + 1) & last
        return place

    def _take(self, place: int, mark: int, row: int) -> None:
        self._marks[place], self._rows[place] = mark, row + 1
        self._n += 1
        if 3 * self._n > 2 * len(self._rows):
            self._grow()

    def _grow(self) -> None:
        marks, rows = self._marks, self._rows
        self._marks, self._rows = _empty(2 * len(rows))
        for mark, row in zip(marks, rows, strict=True):
            if row:
                place = self._place(mark)
                self._marks[place], self._rows[place] = mark, row


def _empty(places: int) -> tuple[array[int], array[int]]:
    """Marks, and their rows counted from 1; 0: no mark is there."""
    return array("Q", [0]) * places, array("I", [0]) * places
