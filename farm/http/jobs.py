"""/v1/jobs: one job, its picture, cancelling it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from farm.http import live, shapes
from farm.http.access import Reader
from farm.http.batches import (
    LOOK,
    NOT_MODIFIED,
    Changeable,
    IfNoneMatch,
    Visible,
    Wait,
    in_its_turn,
    shown,
    tagged,
)
from farm.http.problems import Refusal
from farm.http.state import Here
from farm.results import file_name
from farm.states import FINAL_STATES, JobState
from farm.store.ids import JobRef
from farm.store.reads import Job

LINK_S = 3600
router = APIRouter(prefix="/v1/jobs/{batch}/{idx}", tags=["jobs"])
Idx = Annotated[int, Path(ge=0, le=999_999_999, description="place in the batch, from 0")]
PICTURES: dict[str, dict[str, object]] = {f"image/{name}": {} for name in ("png", "webp", "jpeg")}


@router.get("", response_model=shapes.Job, responses={**LOOK, **NOT_MODIFIED})
async def job(
    request: Request,
    batch_id: Visible,
    idx: Idx,
    who: Reader,
    here: Here,
    wait: Wait = 0,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A job; `wait` as for a batch: until it has changed, or has ended."""
    ref = JobRef(batch_id, idx)
    found = await here.jobs.now(ref)

    def ready(seen: Job) -> bool:
        if if_none_match:
            return not live.matches(if_none_match, live.tag(seen))
        return JobState(seen.state) in FINAL_STATES

    if wait:
        soon = partial(here.jobs.soon, ref)
        here.waits.check(who.client)
        with here.waits.hold(who.client):
            found = await live.poll(request, found, soon, ready, wait, here.is_stopping)
    return tagged(request, found, shown(request, found))


@router.get(
    "/picture",
    name="picture",
    response_class=Response,
    responses={
        **LOOK,
        **NOT_MODIFIED,
        200: {"description": "The picture's file", "content": PICTURES},
        307: {"description": "A link to it in the picture store, valid for an hour"},
    },
)
def picture(
    request: Request, batch_id: Visible, idx: Idx, here: Here, if_none_match: IfNoneMatch = None
) -> Response:
    """A succeeded job's picture: a redirect to the store, or the file where it is local."""
    found = here.farm.job(JobRef(batch_id, idx))
    if found.state != JobState.SUCCEEDED or not found.object_key:
        raise Refusal(404, "ERR_NO_PICTURE", f"job {found.id} is {found.state}: no picture")
    etag = f'"{found.sha256}"'
    name = file_name(found)
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    if live.matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    link = here.farm.blobs.url(found.object_key, LINK_S)
    if not link.startswith("file:"):
        return RedirectResponse(link, 307)
    media_type = f"image/{found.spec['format']}"
    return Response(here.farm.fetch(found), headers=headers, media_type=media_type)


@router.post("/cancel", response_model=shapes.Cancelled, responses=LOOK)
async def cancel(batch_id: Changeable, idx: Idx, here: Here) -> Response:
    """Cancel one job: at once if it is queued, at its next step if it runs."""
    await here.jobs.now(JobRef(batch_id, idx))  # NotFound
    work = partial(here.farm.cancel, batch_id, idx)
    cancelled, stopping = await in_its_turn(here, work)
    return JSONResponse({"cancelled": cancelled, "stopping": stopping})
