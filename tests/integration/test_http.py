"""The HTTP API on a real server: what it takes, tells, and refuses."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pyarrow
import pyarrow.parquet
import pytest
from prometheus_client.parser import text_string_to_metric_families

from farm.errors import OutOfMemory
from farm.store import jobs, owners
from tests.http_kit import SHAPES, HttpKit, png, serving
from tests.store_kit import Kit


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[HttpKit]:
    with serving(tmp_path, redis_url, http_max_body=100_000) as kit:
        yield kit


@pytest.fixture
def sql_kit(tmp_path: Path, redis_url: str, database_url: str) -> Iterator[HttpKit]:
    """On each database: for what SQL decides."""
    with serving(tmp_path, redis_url, database_url=database_url) as kit:
        yield kit


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    told: dict[str, Any] = answer.json()
    assert (told["status"], told["code"]) == (status, code), told
    assert told["request_id"] == answer.headers["x-request-id"]
    return told


def test_prompts_in_json(sql_kit: HttpKit) -> None:
    body = {"prompts": ["a", {"prompt": "b", "seed": 7}], "n": 2, "name": "x", "steps": 3}
    made = sql_kit.http.post("/v1/batches", json=body)
    assert made.status_code == 201
    told = made.json()
    assert (told["total"], told["counts"]["queued"], told["name"]) == (4, 4, "x")
    assert sql_kit.http.get(made.headers["location"]).json()["id"] == told["id"]
    jobs = sql_kit.http.get(f"/v1/batches/{told['id']}/jobs").json()["jobs"]
    assert [job["spec"]["seed"] for job in jobs[2:]] == [7, 8]
    assert {job["spec"]["steps"] for job in jobs} == {3}


def parquet(*prompts: str) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), file)
    return file.getvalue()


FILES = {
    "application/jsonl": b'{"prompt": "a"}\n{"prompt": "b", "steps": 3}\n',
    "application/x-ndjson": b'{"prompt": "a"}\n{"prompt": "b"}\n',
    "text/csv; charset=utf-8": b"prompt,seed\na,1\nb,2\n",
    "text/tab-separated-values": b"prompt\tseed\na\t1\nb\t2\n",
    "text/plain": b"a\nb\n",
    "application/vnd.apache.parquet": parquet("a", "b"),
    "text/plain; charset=UTF-8": gzip.compress(b"a\nb\n"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_prompt_file_as_the_body(kit: HttpKit, kind: str) -> None:
    query = {"n": 3, "name": "tonight", "steps": 2, "loras": ""}
    headers = {"Content-Type": kind}
    made = kit.http.post("/v1/batches", params=query, content=FILES[kind], headers=headers)
    assert made.status_code == 201, made.text
    assert (made.json()["total"], made.json()["name"]) == (6, "tonight")


def test_a_prompt_file_in_a_form(kit: HttpKit) -> None:
    made = kit.http.post(
        "/v1/batches", files={"file": ("p.csv", b"prompt\na\nb\n")}, data={"n": "2"}
    )
    assert (made.json()["total"], made.json()["name"]) == (4, "p.csv")
    problem(kit.http.post("/v1/batches", files={"x": b"a"}), 422, "ERR_INVALID_PARAMETER")
    strange = kit.http.post("/v1/batches", files={"file": ("p.exe", b"a")})
    problem(strange, 422, "ERR_INVALID_PROMPT_FILE")
    headers = {"Content-Type": "multipart/form-data"}
    problem(kit.http.post("/v1/batches", content=b"x", headers=headers), 400, "ERR_INVALID")


def test_every_bad_row_is_told_and_nothing_is_queued(kit: HttpKit) -> None:
    rows = ["fine", {"prompt": "b", "width": 3}, {"prompt": "", "colour": 1}]
    told = problem(kit.http.post("/v1/batches", json={"prompts": rows}), 422,
                   "ERR_INVALID_PROMPT_FILE")  # fmt: skip
    found = {(fault["line"], fault["field"]) for fault in told["errors"]}
    assert found == {(2, "width"), (3, "prompt"), (3, "colour")}
    assert kit.http.get("/v1/batches").json() == {"batches": [], "next": None}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompts": []}, "body.prompts"),
        ({"prompts": ["a"], "wide": 3}, "body.wide"),
        ({"prompts": ["a"], "n": 0}, "body.n"),
        ({"prompts": ["a"], "name": "a\x00b"}, "body.name"),
        ([], "body"),
    ],
)
def test_a_wrong_order_is_refused_by_field(kit: HttpKit, body: Any, field: str) -> None:
    told = problem(kit.http.post("/v1/batches", json=body), 422, "ERR_INVALID_PARAMETER")
    assert field in {fault["field"] for fault in told["errors"]}


def test_broken_text_is_told_not_choked_on(sql_kit: HttpKit) -> None:
    headers = {"Content-Type": "application/jsonl"}
    row = b'{"prompt": "\\ud800", "\\udfff": 1}\n'
    told = problem(sql_kit.http.post("/v1/batches", content=row, headers=headers), 422,
                   "ERR_INVALID_PROMPT_FILE")  # fmt: skip
    assert {fault["field"] for fault in told["errors"]} == {"prompt", "row"}
    named = {"file": ("a\x01.txt", b"a\n")}
    assert sql_kit.http.post("/v1/batches", files=named).status_code in (201, 422)
    raw = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a\x00b.txt"\r\n\r\n'
        b"a\r\n--b--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert sql_kit.http.post("/v1/batches", content=raw, headers=headers).status_code == 422
    deep = {"prompt": "a", "seed": [[[[]]]]}
    assert sql_kit.http.post("/v1/batches", json={"prompts": [deep]}).status_code == 422
    huge = b'{"prompts": ["a"], "n": ' + b"9" * 5000 + b"}"
    headers = {"Content-Type": "application/json"}
    assert sql_kit.http.post("/v1/batches", content=huge, headers=headers).status_code == 422
    nested = b"[" * 100_000
    assert sql_kit.http.post("/v1/batches", content=nested, headers=headers).status_code == 422


def test_what_is_not_known_is_refused(kit: HttpKit) -> None:
    batch = kit.submit()
    for path in ("/v1/batches?pge=2", f"/v1/batches/{batch}?weight=1", "/metrics?x", "/healthz?x"):
        told = problem(kit.http.get(path), 422, "ERR_INVALID_PARAMETER")
        assert "unknown query parameter" in told["detail"]
    problem(kit.http.get("/v1/batches/zzzzzzzzzzzzzzzz"), 404, "ERR_NOT_FOUND")
    problem(kit.http.get("/v1/batches/nonsense"), 422, "ERR_INVALID_PARAMETER")
    problem(kit.http.get(f"/v1/jobs/{batch}/99"), 404, "ERR_NOT_FOUND")
    problem(kit.http.get("/v2"), 404, "ERR_NOT_FOUND")
    problem(kit.http.delete(f"/v1/batches/{batch}"), 405, "ERR_METHOD_NOT_ALLOWED")
    headers = {"Content-Type": "image/gif"}
    problem(kit.http.post("/v1/batches", content=b"x", headers=headers), 415, "ERR_MEDIA_TYPE")
    headers = {"Content-Type": "text/plain", "Content-Encoding": "gzip"}
    problem(kit.http.post("/v1/batches", content=b"x", headers=headers), 415, "ERR_MEDIA_TYPE")


def test_a_large_body_is_refused_said_or_not(kit: HttpKit) -> None:
    headers = {"Content-Type": "text/plain"}
    said = kit.http.post("/v1/batches", content=b"a\n" * 60_000, headers=headers)
    problem(said, 413, "ERR_TOO_LARGE")
    chunked = kit.http.post("/v1/batches", content=iter([b"a\n" * 30_000] * 2), headers=headers)
    problem(chunked, 413, "ERR_TOO_LARGE")
    assert kit.http.get("/v1/batches").json()["batches"] == []


def test_no_file_of_the_server_is_read(kit: HttpKit, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    row = {"prompt": "a", "init_image": str(tmp_path / "secret.png")}
    told = problem(kit.http.post("/v1/batches", json={"prompts": [row]}), 422,
                   "ERR_INVALID_PROMPT_FILE")  # fmt: skip
    assert "files of this machine" in told["errors"][0]["got"]


def test_input_pictures(kit: HttpKit) -> None:
    headers = {"Content-Type": "image/png"}
    names = {
        kit.http.post("/v1/inputs", content=png(3), headers=headers).json()["name"]
        for _ in range(2)
    }
    [name] = names
    made = kit.http.post("/v1/batches", json={"prompts": [{"prompt": "a", "init_image": name}]})
    assert made.status_code == 201, made.text
    broken = kit.http.post("/v1/inputs", content=png(3)[:40], headers=headers)
    problem(broken, 422, "ERR_INVALID_PARAMETER")


def test_a_key_makes_one_batch(sql_kit: HttpKit) -> None:
    def send(content: bytes) -> httpx.Response:
        headers = {"Content-Type": "text/plain", "Idempotency-Key": "k1"}
        return sql_kit.http.post("/v1/batches", content=content, headers=headers)

    first, again = send(b"a\nb\n"), send(b"a\nb\n")
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    problem(send(b"a\nc\n"), 422, "ERR_KEY_REUSED")
    headers = {"Idempotency-Key": "k2"}
    refused = sql_kit.http.post("/v1/batches", json={"prompts": [""]}, headers=headers)
    assert refused.status_code == 422
    mended = sql_kit.http.post("/v1/batches", json={"prompts": ["a"]}, headers=headers)
    assert mended.status_code == 201, "a refused request uses no key up"


def test_a_key_makes_one_batch_of_many_at_once(sql_kit: HttpKit) -> None:
    body = {"prompts": [f"number {i}" for i in range(300)]}

    def send(_: int) -> httpx.Response:
        with httpx.Client(base_url=sql_kit.url, timeout=60) as http:
            return http.post("/v1/batches", json=body, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(send, range(8)))
    assert {answer.status_code for answer in found} <= {200, 201, 409}
    assert sum(answer.status_code == 201 for answer in found) == 1
    assert len(sql_kit.http.get("/v1/batches").json()["batches"]) == 1


def test_pages(sql_kit: HttpKit) -> None:
    made = [sql_kit.submit("a", "b", "c") for _ in range(5)]
    seen, before = [], None
    while True:
        query = {"limit": 2} | ({"before": before} if before else {})
        page = sql_kit.http.get("/v1/batches", params=query).json()
        seen += [batch["id"] for batch in page["batches"]]
        before = page["next"]
        if not before:
            break
    assert sorted(seen) == sorted(made)
    assert seen == sorted(seen, reverse=True)
    first = sql_kit.http.get(f"/v1/batches/{made[0]}/jobs?limit=2&state=queued").json()
    assert [job["idx"] for job in first["jobs"]] == [0, 1]
    rest = sql_kit.http.get(f"/v1/batches/{made[0]}/jobs", params={"after": first["next"]}).json()
    assert ([job["idx"] for job in rest["jobs"]], rest["next"]) == ([2], None)


def test_pause_resume_cancel_redrive(sql_kit: HttpKit) -> None:
    batch = sql_kit.submit("a", "b", "c")
    path = f"/v1/batches/{batch}"
    assert sql_kit.http.post(f"{path}/pause").json()["paused"] is True
    assert sql_kit.http.post(f"{path}/resume").json()["paused"] is False
    assert sql_kit.http.post(f"/v1/jobs/{batch}/1/cancel").json() == {"cancelled": 1, "stopping": 0}
    assert sql_kit.http.post(f"{path}/cancel").json() == {"cancelled": 2, "stopping": 0}
    assert sql_kit.http.post(f"{path}/redrive").json() == {"queued": 0}
    assert sql_kit.http.post(f"{path}/redrive?cancelled=true").json() == {"queued": 3}
    problem(sql_kit.http.post(f"{path}/redrive?code=oops"), 422, "ERR_INVALID_PARAMETER")


def test_results_and_pictures(sql_kit: HttpKit) -> None:
    batch = sql_kit.submit("a", "b", "c")
    sql_kit.render(batch, limit=2)
    lines = sql_kit.http.get(f"/v1/batches/{batch}/results").text.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["idx"] for row in rows] == [0, 1]
    picture = sql_kit.http.get(rows[1]["picture"])
    assert (picture.content, picture.headers["content-type"]) == (png(1), "image/png")
    etag = {"If-None-Match": picture.headers["etag"]}
    assert sql_kit.http.get(rows[1]["picture"], headers=etag).status_code == 304
    rest = sql_kit.http.get(f"/v1/batches/{batch}/results?after=0").text.splitlines()
    assert rest == lines[1:]
    problem(sql_kit.http.get(f"/v1/jobs/{batch}/2/picture"), 404, "ERR_NO_PICTURE")
    sql_kit.farm.blobs.delete([rows[0]["object_key"]])
    problem(sql_kit.http.get(rows[0]["picture"]), 404, "ERR_BLOB_NOT_FOUND")


def test_models_workers_metrics(sql_kit: HttpKit) -> None:
    batch = sql_kit.submit("a", "b", "c")
    [shapes] = sql_kit.http.get("/v1/models").json()["models"]
    assert (shapes["name"], shapes["served"], shapes["queued"]) == ("shapes", False, 3)
    sql_kit.http.get("/metrics")
    sql_kit.render(batch, limit=1)
    assert sql_kit.http.get("/v1/models").json()["models"][0]["served"] is True
    assert [w["model"] for w in sql_kit.http.get("/v1/workers").json()["workers"]] == ["shapes"]
    store = Kit(sql_kit.farm.db)
    [held] = store.claim(batch, store.session(lane=SHAPES), 1, SHAPES)
    with sql_kit.farm.db.write() as connection:
        jobs.fail(connection, held, OutOfMemory())
    text = sql_kit.http.get("/metrics").text
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["farm_jobs", "succeeded"] == found["farm_jobs", "failed"] == 1
    assert found["farm_failures_total", "ERR_OUT_OF_MEMORY", "failed"] == 1
    assert found["farm_backlog_jobs", "", "shapes"] == 1
    assert 0 <= found["farm_oldest_wait_seconds", "", "shapes"] < 60
    assert found["farm_workers", "diffusers", "idle", "shapes"] == 2
    spooled = [n for name, n in found.items() if name[0] == "farm_worker_spooled_pictures"]
    assert spooled == [0, 0]


def test_health_and_readiness(kit: HttpKit, tmp_path: Path) -> None:
    assert kit.http.get("/healthz").json() == {"status": "ok"}
    assert kit.http.get("/readyz").json() == {"status": "ok"}
    with serving(tmp_path / "other", "redis://127.0.0.1:9/0") as other:
        assert other.http.get("/healthz").status_code == 200
        told = problem(other.http.get("/readyz"), 503, "ERR_BROKER_UNAVAILABLE")
        assert "127.0.0.1" not in told["detail"]


def test_request_ids(kit: HttpKit) -> None:
    given = kit.http.get("/v2", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "abc-1"
    forged = kit.http.get("/v2", headers={"X-Request-ID": "a b"}).headers["x-request-id"]
    assert forged != "a b"


def test_a_picture_on_s3_is_a_link(
    tmp_path: Path, redis_url: str, s3_bucket: str, s3_server: Any
) -> None:
    s3 = s3_server.options()
    told = {
        "blobs_url": f"s3://{s3_bucket}/farm", "s3_endpoint_url": s3.endpoint_url,
        "s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key, "s3_region": s3.region,
    }  # fmt: skip
    with serving(tmp_path, redis_url, guarded=True, **told) as kit:
        kit.http.headers["Authorization"] = f"Bearer {kit.token('admin')}"
        batch = kit.submit("a")
        kit.render(batch)
        path = f"/v1/jobs/{batch}/0/picture"
        assert kit.http.get(path).status_code == 307
        assert kit.http.get(path, follow_redirects=True).content == png(0)


def test_a_submit_over_its_owners_limit_is_asked_to_wait(kit: HttpKit) -> None:
    with kit.farm.db.write() as connection:
        owners.set_limits(connection, "alice", owners.Limits(max_queued=2))
    body = {"prompts": ["a", "b", "c"], "owner": "alice"}
    answer = kit.http.post("/v1/batches", json=body)
    assert "may have 2 jobs queued" in problem(answer, 429, "ERR_QUOTA_EXCEEDED")["detail"]
    assert answer.headers["retry-after"] == "60"
    assert kit.farm.batches() == []


def test_a_batch_after_another_with_a_deadline(kit: HttpKit) -> None:
    first = kit.submit("a")
    order = {"prompts": ["b"], "after": first, "expires_s": 3600, "reuse": False}
    answer = kit.http.post("/v1/batches", json=order)
    assert answer.status_code == 201
    found = answer.json()
    assert (found["after"], found["waits"]) == (first, True)
    assert found["expires_at"] > found["created_at"]
    nowhere = kit.http.post("/v1/batches", json={"prompts": ["b"], "after": "0" * 16})
    problem(nowhere, 404, "ERR_NOT_FOUND")
