"""Jobs from Python: rows, templates and lists of hostile values through `Farm.submit` into SQL.

What is accepted stands in SQL as it was, can be read again, and keeps its counters; what is refused
leaves no trace. The worker part renders a share of what such rows give.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from farm.config import Settings
from farm.errors import FarmError, Invalid, InvalidPromptFile
from farm.results import file_name
from farm.service import Farm
from farm.spec import JobSpec
from farm.store import schema
from farm.store.ids import JobRef
from farm.templates import PICKS, Template, parse_list
from tests.farm_kit import FAKES
from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard
from tests.picture_kit import picture
from tests.runner_kit import NoBroker
from tests.store_kit import Kit

LORA = """
[loras.pixel]
licence = "mit"
models = ["fake-fast"]
weights = { path = "pixel.safetensors" }
"""
MOST_ROWS = 2_000


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    (data / "models.toml").write_text(FAKES + LORA)
    (data / "list.txt").write_text("red\n# not\n\nblue\n")
    (data / "picture.png").write_bytes(picture())
    settings = Settings(home=data, models_file=data / "models.toml")
    with Farm(settings) as farm:
        farm.__dict__["broker"] = NoBroker()
        schema.upgrade(farm.db)
        kit = Kit(farm.db)

        def judge(case: Case) -> str:
            if case.one_in(20):
                return looked(case, farm)
            try:
                items, options = asked(case.rng, data)
                case.told = f"{items!r} {options!r}"
                batch = farm.submit(items, **options)
            except Invalid as error:
                told = error.errors if isinstance(error, InvalidPromptFile) else ()
                if not error.message or any(not e.expected for e in told):
                    raise Finding(f"it says {error.message!r}, {told}") from None
                return f"refused {error.code}"
            kit.states(batch.id)
            recorded(farm, batch.id, options)
            return "accepted"

        yield judge


def asked(rng: Random, data: Path) -> tuple[Any, dict[str, Any]]:
    """What a program may give to Farm.submit."""
    options: dict[str, Any] = {"model": "fake-fast"}
    wrong = rng.choice((0.0, 0.0, 0.1, 0.5))
    for name in rng.sample(list(words.GOOD), rng.randrange(3)):
        if name != "prompt":
            good = rng.choice(words.GOOD[name])
            options[name] = words.value(rng) if rng.random() < wrong else good
    if rng.random() < wrong:
        name = rng.choice(
            ("name", "owner", "priority", "after", "expires_s", "n", "eager", words.text(rng))
        )
        options[name] = words.value(rng)
    kind = rng.randrange(6)
    if kind == 0:
        return words.text(rng), options
    if kind == 1:
        return _template(rng, data), options
    if kind == 2:
        return [words.text(rng) for _ in range(rng.randrange(5))], options
    rows: list[Any] = [words.row(rng, wrong) for _ in range(rng.randrange(1, 5))]
    if rng.random() < wrong / 2:
        rows.append(words.value(rng))
    return [_small(row) for row in rows], options


def _small(row: Any) -> Any:
    """At most a few pictures: ten thousand of one row are no other case."""
    if isinstance(row, dict) and type(row.get("n")) is int and row["n"] > 20:
        return row | {"n": 20_000}
    return row


def _template(rng: Random, data: Path) -> Template:
    holes = ["{colour}", "{animal}", "{seed}", "{{x}}", words.text(rng)]
    text = " ".join(rng.sample(holes, rng.randrange(1, 4)))
    lists = [
        "colour=red,blue",
        "animal=cat,dog",
        "seed=1..3",
        "steps=1,2",
        f"colour=@{data}/list.txt",
    ]
    lists += [f"{rng.choice((*words.GOOD, 'colour', words.text(rng)[:50]))}={words.text(rng)}"]
    given = dict(map(parse_list, rng.sample(lists, rng.randrange(0, 4))))
    pick = rng.choice(PICKS)
    count = rng.choice((1, 5, 0, -1, 10**12)) if pick == "sample" or rng.randrange(9) == 0 else None
    made = Template(text, given, pick=pick, count=count, seed=rng.choice((0, 7, -1)))
    return made if made.total < MOST_ROWS else Template("a cat", {"seed": range(3)})


def recorded(farm: Farm, batch_id: str, options: dict[str, Any]) -> None:
    """Each job can be read, is valid, has a fingerprint, and its picture would have a tame name."""
    found = list(farm.jobs(batch_id))
    status = farm.status(batch_id)
    if not (len(found) == status.total == sum(status.counts.values()) > 0):
        raise Finding(f"{len(found)} jobs of {status.total}, {status.counts}")
    for place, job in enumerate(found):
        spec = JobSpec.model_validate(job.spec | {"loras": tuple(map(tuple, job.spec["loras"]))})
        if job.idx != place or len(spec.fingerprint("fake", "0" * 64, {"pixel": "1" * 64})) != 64:
            raise Finding(f"{job}")
        if not unicodedata.is_normalized("NFC", spec.prompt):
            raise Finding(f"not NFC: {spec.prompt!r}")
        name = file_name(job)
        if name != f"{batch_id}-{place:07d}.{ {'jpeg': 'jpg'}.get(spec.format, spec.format) }":
            raise Finding(f"the name {name!r}")


def looked(case: Case, farm: Farm) -> str:
    """Every look and change with a name that may be anything: FarmError or an answer."""
    name = case.rng.choice((words.text(case.rng), "latest"))
    place = case.rng.choice((0, -1, 2**31, 2**63, 10**30))
    case.told = f"{name!r} {place}"
    asks = (
        lambda: farm.find(name), lambda: farm.status(name), lambda: farm.job(name),
        lambda: farm.cancel(name), lambda: farm.retry(name), lambda: farm.pause(name),
        lambda: farm.cancel(farm.find("latest"), place), lambda: farm.job(JobRef(name, place)),
        lambda: farm.retry(name, code=name), lambda: list(farm.jobs(name, [name], after=place)),
        lambda: farm.batches(owner=name, before=name), lambda: farm.failures(name),
    )  # fmt: skip
    for ask in asks:
        with contextlib.suppress(FarmError):
            ask()
    return "looked"
