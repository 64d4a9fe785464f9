"""Checkpoints of one file, safetensors or GGUF: are they whole, before native code reads them.

stable-diffusion.cpp believes what a header says: a file that is cut short, or whose offsets point
elsewhere, ends in a crash at some later time. So the whole header is read here first, and every
tensor it names must lie inside the file and beside, not upon, its neighbours.

Formats: https://huggingface.co/docs/safetensors/index (metadata parsing) and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from farm.errors import ModelNotLoaded
from farm.weight_files import PICKLES
from workers.engines.model_files import MOST_HEADER_BYTES

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)
MOST_DIMENSIONS = 5  # SD_MAX_DIMS of stable-diffusion.cpp
MOST_TENSORS = 1_000_000
MOST_NESTED_ARRAYS = 4

SAFETENSORS_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
GGUF_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY = 8, 9
# ggml's types by number: weights in a block and bytes of a block, from type_traits in ggml.c.
GGML_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
GGML_NAMES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0",
    10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 30: "bf16",
}  # fmt: skip


class Tensor(NamedTuple):
    """One tensor as a header has it; `begin` and `end` in bytes from the first tensor's.

    `shape`: outermost dimension first, as torch has it: (out, in) or (out, in, height, width).
    `kind`: the type of its numbers, such as f16 or q8_0.
    """

    name: str
    begin: int
    end: int
    shape: tuple[int, ...]
    kind: str


class _Broken(Exception):
    """What is wrong with a file, without its name."""


def check_checkpoint(file: Path) -> list[str]:
    """The names of the tensors in a file. Raises ModelNotLoaded, which names file and fault."""
    return [tensor.name for tensor in checked_tensors(file)]


def checked_tensors(file: Path) -> list[Tensor]:
    """The tensors in a file. Raises ModelNotLoaded, which names file and fault."""
    try:
        return _tensors(file)
    except (_Broken, OSError) as error:
        raise ModelNotLoaded(f"{file}: {error}") from None


def _tensors(file: Path) -> list[Tensor]:
    size = _size(file)
    with file.open("rb") as opened:
        start = opened.read(8)
        opened.seek(0)
        reader = _gguf if start[:4] == GGUF_MAGIC else _safetensors
        tensors, data = reader(opened, size)
    if not tensors:
        raise _Broken("holds no tensors")
    _check_places(tensors, size - data)
    return tensors


def _size(file: Path) -> int:
    """The size in bytes of what must be a regular file of a kind that is read."""
    try:
        status = file.stat()
    except OSError as error:
        raise _Broken(f"missing ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise _Broken("not a regular file")
    if file.suffix.lower() in PICKLES:
        raise _Broken(f"{file.suffix} files are not read, they can hold programs; convert it")
    if status.st_size == 0:
        raise _Broken("empty, 0 bytes")
    return status.st_size


def _check_places(tensors: list[Tensor], size: int) -> None:
    """Every tensor lies inside the `size` bytes that there are, and no two share any."""
    end = 0
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if not 0 <= tensor.begin <= tensor.end:
            raise _Broken(f"tensor {tensor.name[:80]}: its end lies before its beginning")
        if tensor.begin < end:
            raise _Broken(f"tensor {tensor.name[:80]}: overlaps the one before it")
        if tensor.end > size:
            raise _Broken(
                f"truncated, tensor {tensor.name[:80]} ends {tensor.end - size:,} bytes beyond it"
            )
        end = tensor.end


# ---------------------------------------------------------------------- safetensors
def _safetensors(file: BinaryIO, size: int) -> tuple[list[Tensor], int]:
    """The tensors, and where their data begin."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
        raise _Broken(f"neither safetensors nor GGUF, or truncated ({size:,} bytes)")
    try:
        header = json.loads(file.read(length))
        entries = [(n, entry) for n, entry in header.items() if n != "__metadata__"]
        tensors = [_safetensor(name, entry) for name, entry in entries]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Broken(f"its header is broken ({type(error).__name__}: {error})") from None
    return tensors, 8 + length


def _safetensor(name: str, entry: dict[str, object]) -> Tensor:
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if dtype not in SAFETENSORS_BYTES:
        raise _Broken(f"tensor {name[:80]}: unknown type {str(dtype)[:20]}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise _Broken(f"tensor {name[:80]}: its header has neither shape nor offsets")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, *offsets)):
        raise _Broken(f"tensor {name[:80]}: its shape or its offsets are no sizes")
    if len(shape) > MOST_DIMENSIONS:
        raise _Broken(f"tensor {name[:80]}: has {len(shape)} dimensions")
    begin, end = offsets
    wanted = math.prod(shape) * SAFETENSORS_BYTES[str(dtype)]
    if end - begin != wanted:
        raise _Broken(f"tensor {name[:80]}: {end - begin:,} bytes, its shape needs {wanted:,}")
    return Tensor(name, begin, end, tuple(shape), str(dtype).lower())


# ----------------------------------------------------------------------------- GGUF
def _gguf(file: BinaryIO, size: int) -> tuple[list[Tensor], int]:
    """The tensors, and where their data begin."""
    header = _Header(file, size)
    header.skip(len(GGUF_MAGIC))
    if (version := header.number(4)) not in GGUF_VERSIONS:
        raise _Broken(f"GGUF version {version}, known are 2 and 3")
    count, pairs = header.number(8), header.number(8)
    if max(count, pairs) > MOST_TENSORS:
        raise _Broken(f"its header tells of {count:,} tensors and {pairs:,} values")
    alignment = 32
    for _ in range(pairs):
        key, kind = header.text(), header.number(4)
        if key == "general.alignment" and kind == 4:
            alignment = header.number(4)
        else:
            header.skip_value(kind)
    tensors = list(_gguf_tensors(header, count))
    if alignment < 1 or alignment & (alignment - 1):
        raise _Broken(f"its alignment is {alignment:,}, which is no power of two")
    return tensors, -(-header.position // alignment) * alignment


def _gguf_tensors(header: _Header, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        name, dimensions = header.text(), header.number(4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Broken(f"tensor {name[:80]}: has {dimensions:,} dimensions")
        shape = [header.number(8) for _ in range(dimensions)]
        kind, begin = header.number(4), header.number(8)
        if kind not in GGML_BLOCKS:
            raise _Broken(f"tensor {name[:80]}: unknown type {kind}")
        weights, stored = GGML_BLOCKS[kind]
        if shape[0] % weights or not all(1 <= side < 2**48 for side in shape):
            raise _Broken(f"tensor {name[:80]}: its shape {shape} does not fit its type")
        end = begin + math.prod(shape) // weights * stored
        named = GGML_NAMES.get(kind, f"type {kind}")
        yield Tensor(name, begin, end, tuple(reversed(shape)), named)


class _Header:
    """The fields of a GGUF header one after the other; what is not there is told, not guessed."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.position = 0

    def _take(self, length: int) -> bytes:
        self._room(length)
        self.position += length
        return self._file.read(length)

    def _room(self, length: int) -> None:
        if length > self._size - self.position:
            raise _Broken("truncated inside its header")

    def number(self, length: int) -> int:
        return int(struct.unpack({4: "<I", 8: "<Q"}[length], self._take(length))[0])

    def text(self) -> str:
        length = self.number(8)
        if length > 65_535:
            raise _Broken(f"a name of {length:,} bytes in its header")
        return self._take(length).decode("utf-8", "replace")

    def skip(self, length: int) -> None:
        self._room(length)
        self.position += length
        self._file.seek(self.position)

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == GGUF_STRING:
            self.skip(self.number(8))
        elif kind == GGUF_ARRAY and depth < MOST_NESTED_ARRAYS:
            inner, count = self.number(4), self.number(8)
            if inner in GGUF_VALUE_BYTES:
                self.skip(count * GGUF_VALUE_BYTES[inner])
                return
            self._room(count)  # each takes eight bytes at the least
            for _ in range(count):
                self.skip_value(inner, depth + 1)
        elif kind in GGUF_VALUE_BYTES:
            self.skip(GGUF_VALUE_BYTES[kind])
        else:
            raise _Broken(f"its header has a value of the unknown type {kind}")
