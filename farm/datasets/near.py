"""Perceptual hashes of 64 bits, and whether one of them is near to another.

Each look goes over all of them, in pieces that stay in the processor's cache: a million take a
millisecond and 16 MB. Needs imagehash and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import imagehash
import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_PIECE = 2**16


def phash(image: Image) -> str:
    """pHash as 16 hex digits: the signs of the lowest frequencies of the picture in grey."""
    return str(imagehash.phash(image))


class Near(NamedTuple):
    """What was found: its row, and in how many bits it differs."""

    row: int
    distance: int


class NearHashes:
    """Finds hashes that differ in at most `most` bits."""

    def __init__(self, most: int) -> None:
        self._most, self._n = most, 0
        self._hashes, self._rows = np.empty(_PIECE, np.uint64), np.empty(_PIECE, np.int64)
        self._other, self._bits = np.empty(_PIECE, np.uint64), np.empty(_PIECE, np.uint8)

    def add(self, row: int, value: int) -> None:
        if self._n == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._hashes[self._n], self._rows[self._n] = value, row
        self._n += 1

    def find(self, value: int) -> Near | None:
        """The first that was added of those that are near."""
        sought = np.uint64(value)
        for start in range(0, self._n, _PIECE):
            piece = self._hashes[start : min(start + _PIECE, self._n)]
            bits = self._bits[: len(piece)]
            np.bitwise_xor(piece, sought, out=self._other[: len(piece)])
            np.bitwise_count(self._other[: len(piece)], out=bits)
            if bits.min() <= self._most:
                at = int((bits <= self._most).argmax())
                return Near(int(self._rows[start + at]), int(bits[at]))
        return None
