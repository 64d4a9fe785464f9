"""The ASGI app: routes, problems, OpenAPI; what is not documented is refused."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from pydantic.json_schema import models_json_schema

from farm.http import batches, jobs, look, submit
from farm.http.frame import Frame
from farm.http.problems import Problem, Refusal, install
from farm.http.shapes import InlineOrder
from farm.http.state import State
from farm.service import Farm

_REF = "#/components/schemas/{model}"


def make_app(farm: Farm, *, open: bool) -> FastAPI:
    """The API of a farm. `open`: asks for no token, for a server that only this machine reaches."""
    app = _App(
        title="renderfarm",
        version=version("renderfarm"),
        summary="Prompts in, pictures out",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # these pages load scripts of strangers
        redoc_url=None,
        dependencies=[Depends(_known_query)],
        redirect_slashes=False,
    )
    app.state.here = State(farm, open=open)
    app.add_middleware(Frame)
    install(app)
    for room in (submit, batches, jobs, look):
        app.include_router(room.router)
    return app


class _App(FastAPI):
    """FastAPI whose OpenAPI has the schemas that routes name by reference."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            told = super().openapi()
            _, extra = models_json_schema(
                [(Problem, "validation"), (InlineOrder, "validation")], ref_template=_REF
            )
            told["components"]["schemas"] |= extra["$defs"]
        return self.openapi_schema or told


def _known_query(request: Request) -> None:
    """Raises Refusal for a query parameter that OpenAPI does not name: a typing error, mostly."""
    app: FastAPI = request.app
    path = app.openapi()["paths"].get(request.scope["route"].path, {})
    told = path.get(request.method.lower(), {}).get("parameters", [])
    known = sorted(item["name"] for item in told if item["in"] == "query")
    for name in request.query_params:
        if name not in known:
            what = ", ".join(known) or "none"
            sentence = f"unknown query parameter {name[:60]!r}; known: {what}"
            raise Refusal(422, "ERR_INVALID_PARAMETER", sentence)
