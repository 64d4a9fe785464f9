"""Files of weights: which may hold programs, which types they come in, their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")
"""Endings of pickled weights: loading them may run any code that stands in them."""
WTYPES = (
    "default", "f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
)  # fmt: skip
"""The types of weights that stable-diffusion.cpp makes, `default` being the file's own. Its lists
name others, on some of which it aborts the process (q8_1, q8_k, i8 to i64, f64)."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
