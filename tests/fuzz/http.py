"""Hostile requests to the real ASGI app in this process: documented answers, and no 5xx.

Every byte of a request is drawn: path, query, headers, body and its encodings, multipart files,
bodies that end early. `schema` and `wire` ask a served farm; here there are many more a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from farm import parquet_rows
from farm.config import Settings
from farm.http.app import make_app
from farm.service import Farm
from farm.store import schema, tokens
from tests.farm_kit import FAKES
from tests.fuzz import pictures, prompts, words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.runner_kit import NoBroker

BATCH_ID = "0f9k2m4x7q3w5t8b"
TYPES = (
    "application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/csv",
    "text/plain", "text/tab-separated-values", "application/jsonl", "application/x-ndjson",
    "image/png", "image/webp", "application/vnd.apache.parquet", "application/xml",
    "application/x-python-serialize", "",
)  # fmt: skip
HEADERS = (
    (b"content-encoding", b"gzip"), (b"content-encoding", b"identity"), (b"transfer-encoding",
    b"chunked"), (b"idempotency-key", b"k1"), (b"idempotency-key", b"\xff\xfe"),
    (b"idempotency-key", b"a" * 300), (b"if-none-match", b'"x"'), (b"if-none-match", b"*"),
    (b"if-none-match", b"W/" * 3_000), (b"last-event-id", b"9" * 90), (b"host", b"[::1"), (b"host",
    b"evil.example"), (b"origin", b"null"), (b"origin", b"http://[x"), (b"x-request-id",
    b"a\x80b"), (b"x-request-id", b"x" * 999), (b"range", b"bytes=0-"), (b"accept", b"\x00"),
    (b"x-forwarded-for", b"1.2.3.4"), (b"x-http-method-override", b"DELETE"), (b"content-length",
    b"99999999999999999999"), (b"content-length", b"-1"), (b"content-length", b"x"), (b"expect",
    b"100-continue"), (b"upgrade", b"websocket"), (b"cookie", b"a=" + b"b" * 5_000),
)  # fmt: skip
METHODS = (
    "GET",
    "GET",
    "POST",
    "POST",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "X",
)
STREAMS = ("/events", "/results")


@dataclass
class Asked:
    """A request as ASGI has it; `cut`: the client goes away before the end of the body."""

    method: str
    path: bytes
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    cut: bool = False


@dataclass
class Answer:
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    (data / "models.toml").write_text(FAKES)
    guard.may_run.add(parquet_rows.__file__)
    settings = Settings(  # a rate would hide the rest
        home=data, models_file=data / "models.toml", http_max_body=2**22, http_rate=0
    )
    with Farm(settings) as farm, asyncio.Runner() as runner:
        farm.__dict__["broker"] = NoBroker()
        schema.upgrade(farm.db)
        known = [farm.submit(["a", "b"], model="fake-fast", owner=who).id for who in ("", "ada")]
        farm.cancel(known[1])  # its events end
        with farm.db.write() as connection:
            keys = [
                tokens.create(connection, "t", scopes, owner=owner)[1]
                for scopes, owner in (
                    (("admin",), ""),
                    (("read",), ""),
                    (("submit", "read"), "ada"),
                )
            ]
        app = make_app(farm, open=False)
        routes = sorted(app.openapi()["paths"].items())

        def judge(case: Case) -> str:
            asked = drawn(case, routes, known, keys)
            case.told = repr(asked)
            answer = runner.run(ask(app, asked))
            check(routes, asked, answer)
            return str(answer.status)

        yield judge


# ---- requests


def drawn(case: Case, routes: list[Any], known: list[str], keys: list[str]) -> Asked:
    rng = case.rng
    path, methods = rng.choice(routes)
    if rng.randrange(3) == 0:
        path, methods = rng.choice([r for r in routes if "post" in r[1]])
    method = rng.choice([name.upper() for name in methods] * 4 + [rng.choice(METHODS)])
    ends = known[1:] if path.endswith(STREAMS) else known
    filled = path.replace("{batch}", _part(rng, (*ends, *ends, BATCH_ID)))
    filled = filled.replace("{idx}", _part(rng, ("0", "0", "1", "999")))
    if rng.randrange(25) == 0:
        filled += rng.choice(
            ("/", "//", "/..", "/../../etc/passwd", "%2e%2e/", words.text(rng)[:200])
        )
    headers = [(b"host", b"127.0.0.1:8000")]
    if rng.randrange(12):
        headers.append((b"authorization", b"Bearer " + rng.choice((keys[0], *keys)).encode()))
    elif rng.randrange(2):
        odd = rng.choice(("Basic YTpi", "Bearer ", "Bearer farm_x", words.text(rng)))
        headers.append((b"authorization", odd.encode("utf-8", "surrogatepass")))
    body = b""
    if method in ("POST", "PUT", "PATCH"):
        kind, body = _body(rng, path)
        headers.append((b"content-type", kind.encode("utf-8", "surrogatepass")))
    headers += [rng.choice(HEADERS) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
    query = _query(rng, methods.get(method.lower(), {}), known)
    return Asked(
        method, filled.encode("utf-8", "surrogatepass"), query, headers, body, case.one_in(50)
    )


def _part(rng: Random, good: tuple[str, ...]) -> str:
    return rng.choice(good) if rng.randrange(3) else words.text(rng)[:300]


def _query(rng: Random, operation: dict[str, Any], known: list[str]) -> bytes:
    """Parameters that are documented, with any value, and some that are not."""
    names = [p["name"] for p in operation.get("parameters", []) if p["in"] == "query"]
    pairs = []
    for name in rng.sample(names, rng.randrange(min(len(names), 3) + 1)):
        given = rng.choice(words.GOOD[name]) if name in words.GOOD and rng.randrange(2) else None
        value = (
            given
            if given is not None
            else rng.choice((words.text(rng), rng.choice(words.NUMBERS), known[0]))
        )
        if name == "wait":
            value = rng.choice((0, 0.01, "nan", "-1", "1e999", "x"))
        pairs.append((name, str(value)[:5_000]))
    if rng.randrange(15) == 0:
        pairs.append((words.text(rng)[:100], words.text(rng)[:100]))
    joined = "&".join(f"{_quoted(rng, name)}={_quoted(rng, value)}" for name, value in pairs)
    return joined.encode("utf-8", "surrogatepass") + rng.choice((b"",) * 9 + (b"&&=%zz%ff\xff;",))


def _quoted(rng: Random, text: str) -> str:
    raw = text.encode("utf-8", "surrogatepass")
    return quote_from_bytes(raw) if rng.randrange(9) else raw.decode("latin-1")


def _body(rng: Random, path: str) -> tuple[str, bytes]:
    """A media type, and a body that mostly has it."""
    kind = rng.choice(TYPES)
    if path.endswith("/inputs"):
        kind = rng.choice(("image/png", "image/jpeg", kind))
        return kind, pictures.drawn(rng)
    if rng.randrange(2):
        kind = "application/json"
    if kind == "application/json":
        made = _order(rng)
        text = json.dumps(made, ensure_ascii=rng.random() < 0.7)
        if rng.randrange(20) == 0:
            text = rng.choice(
                ('{"prompts":' + "[" * 90_000, text[:-1] + ',"n":1e999}', text * 2, "null", "")
            )
        body = words.encoded(rng, text)
        return kind, words.broken(rng, body) if rng.randrange(6) == 0 else body
    form = rng.choice(prompts.FORMATS if rng.randrange(8) == 0 else prompts.TEXTS)
    content = prompts.hostile(rng, form)
    if "parquet" in kind and form != "parquet" and rng.randrange(4):
        kind = "text/csv"
    if kind.startswith("multipart"):
        return kind, _multipart(rng, form, content)
    return kind, content


def _order(rng: Random) -> Any:
    wrong = rng.choice((0.0, 0.2, 0.6))
    order = {"model": "fake-fast"} | {
        n: v for n, v in words.row(rng, wrong).items() if n != "prompt"
    }
    order["prompts"] = [
        words.text(rng) if rng.randrange(2) else words.row(rng, wrong)
        for _ in range(rng.randrange(4))
    ]
    if rng.random() < wrong:
        order[
            rng.choice(("prompts", "name", "owner", "after", "expires_s", "priority", "reuse"))
        ] = words.value(rng)
    if type(order.get("n")) is int and order["n"] > 20:
        order["n"] = 20_000
    return order if rng.randrange(15) else words.value(rng)


def _multipart(rng: Random, form: str, content: bytes) -> bytes:
    """A form with a file, its parts' heads good or not."""
    name = rng.choice((f"a.{form}", "../../x.csv", words.text(rng)[:300], "a.csv.gz", ""))
    fields = [
        rng.choice((*words.GOOD, "name", words.text(rng)[:90]))
        for _ in range(rng.choice((0, 1, 3, 70)))
    ]
    made = b""
    for each in fields:
        head = f'--x\r\nContent-Disposition: form-data; name="{each}"\r\n\r\n'
        made += f"{head}{words.text(rng)[:500]}\r\n".encode("utf-8", "surrogatepass")
    head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    made += head.encode("utf-8", "surrogatepass") + content + b"\r\n"
    made *= rng.choice((1, 1, 1, 2))
    made += rng.choice((b"--x--\r\n", b"--x--\r\n", b"--x", b""))
    return words.broken(rng, made) if rng.randrange(4) == 0 else made


# ---- asking


async def ask(app: Any, asked: Asked) -> Answer:
    """One request, as a server does it (https://asgi.readthedocs.io/en/latest/specs/www.html)."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": unquote_to_bytes(asked.path).decode("utf-8", "replace"),
        "raw_path": asked.path,
        "root_path": "",
        "query_string": asked.query,
        "headers": asked.headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    size = 65_536
    blocks = [asked.body[at : at + size] for at in range(0, len(asked.body), size)] or [b""]
    todo: list[dict[str, Any]] = [
        {"type": "http.request", "body": block, "more_body": True} for block in blocks
    ]
    todo.append(
        {"type": "http.disconnect"} if asked.cut else {"type": "http.request", "more_body": False}
    )
    answer, done = Answer(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if todo:
            return todo.pop(0)
        with contextlib.suppress(TimeoutError):  # events of a batch that is queued again go on
            await asyncio.wait_for(done.wait(), 1)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], dict(message["headers"])
        else:
            answer.body += message.get("body", b"")
            if not message.get("more_body"):
                done.set()

    await app(scope, receive, send)
    return answer


def check(routes: list[Any], asked: Asked, answer: Answer) -> None:
    """A documented answer: a problem as JSON where it is one, and nothing of the inside."""
    if not 200 <= answer.status < 500:
        raise Finding(f"status {answer.status}: {answer.body[:800]!r}")
    if answer.status >= 400 and asked.method != "HEAD":
        problem = json.loads(answer.body)
        if problem["status"] != answer.status or not problem["code"].startswith("ERR_"):
            raise Finding(f"a problem that is none: {problem}")
        if answer.headers[b"content-type"] != b"application/problem+json":
            raise Finding(f"its type is {answer.headers}")
    if bad := [
        word
        for word in (b"Traceback", b"sqlalchemy", b"site-packages", b"root:x:")
        if word in answer.body
    ]:
        raise Finding(f"{bad} in {answer.body[:800]!r}")
    told = _documented(routes, asked)
    if told is not None and str(answer.status) not in told:
        raise Finding(f"{answer.status} is not among the documented {sorted(told)}")


def _documented(routes: list[Any], asked: Asked) -> set[str] | None:
    """The statuses of the operation, if the path is one that surely belongs to it."""
    place = asked.path.decode("latin-1").split("/")
    for path, methods in routes:
        parts = path.split("/")
        same = len(parts) == len(place) and all(
            a == b or (a[:1] == "{" and b.isalnum()) for a, b in zip(parts, place, strict=False)
        )
        if same and asked.method.lower() in methods:
            told = set(methods[asked.method.lower()]["responses"])
            return told | {"400"} if asked.cut else told
    return None
