"""Pictures as input pictures: by the farm at submit, by the worker and by its engine at render.

What the farm takes, the engine must be able to use, or refuse in a sentence; a changed object is
refused by the worker; what is stored is told by its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from farm.blobs.local import LocalBlobs
from farm.errors import Invalid, InvalidParameter
from farm.inputs import InputPictures, picture_key
from farm.spec import INPUT_PATTERN
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.picture_kit import animated, bomb
from tests.store_kit import spec
from workers.engines.input_pictures import init_picture, mask_picture
from workers.inputs import Inputs

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "I", "F", "YCbCr", "PA")
SIZES = ((1, 1), (1, 400), (400, 1), (7, 5), (64, 64), (100, 60), (2, 3_000))
FORMS = (
    "PNG",
    "PNG",
    "JPEG",
    "JPEG",
    "WEBP",
    "WEBP",
    "GIF",
    "TIFF",
    "BMP",
    "PPM",
    "ICO",
    "JPEG2000",
)
SVG = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>'
FILES = {"/etc/passwd", "/dev/zero", "/proc/self/mem", "missing.png", "", ".", "\0", "a" * 5_000}


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    warnings.simplefilter("ignore")  # of Pillow, of what it reads
    blobs = LocalBlobs(data / "blobs")
    inputs = Inputs(blobs)

    def judge(case: Case) -> str:
        if case.one_in(15):
            return names(case, data, blobs)
        content = drawn(case.rng)
        case.told = f"{len(content):,} bytes, {content[:700]!r}"
        try:
            key = picture_key(content)
        except InvalidParameter as error:
            if not 5 < len(error.message) < 400:
                raise Finding(f"it says {error.message!r}") from None
            rendered(case.rng, content, "inputs/" + "0" * 64 + ".png")
            return "refused"
        if not re.fullmatch(INPUT_PATTERN, key):
            raise Finding(f"the key {key!r}")
        rendered(case.rng, content, key)
        if case.one_in(6):
            fetched(case.rng, blobs, inputs, content, key)
        return f"accepted {key[-3:]}"

    yield judge
    inputs.close()


# ---- pictures


def drawn(rng: Random) -> bytes:
    """A picture, a changed one, one that lies about itself, or none."""
    kind = rng.randrange(20)
    if kind == 0:
        return rng.choice(
            (b"", SVG, b"%PDF-1.7", b"GIF89a", words.text(rng).encode(errors="replace"))
        )
    if kind == 1:
        return rng.choice(
            (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\xff\xff\xffWEBP")
        ) + rng.randbytes(200)
    if kind == 2:
        return bomb(rng.choice((20_000, 8_001, 65_535, 2**31 - 1)))
    if kind == 3:
        return animated(rng.choice(("PNG", "WEBP", "GIF", "TIFF")))
    if kind == 4:
        return _lying(rng)
    content = _good(rng)
    if kind < 15:
        return words.broken(rng, content, 4)
    return content + rng.randbytes(rng.choice((0, 0, 50)))


def _good(rng: Random) -> bytes:
    mode, size = rng.choice(MODES), rng.choice(SIZES)
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8)
    whole = Image.fromarray(pixels.reshape(size[1], size[0], 3))
    out = io.BytesIO()
    how: dict[str, Any] = {}
    form = rng.choice(FORMS)
    if form == "JPEG":
        how = {
            "exif": _exif(rng),
            "progressive": rng.random() < 0.5,
            "icc_profile": rng.randbytes(90),
        }
    elif form == "PNG":
        how = {"pnginfo": _chunks(rng), "interlace": 1}
        if rng.randrange(3) == 0:
            how["transparency"] = rng.choice((0, (1, 2, 3), b"\x00\x80"))
    elif form == "WEBP":
        how = {"lossless": rng.random() < 0.5, "exif": _exif(rng), "xmp": rng.randbytes(90)}
    try:
        whole.convert("L").convert(mode).save(out, form, **how) if mode in (
            "I;16", "PA", "LA",
        ) else whole.convert(mode).save(out, form, **how)  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError):  # a mode that the format has not
        out = io.BytesIO()
        whole.save(out, "PNG")
    return out.getvalue()


def _exif(rng: Random) -> bytes:
    """Orientation, good or not, in a block that may be broken."""
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 60_000))
    made = exif.tobytes()
    return words.broken(rng, made, 3)[:60_000] if rng.randrange(3) == 0 else made


def _chunks(rng: Random) -> PngImagePlugin.PngInfo:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", words.text(rng).encode("latin-1", "replace").decode("latin-1"))
    told.add_itxt("prompt", words.text(rng).encode("utf-8", "replace").decode(), zip=True)
    told.add(rng.choice((b"eXIf", b"iCCP", b"tRNS", b"gAMA", b"acTL")), rng.randbytes(12))
    return told


def _lying(rng: Random) -> bytes:
    """A PNG whose chunks say what is not so, each with a right checksum."""
    side = rng.choice((0, 1, 64, 4_000))
    head = struct.pack(
        ">IIBBBBB", side, rng.choice((side, 0, 1, 2**31)),
        rng.choice((1, 2, 8, 16, 3, 255)), rng.choice((0, 2, 3, 4, 6, 7)),
        rng.choice((0, 1)), rng.choice((0, 5)), rng.choice((0, 1, 2)),
    )  # fmt: skip
    pixels = zlib.compress(bytes(rng.choice((0, 9, 20_000, 5_000_000))))
    chunks = [
        (b"IHDR", head),
        (
            b"zTXt",
            b"a\0\0"
            + zlib.compress(bytes(rng.choice((1, 80 << 20)) if rng.randrange(20) == 0 else 9)),
        ),
        (b"PLTE", rng.randbytes(rng.choice((3, 4, 768)))),
        (b"IDAT", pixels),
        (b"IEND", b""),
    ]
    if rng.randrange(3) == 0:
        rng.shuffle(chunks)
    made = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        made += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    return made


# ---- what must hold


def rendered(rng: Random, content: bytes, key: str) -> None:
    """The engine's own reading: a picture of the job's size, or InvalidParameter."""
    side = rng.choice((64, 128))
    job = spec(init_image=key, mask_image=key, strength=0.5, width=side, height=64)
    for read, mode in ((init_picture, "RGB"), (mask_picture, "L")):
        with contextlib.suppress(InvalidParameter):
            found = read(job, {key: content})
            if found is None or (found.mode, found.size) != (mode, (side, 64)):
                raise Finding(f"{read.__name__} gave {found}")
            if mode == "L" and not set(found.tobytes()) <= {0, 255}:
                raise Finding("a mask that is neither black nor white")


def fetched(rng: Random, blobs: LocalBlobs, inputs: Inputs, content: bytes, key: str) -> None:
    """The worker takes the object as it was stored, and refuses it once it was changed."""
    blobs.put(key, content, "image/png")
    job = spec(init_image=key, strength=0.5)
    claim = Claim(JobRef("0f9k2m4x7q3w5t8b", 0), 1, "s", job)
    found = inputs.fetch([claim])
    if found.files.get(key) != content or found.refused:
        raise Finding(f"the worker did not take what was stored: {found}")
    changed = words.broken(rng, content, 2)
    other = f"inputs/{hashlib.sha256(content + b'x').hexdigest()}.png"
    blobs.put(other, changed, "image/png")
    job = spec(init_image=other, strength=0.5)
    found = inputs.fetch([Claim(JobRef("0f9k2m4x7q3w5t8b", 1), 1, "s", job)])
    if found.ready or not all(isinstance(error, Invalid) for _, error in found.refused):
        raise Finding(f"the worker took what is not under its key: {found}")


def names(case: Case, data: Path, blobs: LocalBlobs) -> str:
    """What a row says of a picture: a path, blob:, job:, a URL; nothing but InvalidParameter."""
    given = case.rng.choice((words.text(case.rng), *FILES))
    base = case.rng.choice((data, None))
    case.told = f"the name {given!r} from {base}"

    def no_job(name: str) -> bytes:
        JobRef.parse(name)
        return b""

    with InputPictures(lambda: blobs, no_job, base) as pictures:
        try:
            key = pictures.take(given)
        except InvalidParameter as error:
            if base is None and "root:" in error.message:
                raise Finding(error.message) from None
            return "name refused"
    return f"name taken as {key[:7]}"
