"""Reading bodies: in bounded memory, of a bounded size, from clients that do send."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from tempfile import SpooledTemporaryFile
from typing import BinaryIO, cast

import anyio
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser

from farm.http.problems import Refusal

IDLE_S = 30.0
SLOWEST = 10_000  # bytes a second, on average, once IDLE_S have passed
IN_MEMORY = 1 << 20  # a larger file lies on the disk
_BLOCK = 1 << 20


def media_type(request: Request) -> str:
    """The body's type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def chunks(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Raises Refusal when it is too large (413) or stops coming (408)."""
    said = request.headers.get("content-length", "")
    size, stream, begun = 0, request.stream(), anyio.current_time()
    while True:
        if size > most or (said.isdigit() and int(said[:20]) > most):
            raise Refusal(413, "ERR_TOO_LARGE", f"the body is larger than {most:,} bytes")
        try:
            slow = begun + IDLE_S + size / SLOWEST
            with anyio.fail_after(min(IDLE_S, slow - anyio.current_time())):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            sentence = f"the body comes too slowly, or no byte of it for {IDLE_S:.0f} seconds"
            raise Refusal(408, "ERR_TIMEOUT", sentence) from None
        size += len(chunk)
        yield chunk


async def read(request: Request, most: int) -> bytes:
    """The whole body."""
    return b"".join([chunk async for chunk in chunks(request, most)])


async def spool(request: Request, most: int) -> BinaryIO:
    """The body as a file, to be closed by the caller."""
    file = SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
    try:
        async for chunk in chunks(request, most):
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return cast("BinaryIO", file)


async def form(request: Request, most: int) -> tuple[dict[str, str], str, BinaryIO]:
    """A multipart body of fields and one `file`: (fields, the file's name, the file).

    Raises Refusal (400) for a body that is none, RequestValidationError without a file.
    """
    parser = MultiPartParser(request.headers, chunks(request, most), max_files=1, max_fields=64)
    try:
        found = await parser.parse()
    except (MultiPartException, KeyError) as error:
        why = error.args[0] if isinstance(error, MultiPartException) else "it has no boundary"
        sentence = f"the multipart body cannot be read: {why}"
        raise Refusal(400, "ERR_INVALID", sentence) from None
    fields = {name: value for name, value in found.multi_items() if isinstance(value, str)}
    file = found.get("file")
    if file is None or isinstance(file, str):
        await found.close()
        fault = {"type": "missing", "loc": ("body", "file"), "msg": "a prompt file", "input": None}
        raise RequestValidationError([fault])
    return fields, file.filename or "", file.file


def digest(about: str, file: BinaryIO) -> str:
    """SHA-256 of what a request asks for and of its file, which is at its start again after it."""
    found = hashlib.sha256(about.encode())
    while block := file.read(_BLOCK):
        found.update(block)
    file.seek(0)
    return found.hexdigest()


def as_request_error(error: ValidationError, where: str) -> RequestValidationError:
    """A body's faults as FastAPI tells those of its own parameters."""
    faults = error.errors(include_url=False, include_context=False)
    return RequestValidationError([{**item, "loc": (where, *item["loc"])} for item in faults])
