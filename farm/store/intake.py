"""The way in of jobs: many rows in one statement, by COPY on PostgreSQL.

They come as `queued`, which the column's own default says; from then on `jobs` moves them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select, update

from farm.spec import NewJob, Shape
from farm.states import JobState
from farm.store.jobs import Pool, counter_of
from farm.store.tables import batch_inputs, counts

COLUMNS = (
    "batch_id", "idx", "model", "asked_engine", "key", "prompt", "negative_prompt", "seed",
    "params",
)  # fmt: skip
_COPY = f"COPY jobs ({', '.join(COLUMNS)}) FROM STDIN"
_INSERT = f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
_COPY_BYTES = 1 << 18
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def insert(
    connection: Connection,
    batch_id: str,
    first_idx: int,
    chunk: Sequence[NewJob],
    shared: Mapping[str, Any],
) -> None:
    """Queue `chunk` as jobs first_idx, first_idx + 1, ... of a batch whose params are `shared`."""
    rows = _rows(batch_id, first_idx, chunk, shared)
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "postgresql":
        with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
            for part in _copy_text(rows):
                copy.write(part)
    else:
        driver.executemany(_INSERT, rows)
    _count(connection, batch_id, chunk)
    _keep_inputs(connection, batch_id, chunk)


def _rows(
    batch_id: str, first_idx: int, chunk: Sequence[NewJob], shared: Mapping[str, Any]
) -> Iterator[tuple[Any, ...]]:
    fixed: dict[int, tuple[Any, ...]] = {}  # by shape, which the chunk keeps alive
    for idx, (shape, prompt, negative_prompt, seed) in enumerate(chunk, start=first_idx):
        mine = fixed.get(id(shape))
        if mine is None:
            fixed[id(shape)] = mine = (*_labels(shape), _own(shape, shared))
        model, engine, key, own = mine
        yield batch_id, idx, model, engine, key, prompt, negative_prompt, seed, own


def _labels(shape: Shape) -> tuple[str, str, str]:
    return shape.spec.model, shape.spec.engine or "", shape.key


def _own(shape: Shape, shared: Mapping[str, Any]) -> str | None:
    """What differs from the batch's own parameters, as JSON."""
    fields = shape.spec.model_dump(mode="json")
    own = {name: fields[name] for name in shared if shared[name] != fields[name]}
    return json.dumps(own) if own else None


def _copy_text(rows: Iterator[tuple[Any, ...]]) -> Iterator[str]:
    """COPY's text format (https://www.postgresql.org/docs/current/sql-copy.html), in parts."""
    lines: list[str] = []
    size = 0
    for batch_id, idx, model, engine, key, prompt, negative_prompt, seed, own in rows:
        texts = f"{prompt}\x00{negative_prompt}\x00{'' if own is None else own}"
        if "\\" in texts or "\n" in texts or "\t" in texts or "\r" in texts:
            texts = texts.translate(_ESCAPES)
        prompt, negative_prompt, own_text = texts.split("\x00")
        line = (
            f"{batch_id}\t{idx}\t{model}\t{engine}\t{key}\t{prompt}\t{negative_prompt}\t{seed}\t"
            f"{own_text or chr(92) + 'N'}\n"
        )
        lines.append(line)
        size += len(line)
        if size > _COPY_BYTES:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _count(connection: Connection, batch_id: str, chunk: Sequence[NewJob]) -> None:
    by_shape = Counter(id(job.shape) for job in chunk)
    shapes = {id(job.shape): job.shape for job in chunk}
    pools: Counter[Pool] = Counter()
    for number, n in by_shape.items():
        model, engine, _ = _labels(shapes[number])
        pools[(batch_id, model, engine)] += n
    for pool, n in sorted(pools.items()):
        more = update(counts).where(counter_of(pool)).values(queued=counts.c.queued + n)
        if not connection.execute(more).rowcount:
            names = dict(zip(("batch_id", "model", "asked_engine"), pool, strict=True))
            connection.execute(counts.insert().values({**names, JobState.QUEUED: n}))


def _keep_inputs(connection: Connection, batch_id: str, chunk: Sequence[NewJob]) -> None:
    """Note which input pictures the jobs name, so that none is pruned before them."""
    specs = [shape.spec for shape in {id(job.shape): job.shape for job in chunk}.values()]
    keys = sorted({key for spec in specs for key in (spec.init_image, spec.mask_image) if key})
    named = select(batch_inputs.c.key).where(batch_inputs.c.batch_id == batch_id)
    for start in range(0, len(keys), 1000):
        some = keys[start : start + 1000]
        known = set(connection.scalars(named.where(batch_inputs.c.key.in_(some))))
        new = [{"batch_id": batch_id, "key": key} for key in some if key not in known]
        if new:
            connection.execute(batch_inputs.insert(), new)
