"""Submitting over HTTP: prompts in JSON, a prompt file as the body or in a form; input pictures."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from farm import prompt_files
from farm.errors import InvalidPromptFile
from farm.http import bodies, shapes
from farm.http.access import Access, Submitter
from farm.http.batches import in_its_turn
from farm.http.problems import Refusal, documented
from farm.http.shapes import FileOrder, InlineOrder
from farm.http.state import Here, State
from farm.inputs import MAX_BYTES
from farm.prompt_files import MEDIA_TYPES
from farm.store.batches import BatchStatus, Once

MAX_JSON = 16 << 20  # bytes; larger sets are files, which are read as a stream
PICTURES = ("image/png", "image/jpeg", "image/webp")
router = APIRouter(prefix="/v1", tags=["submit"])
_FILE = {"type": "string", "format": "binary"}
_INLINE = {"prompts": ["a red circle on a blue background"], "n": 4, "name": "tonight"}
_EXAMPLES = {
    "application/jsonl": {"example": '{"prompt": "a red circle", "seed": 7}\n'},
    "text/csv": {"example": "prompt,seed\na red circle,7\n"},
    "text/plain": {"example": "a red circle\na green star\n"},
}


class Submission(NamedTuple):
    """What to queue: rows, or a prompt file and its form; `sha256` of all that was asked."""

    about: dict[str, Any]
    rows: list[Any] | None
    file: BinaryIO
    form: str
    sha256: str


def _whole(order: BaseModel, query: FileOrder) -> dict[str, Any]:
    """What the body says over what the query says."""
    return query.model_dump(exclude_unset=True) | order.model_dump(exclude_unset=True)


async def _inline(request: Request, query: FileOrder, most: int) -> Submission:
    raw = await bodies.read(request, min(most, MAX_JSON))
    try:
        order = await run_in_threadpool(InlineOrder.model_validate_json, raw)
    except ValidationError as error:
        raise bodies.as_request_error(error, "body") from None
    about = _whole(order, query)
    rows = about.pop("prompts")
    file = io.BytesIO(raw)
    return Submission(about, rows, file, "", bodies.digest(repr(about), file))


async def _form(request: Request, query: FileOrder, most: int) -> Submission:
    fields, name, file = await bodies.form(request, most)
    if "name" not in fields and not query.name:
        fields["name"] = name[:200]
    try:
        about = _whole(FileOrder.model_validate(fields), query)
        form = prompt_files.guess_format(Path(name))
    except ValidationError as error:
        file.close()
        raise bodies.as_request_error(error, "body") from None
    except BaseException:
        file.close()
        raise
    return await _file(file, about, form)


async def _file(file: BinaryIO, about: dict[str, Any], form: str) -> Submission:
    sha256 = await run_in_threadpool(bodies.digest, f"{form} {about!r}", file)
    return Submission(about, None, file, form, sha256)


async def _read(request: Request, query: FileOrder, most: int) -> Submission:
    """Raises Refusal (413, 408, 415, 400) and RequestValidationError."""
    kind = bodies.media_type(request)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal(415, "ERR_MEDIA_TYPE", "send the body without a content encoding")
    if kind == "application/json":
        return await _inline(request, query, most)
    if kind == "multipart/form-data":
        return await _form(request, query, most)
    if kind in MEDIA_TYPES:
        about = query.model_dump(exclude_unset=True)
        return await _file(await bodies.spool(request, most), about, MEDIA_TYPES[kind])
    known = ", ".join(("application/json", "multipart/form-data", *MEDIA_TYPES))
    raise Refusal(415, "ERR_MEDIA_TYPE", f"the body's type is none of {known}")


def _bound(most: int, total: int) -> None:
    """Raises InvalidPromptFile for a batch that grows too large; what was queued of it goes."""
    if total > most:
        raise InvalidPromptFile(f"more than {most:,} jobs in one batch; nothing was queued")


def _carry_out(here: State, asked: Submission, once: Once | None) -> tuple[BatchStatus, bool]:
    """The batch, and whether an earlier request of the same key had made it."""
    if once and (before := here.farm.made_by(asked.about["owner"], once)):
        return before, True
    known: list[int] = []
    about: Any = asked.about | {"once": once, "resumed": known.append}
    about["progress"] = partial(_bound, here.farm.settings.http_max_jobs)
    about["files"] = False  # no file of this machine is read
    if asked.rows is not None:
        return here.farm.submit(asked.rows, **about), bool(known)
    return here.farm.submit_file(asked.file, form=asked.form, **about), bool(known)


_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/InlineOrder"},
            "example": _INLINE,
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": _FILE,
                    **{name: {"type": "string"} for name in FileOrder.model_fields},
                },
            }
        },
        **{kind: {"schema": _FILE, **_EXAMPLES.get(kind, {})} for kind in MEDIA_TYPES},
    },
}


@router.post(
    "/batches",
    status_code=201,
    response_model=shapes.Batch,
    responses={
        200: {"description": "What an earlier request with this key made", "model": shapes.Batch},
        **documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 429),
    },
    openapi_extra={"requestBody": _BODY},
)
async def submit(
    request: Request,
    who: Submitter,
    here: Here,
    query: Annotated[FileOrder, Query()],
    idempotency_key: Annotated[str | None, Header(pattern=r"^[!-~]{1,255}$")] = None,
) -> Response:
    """Queue a batch, whole or not at all; every bad line is told.

    The prompts stand in JSON, or in a prompt file as the body (its fields then in the query) or in
    a form. The same request with the same Idempotency-Key makes one batch, however often it comes.
    """
    here.uploads.check(who.client)
    with here.uploads.hold(who.client):
        made, again = await _submit(request, who, here, query, idempotency_key)
    place = str(request.url_for("batch", batch=made.id))
    return JSONResponse(made.as_dict(), 200 if again else 201, {"Location": place})


async def _submit(
    request: Request, who: Access, here: State, query: FileOrder, key: str | None
) -> tuple[BatchStatus, bool]:
    """The batch, and whether an earlier request of the same key had made it."""
    asked = await _read(request, query, here.farm.settings.http_max_body)
    try:
        asked.about["owner"] = who.owner_of_new(asked.about.get("owner", ""))
        if (after := asked.about.get("after")) and who.owner is not None:
            former = await run_in_threadpool(here.farm.status, after)
            who.see(former.owner, after)
        once = Once(key, asked.sha256) if key else None
        return await in_its_turn(here, partial(_carry_out, here, asked, once))
    finally:
        asked.file.close()


@router.post(
    "/inputs",
    status_code=201,
    response_model=shapes.Input,
    responses=documented(401, 403, 408, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _FILE} for kind in PICTURES},
        }
    },
)
async def add_input(request: Request, who: Submitter, here: Here) -> Response:
    """Store an input picture; rows name it as init_image or mask_image. The same is stored once."""
    if bodies.media_type(request) not in PICTURES:
        raise Refusal(415, "ERR_MEDIA_TYPE", f"the body's type is none of {', '.join(PICTURES)}")
    here.uploads.check(who.client)
    with here.uploads.hold(who.client):
        data = await bodies.read(request, MAX_BYTES)
        key = await in_its_turn(here, partial(here.farm.add_input, data))
    return JSONResponse({"name": f"blob:{key}"}, 201)
