"""schemathesis against the served API: no 5xx, and no answer that OpenAPI does not tell.

HTTP_CASES: how many made-up requests each operation gets that follow its schema, and how many that
do not; `make fuzz` takes 180, which is more than 5,000 in all.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi

from farm.prompts import MAX_PICTURES
from tests.http_kit import HttpKit, serving

CASES = int(os.environ.get("HTTP_CASES", "30"))
LONGEST_URL = 5_000  # of 65,536 bytes the head of a request may have, each perhaps %-encoded
CHECKED = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_headers_conformance,
    openapi.response_schema_conformance,
    openapi.unsupported_method,
]
LIMITS = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES < 100,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def kit(
    tmp_path_factory: pytest.TempPathFactory, redis_server: Any, postgres_server: Any
) -> Iterator[HttpKit]:
    """On PostgreSQL, which refuses more than SQLite does."""
    home = tmp_path_factory.mktemp("schema")
    url = postgres_server.create_database()
    with serving(home, redis_server.url, database_url=url, guarded=True, http_rate=0) as kit:
        kit.http.headers["Authorization"] = f"Bearer {kit.token('admin')}"
        yield kit


@pytest.fixture(scope="module")
def done(kit: HttpKit) -> str:
    batch = kit.submit("a", "b")
    kit.render(batch)
    return batch


@pytest.fixture(scope="module")
def queued(kit: HttpKit) -> str:
    return kit.submit("a", "b", "c")


def test_what_openapi_says(kit: HttpKit, done: str, queued: str) -> None:
    """Of what is generated, two of three batches exist, and waits are short."""
    turns = itertools.count(1)

    def ask(case: Case) -> None:
        turn = next(turns)
        ends = case.path.endswith("/events")  # of a batch that is not done, it would not end
        if "batch" in case.path_parameters and (turn % 3 or ends):
            case.path_parameters["batch"] = done if turn % 3 == 1 or ends else queued
            if "idx" in case.path_parameters and turn % 2:
                case.path_parameters["idx"] = 0
        if "wait" in case.query:
            case.query["wait"] = _shorter(case.query["wait"])
        if isinstance(case.body, dict) and "n" in case.body and turn % 10:
            case.body["n"] = _fewer(case.body["n"])
        if len(case.formatted_path) + len(str(case.query)) > LONGEST_URL:
            return  # refused before the API sees it
        headers = {"Authorization": kit.http.headers["Authorization"]} if turn % 7 else {}
        case.call_and_validate(headers=headers, checks=CHECKED, timeout=60, allow_redirects=False)

    schema = schemathesis.openapi.from_url(f"{kit.url}/v1/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 19
    for operation in operations:
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not negatable(operation):
                continue
            limited = LIMITS(given(operation.as_strategy(generation_mode=mode))(ask))
            limited()
    print(f"\n{next(turns) - 1} cases")


def _shorter(wait: Any) -> Any:
    """Also of "59", which the server reads as a number."""
    try:
        return min(float(wait), 0.05)
    except (TypeError, ValueError):
        return wait


def _fewer(n: Any) -> Any:
    """Ten thousand jobs a request take minutes in all on a busy machine, and are no other case."""
    return n % 20 + 1 if type(n) is int and 20 < n <= MAX_PICTURES else n


def negatable(operation: APIOperation) -> bool:
    """Whether there is anything in a request that could be wrong."""
    return bool(operation.path_parameters or operation.query or operation.body)
