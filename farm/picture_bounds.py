"""What a stranger's picture may cost, counted before a decoder sees it.

A decoder does all that the file asks for: 64 MiB of empty PNG chunks or JPEG segments cost it tens
of seconds, 64 MiB of JPEG scans hours.

Formats: PNG (https://www.w3.org/TR/png-3/, 5.3), JPEG (ITU-T T.81, annex B).
"""

from __future__ import annotations

from collections.abc import Iterator

from farm.errors import InvalidParameter

MOST_CHUNKS = 50_000  # of a PNG; 64 MiB in pieces of 4 KiB are 16,384
MOST_SEGMENTS = 5_000  # of a JPEG before its first scan; 64 MiB in the largest ones are 1,024
MOST_SCANS = 1_000
MOST_SCANNED = 1_280_000_000  # pixels of all scans: 20 scans of the largest picture, few have 10
PNG, _JPEG, _SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xda"


def refuse_endless(data: bytes) -> None:
    """Raises InvalidParameter for a file that would cost its decoder out of all proportion."""
    if data.startswith(PNG):
        _count_chunks(data)
    elif data.startswith(_JPEG):
        _count_segments(data)


def refuse_scans(data: bytes, pixels: int) -> None:
    """Raises InvalidParameter for a JPEG of too many scans; each goes over the whole picture."""
    scans = data.count(_SCAN)  # coded data never holds these two bytes
    if scans > MOST_SCANS or scans * pixels > MOST_SCANNED:
        raise InvalidParameter(f"it is a JPEG of {scans:,} scans; save it anew as a plain one")


def png_chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of a PNG's chunks in order, as they are asked for; none of another file."""
    at = len(PNG) if data.startswith(PNG) else len(data)
    while at < len(data):
        yield data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _count_chunks(data: bytes) -> None:
    for chunks, _ in enumerate(png_chunks(data), 1):
        if chunks > MOST_CHUNKS:
            raise InvalidParameter(f"it is a PNG of more than {MOST_CHUNKS:,} chunks")


def _count_segments(data: bytes) -> None:
    at, segments = 2, 0
    while at < len(data) and data[at : at + 2] != _SCAN:
        marker = data[at + 1 : at + 2]
        fill = marker in (b"\xff", b"\x00") or not marker
        alone = b"\xd0" <= marker <= b"\xd9" or marker == b"\x01"
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 1 if fill else 2 if alone else 2 + length
        segments += 1
        if segments > MOST_SEGMENTS:
            raise InvalidParameter(f"it is a JPEG of more than {MOST_SEGMENTS:,} segments")
