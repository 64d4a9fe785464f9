"""Names of things in SQL: batch ids, and `batch/index` for a job."""

from __future__ import annotations

import re
import secrets
import time
from typing import NamedTuple

from farm.errors import NotFound

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


class JobRef(NamedTuple):
    """A job: its batch and its place in it, from 0. Written `batch/index`."""

    batch_id: str
    idx: int

    def __str__(self) -> str:
        return f"{self.batch_id}/{self.idx}"

    @classmethod
    def parse(cls, text: str) -> JobRef:
        """Raises NotFound when the text is no job's name."""
        match = re.fullmatch(r"([0-9a-z]{1,16})/(\d{1,9})", text)
        if not match:
            raise NotFound(
                f"{text[:60]!r} names no job; a job is BATCH/INDEX, as in 0f9k2m4x7q3w5t8b/17"
            )
        return cls(match[1], int(match[2]))


SESSION_PART = 8  # of a session's 32 hexadecimal digits stand in the keys of its pictures
_PICTURE = re.compile(
    rf"pictures/([0-9a-z]{{16}})/(\d{{7,9}})-(\d{{1,9}})(?:-([0-9a-f]{{{SESSION_PART}}}))?\.[a-z]{{3,4}}"
)


class KeyClaim(NamedTuple):
    """The claim that a picture was rendered under, as its key tells.

    `session`: the beginning of the session's id; empty in keys of release 0.1, which lack it.
    """

    ref: JobRef
    claim_no: int
    session: str


def claim_in(object_key: str) -> KeyClaim | None:
    """The claim that a picture was rendered under; None for a key that no claim makes."""
    match = _PICTURE.fullmatch(object_key)
    if not match:
        return None
    return KeyClaim(JobRef(match[1], int(match[2])), int(match[3]), match[4] or "")


def new_batch_id() -> str:
    """16 characters that sort by time: 45 bits of milliseconds, 35 bits at random."""
    number = (time.time_ns() // 1_000_000) << 35 | secrets.randbits(35)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(75, -1, -5))
