"""Fetching a batch's pictures: into a directory, or as one contact sheet."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

from farm.blobs import BlobStore
from farm.errors import BlobDamaged, BlobNotFound, EnvironmentFault
from farm.pictures import EXTENSIONS, sha256
from farm.store.reads import Job

_THREADS = 8


def fetch(blobs: BlobStore, job: Job) -> bytes:
    """The picture's bytes, checked against the recorded SHA-256.

    Raises BlobNotFound when the object is gone, BlobDamaged when it was changed.
    """
    assert job.object_key, f"{job.id} has no picture"
    data = blobs.get(job.object_key)
    if sha256(data) != job.sha256:
        raise BlobDamaged(f"{job.object_key} is not the picture that was recorded for {job.id}")
    return data


def file_name(job: Job) -> str:
    """BATCH-INDEX.png: pictures of several batches may lie in one directory."""
    return f"{job.batch_id}-{job.idx:07d}.{EXTENSIONS[job.spec['format']]}"


def download(
    read: Callable[[Job], bytes],
    jobs: Iterable[Job],
    directory: Path,
    done: Callable[[Path], None] = lambda path: None,
) -> int:
    """Write each job's picture to `directory` and its parameters to BATCH.jsonl; how many.

    `read` gives a job's picture, checked; it raises BlobNotFound and BlobDamaged.
    Pictures that lie there already, whole, are not fetched again. Files appear whole or not at all.
    A picture that is gone or damaged does not stop the others: BlobNotFound is raised at the end.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {}
    missing: list[EnvironmentFault] = []
    stream = iter(jobs)
    with ThreadPoolExecutor(_THREADS) as pool:
        while group := list(islice(stream, 256)):
            found = pool.map(lambda job: _save(read, job, directory), group)
            for job, path in zip(group, found, strict=True):
                if isinstance(path, EnvironmentFault):
                    missing.append(path)
                    continue
                row = {"id": job.id, "file": path.name, "sha256": job.sha256, **job.spec}
                rows.setdefault(job.batch_id, []).append(json.dumps(row, ensure_ascii=False))
                done(path)
    for batch_id, lines in rows.items():
        _write(directory / f"{batch_id}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    if missing:
        raise BlobNotFound(f"{len(missing)} pictures are missing; the first: {missing[0].message}")
    return sum(map(len, rows.values()))


def _save(read: Callable[[Job], bytes], job: Job, directory: Path) -> Path | EnvironmentFault:
    path = directory / file_name(job)
    if path.is_file() and sha256(path.read_bytes()) == job.sha256:
        return path
    try:
        _write(path, read(job))
    except (BlobNotFound, BlobDamaged) as error:
        return error
    return path


def _write(path: Path, data: bytes) -> None:
    """The file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(
    blobs: BlobStore, jobs: Iterator[Job], path: Path, *, columns: int = 8, tile: int = 128
) -> int:
    """One picture of many, `tile` pixels each with its index below; how many it shows.

    The sheet's format follows the ending of `path`.
    """
    shown = list(jobs)
    if not shown:
        return 0
    columns = min(columns, len(shown))
    label, gap = 14, 4
    rows = -(-len(shown) // columns)
    size = (columns * (tile + gap) + gap, rows * (tile + label + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    with ThreadPoolExecutor(_THREADS) as pool:
        for place, data in enumerate(pool.map(lambda job: fetch(blobs, job), shown)):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            small = image.width < tile and image.height < tile
            image = image.resize(
                _fit(image.size, tile), Image.Resampling.NEAREST if small else None
            )
            x = gap + place % columns * (tile + gap)
            y = gap + place // columns * (tile + label + gap)
            sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
            draw.text((x, y + tile + 1), str(shown[place].idx), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return len(shown)


def _fit(size: tuple[int, int], tile: int) -> tuple[int, int]:
    scale = tile / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
