"""Shards in their place: written whole, told in stats/, and complete by what is in them.

A shard's stats file is written after its files. It tells which rows and pictures they hold
(`content`) and their SHA-256: a shard is complete when that content is what the run wants now, and
the files still have those hashes. Nothing else is asked, not even that a run ever finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from farm.blobs import BlobStore
from farm.datasets.formats import FORMATS, Written, open_writer
from farm.datasets.gates import Measures
from farm.datasets.outcome import ACCEPTED, CANCELLED, FAILED, STATES, Outcome
from farm.datasets.place import content_type
from farm.datasets.recipe import Recipe
from farm.datasets.stats import (
    LAYOUT,
    FileTold,
    Stats,
    hash_of,
    json_bytes,
    read_stats,
    stats_key,
)
from farm.provenance import is_signed
from farm.store.reads import Job

SPLIT = "train"
_THREADS, _AHEAD, _AHEAD_BYTES = 2, 100, 32 << 20  # pictures fetched ahead of the writer


def shard_name(shard: int) -> str:
    return f"{SPLIT}-{shard:05d}"


class Shards:
    """Writes a dataset's shards into `place`. `read` gives a job's picture, checked; `gates`: the
    mark of those that judged."""

    def __init__(
        self,
        place: BlobStore,
        read: Callable[[Job], bytes],
        recipe: Recipe,
        gates: str,
    ) -> None:
        self._place, self._read, self._gates = place, read, gates
        self._formats, self._columns = recipe.formats, recipe.columns

    def stats(self, shard: int) -> Stats | None:
        """What is told of a shard; None where nothing is, or nothing that can be read."""
        found = read_stats(self._place, stats_key(shard))
        return found if found and found["shard"] == shard else None

    def complete(
        self, stats: Stats | None, outcomes: Sequence[Outcome], measures: Mapping[str, Measures]
    ) -> Stats | None:
        """The shard's stats, if its files hold just these rows, to the byte; else None.

        What is told beside them, such as tries that led to them, is brought up to date.
        """
        if stats is None or stats["content"] != self._content(outcomes):
            return None
        if any(hash_of(self._place, one["key"]) != one["sha256"] for one in stats["files"]):
            return None
        signed, files = stats["signed"], stats["files"]
        told = self._told(stats["shard"], outcomes, measures, signed, files)
        data = json_bytes(told)
        if data != json_bytes(stats):
            self._place.put(stats_key(stats["shard"]), data, "application/json")
        return told

    def write(
        self, shard: int, outcomes: Sequence[Outcome], measures: Mapping[str, Measures]
    ) -> Stats:
        """Write the shard, remove what lay in its place before, and write its stats."""
        accepted = [one for one in outcomes if one.state == ACCEPTED]
        with self._place.aside() as folder:
            written, signed = self._write(shard_name(shard), accepted, folder)
            self._place.put_files([(one.key, one.path, content_type(one.key)) for one in written])
        self._clear(shard, {one.key for one in written})
        files: Any = [{"key": w.key, "sha256": w.sha256, "size": w.size} for w in written]
        stats = self._told(shard, outcomes, measures, signed, files)
        self._place.put(stats_key(shard), json_bytes(stats), "application/json")
        return stats

    def _clear(self, shard: int, kept: Collection[str]) -> None:
        """A reader of images stumbles over one that no metadata tell of."""
        for form in FORMATS:
            own = f"{form}/{shard_name(shard)}"
            found = [one.key for one in self._place.list(own) if one.key not in kept]
            self._place.delete([key for key in found if key.startswith((f"{own}.", f"{own}/"))])

    def _write(
        self, name: str, accepted: Sequence[Outcome], folder: Path
    ) -> tuple[list[Written], int]:
        """The shard's files, and how many of its pictures are signed."""
        signed = 0
        with ExitStack() as stack:
            writers = [
                stack.enter_context(open_writer(form, name, folder, self._columns))
                for form in self._formats
            ]
            for one, data, is_signed in self._pictures(accepted):
                signed += is_signed
                sample = one.sample(data)
                for writer in writers:
                    writer.add(sample)
            return [one for writer in writers for one in writer.close()], signed

    def _pictures(self, accepted: Iterable[Outcome]) -> Iterator[tuple[Outcome, bytes, bool]]:
        """Each with its picture, and whether that is signed; some are fetched ahead."""
        waiting: deque[tuple[Outcome, Future[tuple[bytes, bool]]]] = deque()
        ahead = 0
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch") as pool:
            try:
                for one in accepted:
                    waiting.append((one, pool.submit(self._picture, one.job)))
                    ahead += one.job.size_bytes or 0
                    while len(waiting) > 1 and (len(waiting) > _AHEAD or ahead > _AHEAD_BYTES):
                        first, found = waiting.popleft()
                        ahead -= first.job.size_bytes or 0
                        yield first, *found.result()
                while waiting:
                    first, found = waiting.popleft()
                    yield first, *found.result()
            finally:
                for _, found in waiting:
                    found.cancel()

    def _picture(self, job: Job) -> tuple[bytes, bool]:
        data = self._read(job)
        return data, is_signed(data)

    def _content(self, outcomes: Iterable[Outcome]) -> str:
        """SHA-256 of all that decides the bytes of the shard's files."""
        kinds = [(name, kind.__name__) for name, kind in self._columns.items()]
        digest = hashlib.sha256(json.dumps([LAYOUT, *self._formats, kinds]).encode())
        for one in outcomes:
            if one.state == ACCEPTED:
                told = [one.row, one.job.sha256, one.mark, dict(one.columns)]
                digest.update(json.dumps(told, sort_keys=True).encode())
        return digest.hexdigest()

    def _told(
        self,
        shard: int,
        outcomes: Sequence[Outcome],
        measures: Mapping[str, Measures],
        signed: int,
        files: list[FileTold],
    ) -> Stats:
        counts = Counter(one.state for one in outcomes)
        jobs = [job for one in outcomes for job in one.jobs]
        tried = {str(one.row): [asdict(t) for t in one.tries] for one in outcomes if one.tries}
        failed = {
            str(one.row): {"state": one.state, "code": one.job.error_code, "error": one.job.error}
            for one in outcomes
            if one.state in (FAILED, CANCELLED)
        }
        return {
            "shard": shard,
            "content": self._content(outcomes),
            "made": _made([one for one in outcomes if one.state == ACCEPTED]),
            "rows": (outcomes[0].row, outcomes[-1].row + 1),
            "counts": {state: counts[state] for state in STATES},
            "tries": tried,
            "failed": failed,
            "pictures": [
                (one.row, str(one.job.sha256), one.mark)
                for one in outcomes
                if one.state == ACCEPTED
            ],
            "bytes": sum(one.job.size_bytes or 0 for one in outcomes if one.state == ACCEPTED),
            "signed": signed,
            "started_at": _moment(
                min((job.started_at for job in jobs if job.started_at), default=0)
            ),
            "finished_at": _moment(max((job.finished_at or 0 for job in jobs), default=0)),
            "render_s": round(sum(job.render_s or 0 for job in jobs), 3),
            "gates": self._gates,
            "measures": dict(measures),
            "files": files,
        }


def _made(accepted: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many pictures of each size and file format, from which model and engine, with what."""
    specs = [one.job.spec for one in accepted]
    loras = (name for spec in specs for name, _ in spec["loras"])
    return {
        "sizes": Counter(f"{spec['width']}x{spec['height']}" for spec in specs),
        "forms": Counter(str(spec["format"]) for spec in specs),
        "models": Counter(f"{one.job.spec['model']}:{one.job.engine}" for one in accepted),
        "loras": Counter(loras),
    }


def _moment(at: float) -> str | None:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else None
