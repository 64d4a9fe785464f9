"""/v1/batches: list, look, wait, follow, change, and all results as one stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from farm.http import live, shapes
from farm.http.access import Changer, Reader
from farm.http.problems import documented
from farm.http.state import Here, State
from farm.states import JobState
from farm.store import reads
from farm.store.batches import BatchStatus
from farm.store.reads import Job

MAX_WAIT_S = 60
JSONL = "application/jsonl"
_PAGE = 500
_TEXT = {"type": "string"}
_EVENT = {"type": "object", "properties": {"event": _TEXT, "id": _TEXT, "data": _TEXT}}
_CACHE = "private, no-cache"  # keep it, and ask each time whether it is still right
T = TypeVar("T")

router = APIRouter(prefix="/v1/batches", tags=["batches"])
BatchId = Annotated[
    str, Path(alias="batch", pattern=shapes.BATCH_ID, examples=[shapes.BATCH["id"]])
]
Wait = Annotated[
    float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a change; see below")
]
IfNoneMatch = Annotated[str | None, Header(max_length=4096)]
LOOK = documented(401, 403, 404, 422)
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "Nothing has changed since that ETag"}
}


def visible(batch_id: BatchId, who: Reader, here: Here) -> str:
    """The id of a batch that the asker may see."""
    if who.owner is not None:
        who.see(here.farm.status(batch_id).owner, batch_id)
    return batch_id


def changeable(batch_id: BatchId, who: Changer, here: Here) -> str:
    """The id of a batch that the asker may change."""
    if who.owner is not None:
        who.see(here.farm.status(batch_id).owner, batch_id)
    return batch_id


Visible = Annotated[str, Depends(visible)]
Changeable = Annotated[str, Depends(changeable)]


async def in_its_turn(here: State, work: Callable[[], T]) -> T:
    """Long work in a thread, a few at once, so that looks find threads free."""
    return await to_thread.run_sync(work, limiter=here.long)


def tagged(request: Request, state: live.State, body: dict[str, Any]) -> Response:
    """The state with its ETag, or 304 when the client has it."""
    etag = live.tag(state)
    headers = {"ETag": etag, "Cache-Control": _CACHE}
    if live.matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return JSONResponse(body, headers=headers)


def shown(request: Request, job: Job) -> dict[str, Any]:
    """A job with the URL of its picture."""
    picture = None
    if job.state == JobState.SUCCEEDED:
        picture = str(request.url_for("picture", batch=job.batch_id, idx=job.idx))
    return job.as_dict() | {"picture": picture}


@router.get("", response_model=shapes.Batches, responses=documented(401, 403, 422))
def list_batches(
    who: Reader,
    here: Here,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[
        str | None, Query(pattern=shapes.BATCH_ID, description="a page's `next`")
    ] = None,
    owner: Annotated[shapes.Label | None, Query()] = None,
) -> Response:
    """The newest batches first."""
    if who.owner is not None:
        owner = who.owner_of_new(owner or "")
    found = here.farm.batches(limit + 1, before=before, owner=owner)
    page = [status.as_dict() for status in found[:limit]]
    return JSONResponse({"batches": page, "next": page[-1]["id"] if len(found) > limit else None})


@router.get("/{batch}", response_model=shapes.Batch, responses={**LOOK, **NOT_MODIFIED})
async def batch(
    request: Request,
    batch_id: BatchId,
    who: Reader,
    here: Here,
    wait: Wait = 0,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """How far a batch is, at once whatever its size.

    `wait` holds the answer back for so many seconds at most: with If-None-Match until something
    has changed (else 304), without it until the batch is done.
    """
    status = await here.batches.now(batch_id)
    who.see(status.owner, batch_id)

    def ready(seen: BatchStatus) -> bool:
        if if_none_match:
            return not live.matches(if_none_match, live.tag(seen))
        return seen.done

    if wait:
        soon = partial(here.batches.soon, batch_id)
        here.waits.check(who.client)
        with here.waits.hold(who.client):
            status = await live.poll(request, status, soon, ready, wait, here.is_stopping)
    return tagged(request, status, status.as_dict())


@router.get(
    "/{batch}/events",
    response_class=StreamingResponse,
    responses={
        **LOOK,
        200: {"description": "`status` at each change, `done` at the end; data as GET gives it",
              "content": {"text/event-stream": {"schema": _EVENT}}},
    },
)  # fmt: skip
async def events(
    batch_id: BatchId,
    who: Reader,
    here: Here,
    last_event_id: Annotated[str | None, Header(max_length=100)] = None,
) -> Response:
    """Follow a batch by server-sent events until it is done."""
    status = await here.batches.now(batch_id)
    who.see(status.owner, batch_id)
    soon = partial(here.batches.soon, batch_id)

    def show(seen: BatchStatus) -> str:
        return json.dumps(seen.as_dict())

    async def stream() -> AsyncIterator[bytes]:
        with here.waits.hold(who.client):
            async for event in live.events(status, soon, show, last_event_id, here.is_stopping):
                yield event

    here.waits.check(who.client)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), headers=headers, media_type="text/event-stream")


States = Annotated[list[JobState], Query(alias="state", max_length=5)]
After = Annotated[int, Query(ge=-1, le=999_999_999, description="a page's `next`")]
Code = Annotated[str | None, Query(pattern=r"^ERR_[A-Z_]{1,36}$", description="of its error")]


@router.get("/{batch}/jobs", response_model=shapes.Jobs, responses=LOOK)
def jobs(
    request: Request,
    batch_id: Visible,
    here: Here,
    state: States = [],  # noqa: B006
    code: Code = None,
    within: Annotated[float | None, Query(ge=0, le=1e9, description="ended s ago or less")] = None,
    after: After = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The batch's jobs in order, those of some states, of an error or ended of late if asked."""
    here.farm.status(batch_id)  # NotFound
    chosen: Any = {"states": state, "code": code, "within_s": within, "after": after}
    with here.farm.db.read() as connection:
        found = reads.page(connection, batch_id, **chosen, limit=limit + 1)
    page = [shown(request, job) for job in found[:limit]]
    return JSONResponse({"jobs": page, "next": page[-1]["idx"] if len(found) > limit else None})


@router.get(
    "/{batch}/results",
    response_class=StreamingResponse,
    responses={
        **LOOK,
        200: {"description": "A job a line, with the URL of its picture",
              "content": {JSONL: {"schema": _TEXT}}},
    },
)  # fmt: skip
def results(
    request: Request,
    batch_id: Visible,
    here: Here,
    state: States = [JobState.SUCCEEDED],  # noqa: B006
    after: After = -1,
) -> Response:
    """All succeeded jobs that there are now, or those of other states, as a stream of JSON lines.

    Go on after an interruption with `after`, the `idx` of the last line.
    """
    here.farm.status(batch_id)  # NotFound

    def lines() -> Iterator[str]:
        last: int | None = after
        while last is not None:
            with here.farm.db.read() as connection:
                page = reads.page(connection, batch_id, states=state, after=last, limit=_PAGE)
            yield "".join(json.dumps(shown(request, job)) + "\n" for job in page)
            last = page[-1].idx if len(page) == _PAGE else None

    return StreamingResponse(lines(), media_type=JSONL)


def _set_paused(here: State, batch_id: str, paused: bool) -> Response:
    here.farm.pause(batch_id, paused)
    return JSONResponse(here.farm.status(batch_id).as_dict())


@router.post("/{batch}/pause", response_model=shapes.Batch, responses=LOOK)
def pause(batch_id: Changeable, here: Here) -> Response:
    """Hand out no more of its jobs; those that run are finished."""
    return _set_paused(here, batch_id, True)


@router.post("/{batch}/resume", response_model=shapes.Batch, responses=LOOK)
def resume(batch_id: Changeable, here: Here) -> Response:
    """Go on with a paused batch."""
    return _set_paused(here, batch_id, False)


@router.post("/{batch}/cancel", response_model=shapes.Cancelled, responses=LOOK)
async def cancel(batch_id: Changeable, here: Here) -> Response:
    """Cancel queued jobs at once, running ones at their next step."""
    cancelled, stopping = await in_its_turn(here, partial(here.farm.cancel, batch_id))
    return JSONResponse({"cancelled": cancelled, "stopping": stopping})


@router.post("/{batch}/redrive", response_model=shapes.Redriven, responses=LOOK)
async def redrive(
    batch_id: Changeable,
    here: Here,
    code: Code = None,
    cancelled: bool = False,
) -> Response:
    """Queue failed jobs again, those of one error code if given; with `cancelled` those too."""
    work = partial(here.farm.retry, batch_id, code=code, cancelled=cancelled)
    return JSONResponse({"queued": await in_its_turn(here, work)})
