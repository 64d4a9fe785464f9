"""FarmClient: a farm behind `farm serve`, used as `Farm` is.

from farm.client import FarmClient

with FarmClient("https://farm.internal", token="farm_...") as farm:
    batch = farm.submit(["a red circle on a blue background"], n=4)
    farm.wait(batch.id)
    farm.download(batch.id, "pictures")
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Any

from farm import prompt_files, results
from farm.config import redact
from farm.errors import (
    BlobDamaged,
    EnvironmentFault,
    FarmError,
    Invalid,
    InvalidConfig,
    InvalidPromptFile,
    NotFound,
    RowError,
    by_code,
)
from farm.pictures import EXTENSIONS, sha256
from farm.spec import JobSpec
from farm.states import JobState
from farm.store.batches import BatchStatus
from farm.store.ids import JobRef
from farm.store.reads import Job
from farm.store.sessions import Worker

try:
    import httpx2 as httpx
except ModuleNotFoundError as error:
    raise InvalidConfig("farm.client needs httpx2: pip install 'renderfarm[client]'") from error

WAIT_S = 30  # of one long poll
_TIMES = httpx.Timeout(10, read=WAIT_S + 30)
_LONG = httpx.Timeout(10, read=3600)  # the server works through a million rows
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_LOST = (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL)
_BLOCK = 1 << 16
MOST_BYTES = 1 << 30  # of one answer
_SOON_S = 5  # a limit that ends within so many seconds is waited for,
_PATIENCE_S = 60.0  # and so long in all
_TYPES = {form: kind for kind, form in reversed(prompt_files.MEDIA_TYPES.items())}


class FarmClient:
    """A farm over HTTP. Its methods are those of Farm and raise the same kinds of FarmError.

    What can be sent again without harm is, four times in 8 seconds, when the server is away; a
    submit too, since it carries an idempotency key. A limit that passes is waited for, a minute at
    most. Raises EnvironmentFault in the end.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers["Accept-Encoding"] = "identity"
        self._shown = redact(url)
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=_TIMES, transport=_Bounded(), max_redirects=3
        )

    # ---- submit

    def submit(
        self,
        items: str | Iterable[str | Mapping[str, Any]],
        *,
        n: int = 1,
        name: str = "",
        owner: str = "",
        priority: int = 0,
        **params: Any,
    ) -> BatchStatus:
        """As Farm.submit; input pictures are `blob:KEY` (see `add_input`) or `job:BATCH/INDEX`."""
        with SpooledTemporaryFile(1 << 20) as file:
            for item in [items] if isinstance(items, str) else items:
                row = {"prompt": item} if isinstance(item, str) else dict(item)
                file.write(json.dumps(row).encode() + b"\n")
            about = {"n": n, "name": name, "owner": owner, "priority": priority, **params}
            return self._submit(file, "jsonl", about)

    def submit_file(
        self,
        source: Path | str | IO[bytes],
        *,
        form: str | None = None,
        n: int = 1,
        name: str = "",
        owner: str = "",
        priority: int = 0,
        **params: Any,
    ) -> BatchStatus:
        """As Farm.submit_file; a stream must be one that can be read again from its start."""
        with contextlib.ExitStack() as stack:
            if isinstance(source, Path | str):
                path = Path(source)
                form, name = form or prompt_files.guess_format(path), name or path.name
                try:
                    source = stack.enter_context(path.open("rb"))
                except OSError as error:
                    raise InvalidPromptFile(f"{path}: {error.strerror}") from None
            about = {"n": n, "name": name, "owner": owner, "priority": priority, **params}
            return self._submit(source, form or "jsonl", about)

    def _submit(self, file: IO[bytes], form: str, about: dict[str, Any]) -> BatchStatus:
        if isinstance(about.get("loras"), Mapping):
            about["loras"] = ", ".join(f"{k}:{v}" for k, v in about["loras"].items())
        if form not in _TYPES:
            raise InvalidPromptFile(f"over HTTP a prompt file is one of {', '.join(_TYPES)}")
        headers = {"Content-Type": _TYPES[form], "Idempotency-Key": secrets.token_urlsafe(16)}

        def body() -> Iterator[bytes]:
            file.seek(0)
            while block := file.read(_BLOCK):
                yield block

        query = {k: v for k, v in about.items() if v not in (None, "")}
        path = "/v1/batches"
        made = self._ask("POST", path, params=query, headers=headers, body=body, timeout=_LONG)
        return _batch(made.json())

    def add_input(self, data: bytes) -> str:
        """Store an input picture (PNG, JPEG or WebP); its key, which rows name `blob:KEY`."""
        headers = {"Content-Type": "image/png"}  # the bytes tell which of the three it is
        answer = self._ask("POST", "/v1/inputs", headers=headers, body=lambda: iter([data]))
        return str(answer.json()["name"]).removeprefix("blob:")

    # ---- look

    def status(self, batch_id: str) -> BatchStatus:
        return _batch(self._ask("GET", f"/v1/batches/{batch_id}").json())

    def batches(self, limit: int = 20) -> list[BatchStatus]:
        """The newest batches first, 200 at most."""
        page = self._ask("GET", "/v1/batches", params={"limit": limit}).json()
        return [_batch(row) for row in page["batches"]]

    def job(self, ref: JobRef | str) -> Job:
        return _job(self._ask("GET", f"/v1/jobs/{ref}").json())

    def jobs(
        self,
        batch_id: str,
        states: Sequence[str] = (),
        *,
        code: str | None = None,
        within_s: float | None = None,
        after: int = -1,
    ) -> Iterator[Job]:
        """As Farm.jobs."""
        given = {"state": [str(state) for state in states], "code": code, "within": within_s}
        query = {name: value for name, value in given.items() if value is not None}
        following: int | None = after
        while following is not None:
            asked = query | {"after": following, "limit": 500}
            page = self._ask("GET", f"/v1/batches/{batch_id}/jobs", params=asked).json()
            yield from (_job(row) for row in page["jobs"])
            following = page["next"]

    def watch(self, batch_id: str) -> Iterator[BatchStatus]:
        """The batch's status now and at each change, the last time when it is done."""
        etag = ""
        while True:
            answer = self._look(batch_id, WAIT_S if etag else 0, etag)
            if answer.status_code == 304:
                continue
            etag = answer.headers["ETag"]
            status = _batch(answer.json())
            yield status
            if status.done:
                return

    def wait(self, batch_id: str, timeout_s: float | None = None) -> BatchStatus:
        """The status once the batch is done; raises TimeoutError after `timeout_s` seconds."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = WAIT_S if until is None else max(0, until - time.monotonic())
            status = _batch(self._look(batch_id, min(WAIT_S, left)).json())
            if status.done:
                return status
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"batch {batch_id} has {status.open} jobs to go")

    def _look(self, batch_id: str, wait_s: float, etag: str = "") -> httpx.Response:
        headers = {"If-None-Match": etag} if etag else {}
        return self._ask("GET", f"/v1/batches/{batch_id}", params={"wait": wait_s}, headers=headers)

    def models(self) -> list[dict[str, Any]]:
        """The models that jobs may name, as GET /v1/models gives them."""
        return list(self._ask("GET", "/v1/models").json()["models"])

    def workers(self) -> list[Worker]:
        found = self._ask("GET", "/v1/workers").json()["workers"]
        return [Worker(**row) for row in found]

    # ---- fetch

    def pictures(self, batch_id: str) -> Iterator[Job]:
        """The batch's succeeded jobs in order."""
        return self.jobs(batch_id, [JobState.SUCCEEDED])

    def fetch(self, job: Job) -> bytes:
        """A picture's file, checked against its recorded SHA-256."""
        data = self._ask("GET", f"/v1/jobs/{job.id}/picture", follow=True).content
        if sha256(data) != job.sha256:
            raise BlobDamaged(f"what came is not the picture that was recorded for {job.id}")
        return data

    def download(
        self,
        batch_id: str,
        directory: Path | str,
        done: Callable[[Path], None] = lambda path: None,
    ) -> int:
        """Write the batch's pictures and BATCH.jsonl into a directory; how many. Resumable."""
        return results.download(self.fetch, self.pictures(batch_id), Path(directory), done)

    # ---- change

    def cancel(self, batch_id: str, idx: int | None = None) -> tuple[int, int]:
        """Cancel a batch or one job of it: (cancelled at once, running ones asked to stop)."""
        path = f"/v1/batches/{batch_id}" if idx is None else f"/v1/jobs/{batch_id}/{idx}"
        told = self._ask("POST", f"{path}/cancel", timeout=_LONG).json()
        return told["cancelled"], told["stopping"]

    def retry(self, batch_id: str, *, cancelled: bool = False, code: str | None = None) -> int:
        """Queue failed (and cancelled) jobs again, those of one error code if given; how many."""
        query = {"cancelled": cancelled} | ({"code": code} if code else {})
        path = f"/v1/batches/{batch_id}/redrive"
        return int(self._ask("POST", path, params=query, timeout=_LONG).json()["queued"])

    def pause(self, batch_id: str, paused: bool = True) -> None:
        """Stop (or go on) handing out a batch's queued jobs; running ones finish."""
        self._ask("POST", f"/v1/batches/{batch_id}/{'pause' if paused else 'resume'}")

    # ---- HTTP

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterator[bytes]] | None = None,
        timeout: httpx.Timeout = _TIMES,
        follow: bool = False,
    ) -> httpx.Response:
        pauses, until = iter(_PAUSES_S), time.monotonic() + _PATIENCE_S
        while True:
            try:
                answer = self._http.request(
                    method, path, params=params, headers=headers, timeout=timeout,
                    content=body() if body else None, follow_redirects=follow,
                )  # fmt: skip
            except _LOST as error:
                sentence = f"{self._shown} sends to where nothing can be had: {error}"
                raise EnvironmentFault(sentence) from error
            except httpx.TransportError as error:
                if (pause_s := next(pauses, None)) is None:
                    sentence = f"{self._shown} does not answer: {error}"
                    raise EnvironmentFault(sentence) from error
            else:
                if answer.is_success or answer.status_code == 304:
                    return answer
                if (pause_s := _pause(answer, pauses, until)) is None:
                    raise _failure(answer)
            time.sleep(pause_s)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> FarmClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Bounded(httpx.HTTPTransport):
    """What a hostile server sends does not fill the memory, neither at length nor unpacked."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        assert isinstance(answer.stream, httpx.SyncByteStream)
        answer.headers.pop("Content-Encoding", None)  # none was asked for
        answer.stream = _BoundedStream(answer.stream)
        return answer


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        left = MOST_BYTES
        for block in self._stream:
            left -= len(block)
            if left < 0:
                raise EnvironmentFault(f"the server sends more than {MOST_BYTES:,} bytes")
            yield block

    def close(self) -> None:
        self._stream.close()


def _pause(answer: httpx.Response, pauses: Iterator[float], until: float) -> float | None:
    """Seconds after which the same request may well succeed; None: it will not."""
    if answer.status_code in (409, 503):
        return next(pauses, None)
    wait = answer.headers.get("Retry-After", "")
    soon = wait.isdecimal() and int(wait[:9]) <= _SOON_S
    if answer.status_code != 429 or not soon or time.monotonic() > until:
        return None
    return random.uniform(0.2, 1) * max(1, int(wait))  # so that many do not come back at once


def _batch(row: Mapping[str, Any]) -> BatchStatus:
    return BatchStatus(**{name: row[name] for name in BatchStatus.__dataclass_fields__})


def _job(row: Mapping[str, Any]) -> Job:
    """Raises EnvironmentFault for what no farm tells; from a job's names come those of files."""
    plain = {name: row[name] for name in Job.__dataclass_fields__}
    job = Job(**plain | {"spec": JobSpec.from_record(row["spec"]).model_dump()})
    try:
        known = type(job.idx) is int and JobRef.parse(str(job.ref)) == job.ref
    except NotFound:
        known = False
    if not known or str(job.ref) != job.id or job.spec["format"] not in EXTENSIONS:
        raise EnvironmentFault(f"the server tells of a job that no farm has: {job.id!r:.80}")
    return job


def _failure(answer: httpx.Response) -> FarmError:
    """The exception that a problem stands for."""
    try:
        told = answer.json()
        code, sentence, faults = told["code"], told["detail"], told["errors"]
    except (ValueError, KeyError, TypeError):  # of a proxy, not of the farm
        kind = EnvironmentFault if answer.status_code >= 500 else Invalid
        return kind(f"{answer.url.host} answers {answer.status_code} {answer.reason_phrase}")
    if code == InvalidPromptFile.code:
        return InvalidPromptFile(sentence, [RowError(**fault) for fault in faults])
    known = by_code(code, sentence)
    if answer.status_code == 429 and known.code != code:
        return EnvironmentFault(sentence)
    if type(known) is FarmError and answer.status_code < 500:
        return Invalid(sentence)
    return known
