"""The HTTP API under attack: every route without rights, strange pages, greedy and slow clients."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi.routing import APIRoute

from farm import client, submitting
from farm.errors import EnvironmentFault
from farm.http import bodies, run, state
from farm.http.limits import MOST_CLIENTS, Pace
from farm.http.problems import Refusal
from farm.store import tokens
from tests.farm_kit import until
from tests.http_kit import HttpKit, serving

PUBLIC = {"/healthz", "/readyz"}  # tell nothing but that
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X")
ZEROS = "z" * 16


@pytest.fixture
def kit(tmp_path: Path, redis_url: str) -> Iterator[HttpKit]:
    with serving(tmp_path, redis_url, guarded=True) as kit:
        yield kit


def routes(kit: HttpKit) -> list[tuple[str, str]]:
    """(method, path) of every route that the app has."""
    app = kit.server.config.app
    found = [
        (method, route.path)
        for room in app.router.routes
        if hasattr(room, "original_router")
        for route in room.original_router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    ]
    told = app.openapi()["paths"]
    assert {(m.upper(), path) for path, item in told.items() for m in item} == set(found)
    return sorted(found)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def ask(
    kit: HttpKit, method: str, path: str, batch: str, headers: dict[str, str]
) -> tuple[int, str]:
    """The status, and the sentence without the batch's name."""
    path = path.replace("{batch}", batch).replace("{idx}", "0")
    body = b"a\n" if (method, path) == ("POST", "/v1/batches") else b""
    given = {"Content-Type": "text/plain"} | headers
    answer = kit.http.request(method, path, headers=given, content=body)
    return answer.status_code, answer.json()["detail"].replace(batch, "")


def test_no_route_opens_without_its_right(kit: HttpKit) -> None:
    mine = kit.farm.submit(["a"]).id
    theirs = kit.farm.submit(["a"], owner="ada").id
    revoked = kit.token("admin")
    with kit.farm.db.write() as connection:
        tokens.revoke(connection, revoked.split("_")[1])
    no_token = [{}, bearer(kit.token("admin", valid_s=-1)), bearer(revoked), bearer("farm_a_b"),
                {"Authorization": f"Basic {kit.token('admin')}"},
                {"Cookie": f"token={kit.token('admin')}"},
                {"X-Forwarded-For": "127.0.0.1", "Host": "localhost"}]  # fmt: skip
    bob = bearer(kit.token("read", "submit", owner="bob"))
    other = {"GET": bearer(kit.token("submit")), "POST": bearer(kit.token("read"))}
    found = routes(kit)
    assert len(found) == 19
    for method, path in found:
        if path in PUBLIC:
            continue
        for headers in no_token:
            assert ask(kit, method, path, mine, headers)[0] == 401, (method, path, headers)
        assert ask(kit, method, path, mine, other[method])[0] == 403, (method, path)
        if "{batch}" in path:
            told = ask(kit, method, path, theirs, bob)
            assert told[0] == 404, (method, path)
            assert told == ask(kit, method, path, ZEROS, bob), "as one that is not"
    assert kit.farm.status(mine).counts["queued"] == kit.farm.status(theirs).counts["queued"] == 1
    assert len(kit.farm.batches()) == 2


def test_what_is_no_route_is_none(kit: HttpKit) -> None:
    admin = bearer(kit.token("admin"))
    for path in ("/docs", "/redoc", "/openapi.json", "/v1", "/", "/metrics/", "/v1/tokens",
                 "/v1/../etc/passwd", "/%2e%2e/etc/passwd", "/static/../../x"):  # fmt: skip
        assert kit.http.get(path, headers=admin).status_code == 404, path
    for method in METHODS:
        for route_method, path in routes(kit):
            if method != route_method and "{" not in path and "batches" not in path:
                assert kit.http.request(method, path, headers=admin).status_code == 405
    assert "farm_" not in kit.http.get("/v1/openapi.json").text.replace("farm_...", "")
    in_url = kit.http.get("/v1/batches", params={"token": kit.token("admin")})
    assert in_url.status_code == 422  # no parameter of ours


def raw(kit: HttpKit, request: bytes, after: bytes = b"") -> bytes:
    """What comes back for bytes that no library would send; `after`: sent after the answer."""
    got = b""
    port = int(kit.url.rpartition(":")[2])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as link,
        contextlib.suppress(ConnectionError),  # it answers before all is sent, and closes
    ):
        link.sendall(request)
        if after:
            got = link.recv(65_536)
            link.sendall(after)
        while block := link.recv(65_536):
            got += block
    return got


HOSTS = (
    b"[", b"[::1", b"a:b", b":", b"\xc3\xa9", b"evil/x?", b"a b", b"@", b"%00", b"", b"]",
)  # fmt: skip


@pytest.mark.parametrize("guarded", [False, True])
def test_a_host_that_is_none_is_no_fault_of_the_farm(
    tmp_path: Path, redis_url: str, guarded: bool
) -> None:
    with serving(tmp_path, redis_url, guarded=guarded) as kit:
        token = kit.token("admin") if guarded else "none"
        origin = b"" if guarded else b"Origin: http://[\r\n"
        for host in HOSTS:
            head = b"POST /v1/batches HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n" % host
            head += b"Authorization: Bearer %b\r\nContent-Type: text/plain\r\n" % token.encode()
            told = raw(kit, head + origin + b"Content-Length: 2\r\n\r\na\n")
            status = int(told.split(b" ", 2)[1])
            assert status in ((201, 400) if guarded else (400, 403)), (host, told)


def test_a_page_of_a_stranger_learns_nothing(tmp_path: Path, redis_url: str) -> None:
    """Without tokens: what a browser on this machine would send for a page from elsewhere."""
    with serving(tmp_path, redis_url) as kit:
        own = httpx.URL(kit.url).host
        for headers in (
            {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "file://"},
            {"Origin": "http://localhost.evil.example"}, {"Origin": "http://127.0.0.1.evil.example"},
            {"Origin": f"http://{own}@evil.example"}, {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example:80"}, {"Host": "0.0.0.0:80"}, {"Host": "2130706433"},
            {"Host": "localhost.:80"},
        ):  # fmt: skip
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json"):
                answer = kit.http.post(
                    "/v1/batches", content=b"a\n", headers={"Content-Type": kind, **headers}
                )
                assert answer.status_code == 403, headers
                assert "access-control-allow-origin" not in answer.headers
            assert kit.http.get("/v1/batches", headers=headers).status_code == 403
        assert kit.farm.batches() == []
        fine = kit.http.get("/v1/batches", headers={"Host": "[::1]:8000"})
        assert fine.status_code == 200
        assert fine.headers["cross-origin-resource-policy"] == "same-origin"
        preflight = kit.http.request(
            "OPTIONS", "/v1/batches", headers={"Access-Control-Request-Method": "POST"}
        )
        assert preflight.status_code == 405


def test_the_first_token_closes_an_open_server(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "TOKENS_EVERY_S", 0.0)
    with serving(tmp_path, redis_url) as kit:
        assert kit.http.get("/v1/batches").status_code == 200
        token = kit.token("read")
        assert kit.http.get("/v1/batches").status_code == 401
        assert kit.http.get("/v1/batches", headers=bearer(token)).status_code == 200
        with kit.farm.db.write() as connection:
            tokens.revoke(connection, token.split("_")[1])
        assert kit.http.get("/v1/batches").status_code == 401


# ---- limits


def test_a_bucket() -> None:
    now = [0.0]
    pace = Pace(10, lambda: now[0])
    for _ in range(50):  # five seconds' worth at once
        pace.take("a")
    with pytest.raises(Refusal) as caught:
        pace.take("a")
    assert (caught.value.status_code, caught.value.headers) == (429, {"Retry-After": "1"})
    pace.take("b")
    now[0] += 0.1
    pace.take("a")
    with pytest.raises(Refusal):
        pace.take("a")
    now[0] += 1e6
    for _ in range(50):
        pace.take("a")
    with pytest.raises(Refusal):
        pace.take("a")
    for i in range(MOST_CLIENTS + 10):
        pace.take(str(i))
    assert len(pace._left) == MOST_CLIENTS
    free = Pace(0)
    for _ in range(1000):
        free.take("a")


def refusal(
    kit: HttpKit, path: str, tries: int, headers: dict[str, str] | None = None
) -> httpx.Response:
    """The first answer that has the client wait; meanwhile it earns a request now and then."""
    answers = (kit.http.get(path, headers=headers) for _ in range(tries))
    return next(answer for answer in answers if answer.status_code == 429)


def test_a_greedy_client_waits_and_others_do_not(tmp_path: Path, redis_url: str) -> None:
    with serving(tmp_path, redis_url, guarded=True, http_rate=2) as kit:
        greedy, other = (bearer(kit.token("read")) for _ in range(2))
        statuses = [kit.http.get("/v1/models", headers=greedy).status_code for _ in range(10)]
        assert statuses == [200] * 10
        refused = refusal(kit, "/v1/models", 50, greedy)
        assert refused.json()["code"] == "ERR_RATE_LIMIT"
        assert refused.headers["retry-after"] == "1"
        assert kit.http.get("/v1/models", headers=other).status_code == 200
        guesses = {
            kit.http.get("/v1/models", headers=bearer(f"farm_{i}_x")).status_code for i in range(30)
        }
        assert guesses == {401, 429}
        assert refusal(kit, "/readyz", 5), "the same address: of its own, it would have 10"
        assert kit.http.get("/healthz").status_code == 200
        assert kit.http.get("/v1/models", headers=other).status_code == 200


def test_so_many_wait_at_once_and_no_more(tmp_path: Path, redis_url: str) -> None:
    with serving(tmp_path, redis_url, guarded=True, http_waits=2) as kit:
        mine, other = (bearer(kit.token("read")) for _ in range(2))
        batch = kit.farm.submit(["a"]).id
        path = f"/v1/batches/{batch}"
        held = kit.server.here.waits._held
        with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=kit.url, timeout=30) as http:
            poll = pool.submit(http.get, path, params={"wait": 20}, headers=mine)
            with kit.http.stream("GET", f"{path}/events", headers=mine) as stream:
                lines = stream.iter_lines()
                next(lines)
                until(lambda: sum(held.values()) == 2, 30)
                for waits in (f"{path}?wait=1", f"{path}/events", f"/v1/jobs/{batch}/0?wait=1"):
                    refused = http.get(waits, headers=mine)
                    assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
                assert http.get(path, headers=mine).status_code == 200
                assert http.get(f"{path}?wait=0.1", headers=other).status_code == 200
            kit.farm.cancel(batch)
            assert poll.result().json()["done"]
        until(lambda: not held, 30)


def test_few_bodies_of_one_client_come_at_once(
    kit: HttpKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit.server.here.uploads, "_most", 1)
    headers = bearer(kit.token("submit")) | {"Content-Type": "text/plain"}

    def slow() -> Iterator[bytes]:
        yield b"a\n"
        until(lambda: kit.server.here.uploads._held, 30)
        refused = httpx.post(f"{kit.url}/v1/batches", content=b"a\n", headers=headers)
        assert refused.status_code == 429
        yield b"b\n"

    assert kit.http.post("/v1/batches", content=slow(), headers=headers).json()["total"] == 2
    assert not kit.server.here.uploads._held


def test_a_batch_of_a_few_bytes_is_bounded(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "GIVE_UP", 3)
    with serving(tmp_path, redis_url, http_max_jobs=25_000) as kit:
        for body in ({"prompts": ["a", "b", "c"], "n": 10_000}, {"prompts": ["a"] * 25_001}):
            refused = kit.http.post("/v1/batches", json=body)
            assert (refused.status_code, refused.json()["errors"]) == (422, [])
            assert "more than 25,000 jobs" in refused.json()["detail"]
        headers = {"Content-Type": "text/csv"}
        bad = kit.http.post("/v1/batches", content=b"prompt,n\n" + b"a,0\n" * 9, headers=headers)
        assert (bad.status_code, len(bad.json()["errors"])) == (422, 3)
        assert "the rest was not read" in bad.json()["detail"]
        assert kit.farm.batches() == []
        assert kit.submit("a", "b", n=10_000)


def test_the_client_waits_for_its_turn(tmp_path: Path, redis_url: str) -> None:
    with (
        serving(tmp_path, redis_url, guarded=True, http_rate=5) as kit,
        client.FarmClient(kit.url, kit.token("read")) as asking,
    ):
        batch = kit.farm.submit(["a"]).id
        for _ in range(28):  # 25 at once, then 5 a second
            assert asking.status(batch).total == 1


# ---- slow clients


def test_a_head_that_does_not_come_is_not_waited_for(
    kit: HttpKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HEAD_S", 1.0)
    began = time.monotonic()
    assert raw(kit, b"") == raw(kit, b"GET / HTTP/1.1\r\nHost: a\r\n") == b""
    again = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    assert raw(kit, again, b"GET /he").startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began < 20
    until(lambda: not kit.server.server_state.connections, 30)
    batch = kit.farm.submit(["a"]).id  # what is under way is not cut off
    params, headers = {"wait": 3.0}, bearer(kit.token("read"))
    assert kit.http.get(f"/v1/batches/{batch}", params=params, headers=headers).status_code == 200


def test_a_drip_is_no_body(kit: HttpKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "IDLE_S", 0.5)
    monkeypatch.setattr(run, "HEAD_S", 0.5)
    headers = bearer(kit.token("submit")) | {"Content-Type": "text/plain"}

    def drip() -> Iterator[bytes]:
        while True:
            yield b"a"
            time.sleep(0.1)  # each within IDLE_S

    with contextlib.suppress(httpx.TransportError):
        answer = kit.http.post("/v1/batches", content=drip(), headers=headers)
        assert answer.status_code == 408
    assert kit.farm.batches() == []
    until(lambda: not kit.server.here.uploads._held, 30)


def test_heads_are_bounded(kit: HttpKit) -> None:
    for head in (b"X: " + b"x" * 200_000, b"X: y\r\n" * 50_000 + b"\r\n"):
        told = raw(kit, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + head)
        assert told[:12] in (b"", b"HTTP/1.1 400")  # a reset may overtake the answer


def test_no_password_of_the_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES_S", ())
    with (
        client.FarmClient("http://ada:geheim@127.0.0.1:1") as asked,
        pytest.raises(EnvironmentFault) as caught,
    ):
        asked.status("x")
    assert "geheim" not in str(caught.value)
