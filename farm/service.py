"""Farm: the Python API. It joins the rooms below it and holds no state of its own.

from farm import Farm

with Farm.open() as farm:
    batch = farm.submit(["a red circle on a blue background"], n=4)
    farm.wait(batch.id)
    farm.download(batch.id, "pictures")
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack

from farm import dispatch, prompt_files, prompts, results
from farm.blobs import BlobStore, S3Options, open_blobs
from farm.catalog import Catalog, load_catalog
from farm.checks import Blocklist, Link, chain
from farm.config import Settings, load_settings
from farm.errors import (
    DatabaseUnavailable,
    InvalidConfig,
    InvalidParameter,
    InvalidPromptFile,
    NotFound,
    RowError,
)
from farm.inputs import InputPictures, absolute, picture_key, store
from farm.preview import Preview, preview
from farm.prompt_files import Row
from farm.prompts import Defaults
from farm.spec import FIELDS, NewJob
from farm.states import JobState
from farm.store import batches, jobs, reads, schema, sessions, turns
from farm.store.batches import BatchStatus, Once
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.reads import Job
from farm.store.schema import Fit
from farm.store.sessions import Worker
from farm.submitting import MAX_LABEL, Options, Plan, submit
from farm.templates import Template

if TYPE_CHECKING:  # looking at batches needs no Celery, which is slow to import
    from farm.broker import Broker

log = logging.getLogger(__name__)
JOBS_PAGE = 500


class Farm:
    """A farm's client: submit, look, fetch, cancel. Every method raises FarmError kinds only."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.db = Database(settings.database)

    @classmethod
    def open(cls, **flags: Any) -> Farm:
        """A farm by the settings in force, `flags` over them; SQLite gets its schema at once."""
        farm = cls(load_settings(**flags))
        farm.check_schema()
        return farm

    @cached_property
    def catalog(self) -> Catalog:
        return load_catalog(self.settings.catalog_path, self.settings.models_path)

    @cached_property
    def broker(self) -> Broker:
        from farm.broker import Broker

        return Broker(self.settings.broker)

    @cached_property
    def blobs(self) -> BlobStore:
        return open_blobs(self.settings.blobs, s3=s3_options(self.settings))

    @cached_property
    def checks(self) -> tuple[Link, ...]:
        """What the texts of jobs pass through at submit; see farm.checks."""
        blocked = self.settings.blocklist
        return chain(Blocklist.read(blocked) if blocked else None)

    def check_schema(self) -> None:
        """Raises InvalidConfig when this version cannot work with the database's schema.

        One that is newer will do, as long as nothing was ended that this version needs.
        """
        fit = schema.fit(self.db)
        if fit is Fit.TOO_NEW:
            raise schema.too_new(self.db)
        if fit is Fit.NEWER:
            found, mine = schema.current(self.db), schema.head()
            log.warning("%s is newer (%s) than this version (%s)", self.db.shown, found, mine)
        elif fit is not Fit.CURRENT and self.db.dialect == "sqlite":
            schema.upgrade(self.db)
        elif fit is not Fit.CURRENT:
            state = f"at revision {schema.current(self.db)}" if fit is Fit.OLDER else "empty"
            raise InvalidConfig(f"{self.db.shown} is {state}; run: farm db upgrade")

    # ---- submit

    def submit(
        self, items: str | Template | Iterable[str | Mapping[str, Any]], **options: Unpack[Options]
    ) -> BatchStatus:
        """Queue prompts (texts, or mappings of JobSpec fields) or a template; see Options.

        Input pictures are files (from the current directory), `blob:KEY` or `job:BATCH/INDEX`; for
        rows that came from elsewhere, not `files`: blob:KEY of what `add_input` stored, and jobs of
        the same owner. Raises InvalidPromptFile with one RowError a bad field; then nothing was
        queued (unless eager); KeyReused or SubmitInProgress for the key of `once`.
        """
        with self._source(items, options) as source:
            return self._submit(source, options)

    def submit_file(
        self,
        file: Path | str | BinaryIO,
        *,
        form: str | None = None,
        columns: Mapping[str, str] | None = None,
        **options: Unpack[Options],
    ) -> BatchStatus:
        """Queue a prompt file (by its ending, or `form` of prompt_files.FORMATS); see `submit`.

        `columns`: field -> the name of its column. Rows name pictures from the file's directory.
        """
        with self._file(file, form, columns, options) as source:
            return self._submit(source, options)

    def submit_rows(
        self, rows: Iterable[Row], folder: Path | None, **options: Unpack[Options]
    ) -> BatchStatus:
        """Queue rows that were read already: (line, fields or the line's error); see `submit`.

        They name input pictures from `folder`; None: they may name none.
        """
        return self._submit(_Source(rows, folder), options)

    def checked(
        self, rows: Iterable[Row], folder: Path | None, **options: Unpack[Options]
    ) -> Iterator[NewJob | RowError]:
        """The jobs that `submit_rows` would queue; nothing is changed."""
        with self._jobs(_Source(rows, folder), options, upload=False) as (stream, _):
            yield from stream

    def preview(
        self, items: str | Template | Iterable[str | Mapping[str, Any]], **options: Unpack[Options]
    ) -> Preview:
        """What `submit` would queue, and how long it would take; nothing is changed."""
        with self._source(items, options) as source:
            return self._preview(source, options)

    def preview_file(
        self,
        file: Path | str | BinaryIO,
        *,
        form: str | None = None,
        columns: Mapping[str, str] | None = None,
        **options: Unpack[Options],
    ) -> Preview:
        """What `submit_file` would queue; see `preview`."""
        with self._file(file, form, columns, options) as source:
            return self._preview(source, options)

    def add_input(self, data: bytes) -> str:
        """Store an input picture (a PNG, JPEG or WebP file); its key, which rows name `blob:KEY`.

        Raises InvalidParameter, which says what is wrong with it, and StorageUnavailable.
        """
        key = picture_key(data)
        store(self.blobs, key, data)
        return key

    @contextlib.contextmanager
    def _source(self, items: Any, options: Options) -> Iterator[_Source]:
        if isinstance(items, Template):
            rows: Iterable[Row] = items.rows()
        else:
            rows = prompts.prompt_rows([items] if isinstance(items, str) else items)
        yield _Source(rows, Path() if options.get("files", True) else None)

    @contextlib.contextmanager
    def _file(
        self,
        file: Path | str | BinaryIO,
        form: str | None,
        columns: Mapping[str, str] | None,
        options: Options,
    ) -> Iterator[_Source]:
        files = options.get("files", True)
        if not isinstance(file, Path | str):
            rows = prompt_files.read_rows(file, form or "jsonl", columns)
            yield _Source(rows, Path() if files else None)
            return
        path = Path(file)
        form = form or prompt_files.guess_format(path)
        if not options.get("name"):
            options["name"] = "".join(filter(str.isprintable, path.name))[:MAX_LABEL]
        try:
            stream = path.open("rb")
        except OSError as error:
            raise InvalidPromptFile(f"{path}: {error.strerror}") from None
        with stream:
            rows = prompt_files.read_rows(stream, form, columns)
            yield _Source(rows, path.parent if files else None)

    @contextlib.contextmanager
    def _jobs(
        self, source: _Source, options: Options, *, upload: bool
    ) -> Iterator[tuple[Iterator[NewJob | RowError], InputPictures]]:
        """The source's jobs; params name input pictures from the current directory."""
        given = {k: v for k, v in options.items() if k in FIELDS and v is not None}
        if unknown := set(options) - set(Options.__annotations__):
            raise InvalidParameter(f"unknown field {min(unknown)!r}; known: {', '.join(FIELDS)}")
        for field in {"init_image", "mask_image"} & set(given):
            if source.base is not None:
                given[field] = absolute(str(given[field]), Path.cwd())
        if "model" not in given:
            given["model"] = self.default_model()
        owner = None if source.base else options.get("owner", "")
        rendered = partial(self._rendered, owner=owner)
        with InputPictures(lambda: self.blobs, rendered, source.base, upload=upload) as pictures:
            defaults = Defaults(given, options.get("n", 1), pictures.take, self.checks)
            yield prompts.make_jobs(source.rows, defaults, self.catalog), pictures

    def _submit(self, source: _Source, options: Options) -> BatchStatus:
        with self._jobs(source, options, upload=True) as (stream, pictures):
            about: Any = {k: v for k, v in options.items() if k in Plan.__dataclass_fields__}
            plan = Plan(settle=pictures.settle, started=self._ring, **about)
            batch_id = submit(self.db, stream, plan).batch_id
        try:
            return self.status(batch_id)
        except DatabaseUnavailable as error:
            raise DatabaseUnavailable(
                f"batch {batch_id} is queued whole, but: {error.message}"
            ) from error

    def _preview(self, source: _Source, options: Options) -> Preview:
        with self._jobs(source, options, upload=False) as (stream, _):
            return preview(self.db, stream)

    def _rendered(self, name: str, owner: str | None) -> bytes:
        """The picture of a job named BATCH/INDEX, or as its downloaded file, BATCH-INDEX.

        Raises NotFound, also for another's job where an `owner` is given.
        """
        batch, _, place = name.replace("-", "/").partition("/")
        job = self.job(f"{self.find(batch)}/{place}")
        if owner is not None and self.status(job.batch_id).owner != owner:
            raise NotFound(f"no job {name[:60]!r} of this owner")
        if not job.object_key:
            raise NotFound(f"job {job.id} is {job.state}: it has no picture")
        return self.fetch(job)

    def default_model(self) -> str:
        """The model of jobs that name none: the one that workers serve, else the demo model."""
        with self.db.read() as connection:
            served = {lane.model for lane in sessions.live_lanes(connection)}
        return served.pop() if len(served) == 1 else "shapes"

    def _ring(self) -> None:
        """Best effort: the jobs are safe in SQL, and the dispatcher rings on its next tick."""
        try:
            dispatch.ring(self.db, self.broker, None, self.settings.tokens_per_worker)
        except Exception as error:
            log.warning("%s; the jobs are queued and idle workers find them in seconds", error)

    # ---- look

    def find(self, text: str) -> str:
        """The batch id that `text` means: an id, a unique part of one, or `latest`."""
        with self.db.read() as connection:
            return batches.find(connection, text)

    def status(self, batch_id: str) -> BatchStatus:
        with self.db.read() as connection:
            return batches.status(connection, batch_id)

    def made_by(self, owner: str, once: Once) -> BatchStatus | None:
        """The batch that this request made before; raises KeyReused and SubmitInProgress."""
        with self.db.read() as connection:
            found = batches.made_by(connection, owner, once)
            return batches.status(connection, found.id) if found and found.whole else None

    def batches(
        self, limit: int = 20, *, before: str | None = None, owner: str | None = None
    ) -> list[BatchStatus]:
        """The newest batches first: those older than the batch `before`, those of an owner."""
        with self.db.read() as connection:
            return batches.recent(connection, limit, before=before, owner=owner)

    def job(self, ref: JobRef | str) -> Job:
        with self.db.read() as connection:
            return reads.job(connection, JobRef.parse(ref) if isinstance(ref, str) else ref)

    def history(self, ref: JobRef) -> list[dict[str, Any]]:
        """What befell a job that was not the plain way, oldest first."""
        with self.db.read() as connection:
            return reads.history(connection, ref)

    def jobs(
        self,
        batch_id: str,
        states: Sequence[str] = (),
        *,
        code: str | None = None,
        within_s: float | None = None,
        after: int = -1,
    ) -> Iterator[Job]:
        """The jobs of a batch in order, page by page; see `reads.page` for what they are chosen by.

        `after`: begin behind this place.
        """
        chosen: Any = {"states": states, "code": code, "within_s": within_s}
        while True:
            with self.db.read() as connection:
                page = reads.page(connection, batch_id, **chosen, after=after, limit=JOBS_PAGE)
            yield from page
            if len(page) < JOBS_PAGE:
                return
            after = page[-1].idx

    def watch(self, batch_id: str, poll_s: float = 0.5) -> Iterator[BatchStatus]:
        """The batch's status again and again, the last time when it is done."""
        while True:
            status = self.status(batch_id)
            yield status
            if status.done:
                return
            time.sleep(poll_s)

    def wait(self, batch_id: str, timeout_s: float | None = None) -> BatchStatus:
        """The status once the batch is done; raises TimeoutError after `timeout_s` seconds."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for status in self.watch(batch_id, poll_s=0.05):
            if status.done:
                return status
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"batch {batch_id} has {status.open} jobs to go")
        raise AssertionError("watch ends with a finished batch")

    def failures(self, batch_id: str) -> dict[str, int]:
        """The batch's failed jobs by error code, the most frequent first."""
        with self.db.read() as connection:
            return reads.failures(connection, batch_id)

    def unserved(self) -> dict[str, int]:
        """Queued jobs that no live worker serves now, by MODEL, or MODEL:ENGINE if they ask."""
        with self.db.read() as connection:
            lanes = sessions.live_lanes(connection)
            waiting = turns.backlog(connection)
        served = {(lane.model, "") for lane in lanes} | {tuple(lane) for lane in lanes}
        return {
            f"{model}:{asked}" if asked else model: n
            for (model, asked), n in waiting.items()
            if (model, asked) not in served
        }

    def workers(self) -> list[Worker]:
        with self.db.read() as connection:
            return sessions.live(connection)

    # ---- fetch

    def pictures(self, batch_id: str) -> Iterator[Job]:
        """The batch's succeeded jobs in order."""
        return self.jobs(batch_id, [JobState.SUCCEEDED])

    def fetch(self, job: Job) -> bytes:
        """A picture's file, checked against its recorded SHA-256."""
        return results.fetch(self.blobs, job)

    def download(
        self,
        batch_id: str,
        directory: Path | str,
        done: Callable[[Path], None] = lambda path: None,
    ) -> int:
        """Write the batch's pictures and BATCH.jsonl into a directory; how many. Resumable."""
        return results.download(self.fetch, self.pictures(batch_id), Path(directory), done)

    def contact_sheet(self, batch_id: str, path: Path | str, *, most: int = 200) -> int:
        """One picture that shows the batch's first `most`; how many it shows."""
        shown = islice(self.pictures(batch_id), most)
        return results.contact_sheet(self.blobs, shown, Path(path))

    # ---- change

    def cancel(self, batch_id: str, idx: int | None = None) -> tuple[int, int]:
        """Cancel a batch or one job of it: (cancelled at once, running ones asked to stop)."""
        self.status(batch_id)  # NotFound
        cancelled = asked = 0
        if idx is None:
            with self.db.write() as connection:
                batches.set_cancelled(connection, batch_id)
        while True:
            with self.db.write() as connection:
                now, later = jobs.request_cancel(connection, batch_id, idx)
            cancelled, asked = cancelled + now, asked + later
            if not now and not later:
                return cancelled, asked

    def retry(
        self,
        batch_id: str,
        *,
        idx: int | None = None,
        cancelled: bool = False,
        code: str | None = None,
    ) -> int:
        """Queue failed (and cancelled) jobs again, those of one error code if given; how many."""
        self.status(batch_id)  # NotFound
        states = [JobState.FAILED] + ([JobState.CANCELLED] if cancelled else [])
        total = 0
        while True:
            with self.db.write() as connection:
                moved = jobs.redrive(connection, batch_id, states, idx=idx, code=code)
            total += moved
            if not moved:
                break
        self._ring()
        return total

    def pause(self, batch_id: str, paused: bool = True) -> None:
        """Stop (or go on) handing out a batch's queued jobs; running ones finish."""
        self.status(batch_id)  # NotFound
        with self.db.write() as connection:
            batches.set_paused(connection, batch_id, paused)
        if not paused:
            self._ring()

    def close(self) -> None:
        """Let go of connections; the farm object is of no more use."""
        for name in ("broker", "blobs"):
            if name in self.__dict__:
                getattr(self, name).close()
        self.db.close()

    def __enter__(self) -> Farm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Source:
    """Rows, and the directory from which they name files; None: they may name none."""

    rows: Iterable[Row]
    base: Path | None


def s3_options(settings: Settings) -> S3Options:
    """The S3 part of the settings."""
    access, secret = settings.s3_access_key, settings.s3_secret_key
    return S3Options(
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        access_key=access.get_secret_value() if access else None,
        secret_key=secret.get_secret_value() if secret else None,
        path_style=settings.s3_path_style,
        checksums=settings.s3_checksums,
    )
