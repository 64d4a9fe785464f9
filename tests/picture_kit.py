"""Picture files, good and hostile ones, and a blob store that counts."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from farm.blobs.local import LocalBlobs

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def picture(form: str = "PNG", size: tuple[int, int] = (64, 48), **how: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).resize(size).save(out, form, **how)
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it is side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return (
        start + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    )


def animated(form: str) -> bytes:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    out = io.BytesIO()
    frames[0].save(out, form, save_all=True, append_images=frames[1:])
    return out.getvalue()


class Counted(LocalBlobs):
    """Counts what goes through it."""

    puts = gets = 0

    def put(self, key: str, data: bytes, content_type: str) -> None:
        self.puts += 1
        super().put(key, data, content_type)

    def get(self, key: str) -> bytes:
        self.gets += 1
        return super().get(key)
