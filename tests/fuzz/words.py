"""What strangers write: hostile texts, numbers and bytes, and small changes to good ones."""

from __future__ import annotations

import gzip
import json
from random import Random
from typing import Any

TEXTS = (
    "", " ", "\n", "\t", "a", "a red circle", "0", "-1", "null", "None", "true", "NaN", "inf",
    "1e999", "\x00", "a\x00b", "\x1b]0;owned\x07", "\x7f", "\u202e", "\u200b", "\ufeff", "\ufffe",
    "\ud800", "a\udcffb", "\U0010ffff", "e\u0301", "é" * 300, "👩‍👩‍👧‍👦", "赤い円",
    "\u2028\u2029", "'; drop table jobs; --", "../../../../etc/passwd", "/etc/passwd", "..\\..\\x",
    "~/x", "file:///etc/passwd", "http://169.254.169.254/", "gopher://x",
    "data:image/png;base64,AAAA", "blob:../../farm.db", "blob:",
    "blob:inputs/" + "0" * 64 + ".png", "job:latest/0", "job:/", "job:x/99999999999999999999",
    "job:../..", "{", "}", "{}", "{{", "{a.b}", "{a[0]}", "{0}", "{a!r:>9999999999}",
    "{__class__}", "%s%n", "$(touch x)", "`touch x`", "; touch x", "| touch x",
    "<lora:/etc/passwd:1>", "<script>", "&lt;", "[red]x[/red]", "shapes", "shapes:fake",
    "fake-fast", "latest", "-", "--", "--help", "-f", "@/etc/passwd", "@-", "=", ",", "a" * 8_000,
    "a" * 8_001, "a " * 50_000, "(" * 5_000, "9" * 5_000, "con.png", "a/b", "a\\b", "." * 300,
    "euler", "euler_a", "EulerDiscreteScheduler", "png", "webp", "jpeg", "gif", "diffusers",
    "sdcpp", "1..5", "5..1", "0..99999999999999999999", "1e-400", "0x10", "1_000", "１２", " 64",
    "+64", "64.0", "١٢",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 7, 8, 16, 63, 64, 65, 512, 8192, 8200, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1,
    2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), True, False, None,
)  # fmt: skip
GOOD = {
    "prompt": ("a red circle", "a cat, sitting\non a mat", 'a "quoted" word', "赤い円", "x" * 900),
    "negative_prompt": ("", "blurry"),
    "width": (64, 128, 256),
    "height": (64, 128, 256),
    "steps": (1, 2, 4),
    "guidance_scale": (0, 4.0, 7.5),
    "seed": (0, 7, 2**31, 2**63 - 20),
    "scheduler": ("euler", "DDIMScheduler", "dpm++_2m"),
    "format": ("png", "webp", "jpeg"),
    "n": (1, 2, 3),
    "clip_skip": (1, 2),
    "strength": (0.5,),
    "loras": ("", "pixel:0.5"),
    "engine": ("diffusers", "fake"),
    "model": ("shapes", "fake-fast"),
    "init_image": ("picture.png", "missing.png"),
    "mask_image": ("picture.png",),
}


def text(rng: Random) -> str:
    """A hostile text, or two put together, or random characters."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(TEXTS) + rng.choice(TEXTS)
    if kind == 1:
        limit = rng.choice((0x80, 0x300, 0x3000, 0x110000))
        return "".join(chr(rng.randrange(limit)) for _ in range(rng.randrange(1, 40)))
    return rng.choice(TEXTS)


def value(rng: Random, depth: int = 0) -> Any:
    """Any JSON value, mostly hostile; NaN and numbers beyond 64 bits too."""
    kind = rng.randrange(12)
    if kind < 5:
        return text(rng)
    if kind < 10 or depth > 3:
        return rng.choice(NUMBERS)
    inner = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inner if kind == 10 else {text(rng)[:200]: each for each in inner}


def row(rng: Random, wrong: float = 0.3) -> dict[str, Any]:
    """Fields of a job; each good, or with the probability `wrong` not."""
    names = ["prompt", *rng.sample(list(GOOD), rng.randrange(0, 5))]
    found = {n: value(rng) if rng.random() < wrong else rng.choice(GOOD[n]) for n in names}
    if rng.random() < wrong / 3:
        found[text(rng)[:100]] = value(rng)
    return found


def line(rng: Random, whole: dict[str, Any]) -> str:
    """A row as JSON, sometimes with a field twice or very deep."""
    told = json.dumps(whole, ensure_ascii=rng.random() < 0.7)
    kind = rng.randrange(30)
    if kind == 0:
        return told[:-1] + ', "prompt": "b"}'
    if kind == 1:
        return '{"prompt": ' + "[" * rng.choice((50, 5_000, 100_000))
    return told


def encoded(rng: Random, given: str) -> bytes:
    """A text as bytes, rarely in another encoding than UTF-8."""
    kind = rng.randrange(20)
    form = {0: "utf-16", 1: "utf-32-le", 2: "utf-8-sig", 3: "cp1252"}.get(kind, "utf-8")
    errors = "surrogatepass" if "utf" in form else "replace"
    return given.encode(form, errors)


def broken(rng: Random, data: bytes, most: int = 6) -> bytes:
    """The bytes with some changed, cut, doubled, moved or put in."""
    made = bytearray(data)
    for _ in range(rng.randrange(1, most)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(7)
        if kind <= 1 and at < len(made):
            made[at] = rng.choice((0, 0xFF, 0x80, 0x0A, made[at] ^ 1 << rng.randrange(8)))
        elif kind == 2:
            del made[at : at + rng.choice((1, 2, 8, 400))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((1, 16, 600))]
        elif kind == 4:
            made[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b'"', b",", b"\r", b"\n\n", rng.randbytes(9))
            )
        elif kind == 5 and rng.randrange(3) == 0:
            del made[at:]
        elif at + 4 <= len(made):
            made[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff")
            )
    return bytes(made)


def zipped(rng: Random, data: bytes) -> bytes:
    """Gzipped: well, twice, cut, or changed."""
    made = gzip.compress(data, 1)
    kind = rng.randrange(6)
    if kind == 0:
        return made[: rng.randrange(len(made))]
    if kind == 1:
        return broken(rng, made)
    if kind == 2:
        return gzip.compress(made)
    return made + (made if kind == 3 else b"")
