"""/v1/models, /v1/workers, /healthz, /readyz, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from farm.catalog import Lane
from farm.http import shapes
from farm.http.access import Reader, WholeFarm, paced
from farm.http.metrics import CONTENT_TYPE
from farm.http.problems import documented
from farm.http.state import Here
from farm.service import Farm
from farm.store import sessions, turns

router = APIRouter(tags=["farm"])
_TOLD = ("description", "licence", "licence_url", "terms", "attribution", "family", "sizes")


@router.get("/v1/models", response_model=shapes.Models, responses=documented(401, 403, 422))
def models(who: Reader, here: Here) -> Response:
    """The models that jobs may name, their lanes, and whether live workers serve them."""
    with here.farm.db.read() as connection:
        lanes = sessions.live_lanes(connection)
        backlog = turns.backlog(connection)
    queued: dict[str, int] = {}
    for (name, _), n in backlog.items():
        queued[name] = queued.get(name, 0) + n
    told = [_model(here.farm, name, lanes, queued) for name in sorted(here.farm.catalog.models)]
    return JSONResponse({"models": told})


def _model(farm: Farm, name: str, lanes: dict[Lane, int], queued: dict[str, int]) -> dict[str, Any]:
    entry = farm.catalog.models[name]
    served = [{"engine": e, "workers": lanes.get(Lane(name, e), 0)} for e in entry.engines]
    return {
        "name": name,
        **{field: getattr(entry, field) for field in _TOLD},
        "defaults": entry.defaults.model_dump(),
        "loras": sorted(farm.catalog.loras_for(name)),
        "lanes": served,
        "served": any(lane["workers"] for lane in served),
        "queued": queued.get(name, 0),
    }


@router.get("/v1/workers", response_model=shapes.Workers, responses=documented(401, 403, 422))
def workers(who: WholeFarm, here: Here) -> Response:
    """The live workers."""
    return JSONResponse({"workers": [worker.as_dict() for worker in here.farm.workers()]})


@router.get("/healthz", response_model=shapes.Health, responses=documented(422))
async def healthz() -> Response:
    """This process lives."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/readyz",
    response_model=shapes.Health,
    responses=documented(422, 429),
    dependencies=[Depends(paced)],
)
def readyz(here: Here) -> Response:
    """The database has its schema and the broker answers; else 503 and which of them does not."""
    with here.farm.db.read() as connection:
        sessions.live_lanes(connection)
    here.farm.broker.ping()
    return JSONResponse({"status": "ok"})


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text", "content": {"text/plain": {}}},
        **documented(401, 403, 422),
    },
)
def metrics(who: WholeFarm, here: Here) -> Response:
    """The farm in figures."""
    return Response(here.metrics.page(), media_type=CONTENT_TYPE)
