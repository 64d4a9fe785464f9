"""What went wrong, as application/problem+json (RFC 9457) with the farm's stable codes."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from farm.errors import (
    AccessDenied,
    BlobNotFound,
    EnvironmentFault,
    FarmError,
    Invalid,
    InvalidConfig,
    InvalidPromptFile,
    NotFound,
    QuotaExceeded,
    RowError,
    SubmitInProgress,
)

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_CODES = {404: NotFound.code, 405: "ERR_METHOD_NOT_ALLOWED"}
_EXAMPLES = {
    400: ("ERR_INVALID", "the multipart body cannot be read"),
    401: (AccessDenied.code, "this farm wants a token: Authorization: Bearer farm_..."),
    403: (AccessDenied.code, "the token has not the scope submit"),
    404: (NotFound.code, "no batch '0f9k2m4x7q3w5t8b'; `farm status` lists them"),
    408: ("ERR_TIMEOUT", "the body comes too slowly, or no byte of it for 30 seconds"),
    409: (SubmitInProgress.code, SubmitInProgress().message),
    413: ("ERR_TOO_LARGE", "the body is larger than 1,073,741,824 bytes"),
    415: ("ERR_MEDIA_TYPE", "the body's type is none of application/json, text/csv"),
    422: (InvalidPromptFile.code, "1 thing is wrong; nothing was queued"),
    429: (QuotaExceeded.code, QuotaExceeded().message),
    500: (FarmError.code, "this is a fault of the farm; its log says more"),
    503: ("ERR_DATABASE_UNAVAILABLE", "The database does not answer."),
}


class Fault(BaseModel):
    """One wrong field of a line of a prompt file (from 1), or of the request (line null)."""

    line: int | None
    field: str
    got: str
    expected: str
    code: str


class Problem(BaseModel):
    """RFC 9457, with `code` as in all of the farm, and every fault that was found."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[Fault] = []


class Refusal(HTTPException):
    """A request that HTTP itself refuses: a status, a stable code and a sentence."""

    def __init__(
        self, status: int, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, headers)
        self.code = code


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with problems of these statuses."""
    limited = {429} if 401 in statuses else set()
    return {status: _documented(status) for status in sorted({*statuses, *limited, 500, 503})}


def _documented(status: int) -> dict[str, Any]:
    code, detail = _EXAMPLES[status]
    example = _body(status, code, detail, "9f1c2b7d")
    if status == 422:
        fault = RowError(3, "width", "100", "a multiple of 8 from 16 to 8192")
        example["errors"] = [vars(fault)]
    schema = {"$ref": "#/components/schemas/Problem"}
    content = {MEDIA_TYPE: {"schema": schema, "example": example}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _body(status: int, code: str, detail: str, request_id: str) -> dict[str, Any]:
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail,
            "code": code, "request_id": request_id, "errors": []}  # fmt: skip


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    *,
    errors: list[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """A problem as the answer to a request."""
    body = _body(status, code, detail, request.scope.get("state", {}).get("request_id", ""))
    body["errors"] = errors or []
    told = json.dumps(body)  # in ASCII: a client's broken text comes back escaped, never fails
    return Response(told, status, headers, MEDIA_TYPE)


def status_of(error: FarmError) -> int:
    """The HTTP status that a failure of the farm has."""
    if isinstance(error, NotFound | BlobNotFound):
        return 404
    if isinstance(error, SubmitInProgress):
        return 409
    if isinstance(error, QuotaExceeded):
        return 429
    if isinstance(error, EnvironmentFault | InvalidConfig):  # the server's, not the client's
        return 503
    return 422 if isinstance(error, Invalid) else 500


def shown(error: FarmError) -> str:
    """The sentence for a client; of the server's own troubles no address and no path."""
    if isinstance(error, EnvironmentFault | InvalidConfig) or status_of(error) == 500:
        return (type(error).__doc__ or "").strip().splitlines()[0]
    return error.message


def _farm_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FarmError)
    status = status_of(error)
    if status >= 500:
        log.error("%s %s: %s", request.method, request.url.path, error.message)
    rows = [vars(row) for row in getattr(error, "errors", [])]
    seconds = {409: "2", 429: "60", 503: "5"}.get(status)
    wait = {"Retry-After": seconds} if seconds else None
    return problem(request, status, error.code, shown(error), errors=rows, headers=wait)


def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = getattr(error, "code", _CODES.get(error.status_code, Invalid.code))
    headers = dict(error.headers or {})
    detail = error.detail
    if error.status_code == 404 and code == NotFound.code:
        detail = "there is no such resource; /v1/openapi.json lists them"
    return problem(request, error.status_code, code, detail, headers=headers)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [
        {
            "line": None,
            "field": ".".join(map(str, item["loc"])),
            "got": repr(item.get("input"))[:60],
            "expected": item["msg"],
            "code": "ERR_INVALID_PARAMETER",
        }
        for item in error.errors()[:1000]
    ]
    first = faults[0]
    detail = f"{first['field']}: {first['expected']}"
    return problem(request, 422, "ERR_INVALID_PARAMETER", detail, errors=faults)


def _gone(request: Request, error: Exception) -> Response:
    return problem(request, 400, Invalid.code, "the client went away before its body ended")


def _internal(request: Request, error: Exception) -> Response:
    return problem(request, 500, FarmError.code, _EXAMPLES[500][1])


def install(app: FastAPI) -> None:
    """Every failure of the app is answered as a problem."""
    app.add_exception_handler(FarmError, _farm_error)
    app.add_exception_handler(HTTPException, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _internal)
