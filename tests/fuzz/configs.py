"""farm.toml, models.toml, models.lock and blocklists, good ones changed: read, or InvalidConfig."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from farm.blobs import open_blobs
from farm.catalog import load_catalog
from farm.checks import Blocklist, chain
from farm.config import load_settings
from farm.errors import Invalid, InvalidConfig, UnknownModel
from farm.models.lock import read_lock
from farm.service import s3_options
from farm.spec import engine_refuses
from farm.units import parse_duration, parse_size
from tests.fuzz import words
from tests.fuzz.core import Case, Finding, Judge
from tests.fuzz.guard import Guard

FARM = """
home = "farm-data"
database_url = "sqlite:///x.db"
broker_url = "redis://user:geheim@localhost:6379/0"
blobs_url = "file:///srv/pictures"
session_ttl_s = 30.0
tick_s = 1.0
max_failures = 3
hub_hosts = ["a.example:443"]
s3_endpoint_url = "http://127.0.0.1:9000"
s3_secret_key = "geheim"
http_max_body = 1000
log_level = "info"
"""
MODELS = """
[models.sdxl-base]
licence = "openrail++"
terms = "be nice"
family = "sdxl"
memory_gb = 8.5
defaults = { width = 1024, height = 1024, steps = 30, guidance_scale = 5.0, scheduler = "euler_a" }
max_side = 2048
sizes = ["1024x1024", "512x512"]
min_steps = 2
schedulers = ["euler_a", "DDIMScheduler"]
[models.sdxl-base.engines.diffusers]
repo = "stabilityai/stable-diffusion-xl-base-1.0"
revision = "462165984030d82259a11f4367a4eed129e94a7b"
files = ["*.safetensors"]
dtype = { default = "float16", vae = "float32" }
micro_batch = 8
[models.sdxl-base.engines.sdcpp]
url = "https://example.org/model.gguf"
sha256 = "SHA"
options = { wtype = "q8_0" }
[models.fake-one]
licence = "none"
[models.fake-one.engines.fake]
path = "weights/one.safetensors"
[loras.pixel-art]
licence = "mit"
models = ["sdxl-base"]
weights = { path = "pixel-art.safetensors" }
""".replace("SHA", "0" * 64)
LOCK = json.dumps(
    {
        "version": 1,
        "models": {
            "sdxl-base": {
                "accepted": "openrail++",
                "engines": {
                    "diffusers": {
                        "source": {"repo": "a/b"},
                        "revision": "0" * 40,
                        "files": {"unet/model.safetensors": {"size": 5, "sha256": "f" * 64}},
                    }
                },
            }
        },
    },
    indent=1,
)
BLOCKED = "# terms\nbad word\n赤い\nnaked\n"


@contextlib.contextmanager
def opened(data: Path, guard: Guard) -> Iterator[Judge]:
    def judge(case: Case) -> str:
        name, good, read = case.rng.choice(READERS)
        path = data / name
        content = changed(case.rng, good)
        case.told = f"{name}: {content!r}"
        if case.one_in(40):
            path = data  # a directory
        else:
            path.write_bytes(content)
        try:
            read(path, case.rng)
        except InvalidConfig as error:
            if "geheim" in error.message or not 5 < len(error.message) < 20_000:
                raise Finding(f"it says {error.message!r}") from None
            return f"{name} refused"
        return f"{name} taken"

    yield judge


def changed(rng: Random, good: str) -> bytes:
    """The text with bytes broken, or with values and keys in the place of others."""
    kind = rng.randrange(6)
    if kind == 0:
        return words.broken(rng, good.encode(), 4)
    if kind == 1:
        return words.encoded(rng, good + words.text(rng))
    lines = good.split("\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        head, sign, old = lines[at].partition(" = " if " = " in lines[at] else ": ")
        fresh = json.dumps(words.value(rng), ensure_ascii=rng.random() < 0.8)
        if kind < 5 and sign:
            tail = "," if old.endswith(",") else ""
            lines[at] = f"{head}{sign}{fresh.replace('null', '1').replace('NaN', 'nan')}{tail}"
        elif kind == 5:
            lines[at] = rng.choice(
                ("", f"{fresh} = 1", "[a]", "[[models]]", words.text(rng), lines[at] * 2)
            )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _settings(path: Path, rng: Random) -> None:
    """The settings, and all that is made of them before anything is touched."""
    os.environ["FARM_CONFIG"] = str(path)
    variable = f"FARM_{rng.choice(('TICK_S', 'HOME', 'HUB_HOSTS', 'S3_PATH_STYLE', 'BLOBS_URL'))}"
    given = words.text(rng) if rng.randrange(3) == 0 else None
    if given and "\0" not in given:
        os.environ[variable] = given.encode("utf-8", "replace").decode()
    try:
        found = load_settings()
        if ":geheim" in json.dumps(found.shown()):
            raise Finding("a secret is shown")
        for make in (lambda: found.database, lambda: found.broker, lambda: found.catalog_path):
            make()
        open_blobs(found.blobs, s3=s3_options(found)).close()
    finally:
        os.environ.pop(variable, None)
        del os.environ["FARM_CONFIG"]


def _catalog(path: Path, rng: Random) -> None:
    found = load_catalog(path, path.parent / "models")
    for lane in found.lanes():
        found.weights(lane).source  # noqa: B018
    for name in (*found.models, words.text(rng)):
        with contextlib.suppress(UnknownModel):
            found.entry(name)
            found.loras_for(name)


def _lock(path: Path, rng: Random) -> None:
    read_lock(path)


def _blocklist(path: Path, rng: Random) -> None:
    """Whatever is read, its links pass or refuse a text by ValueError."""
    text = words.text(rng)
    for link in chain(Blocklist.read(path)):
        with contextlib.suppress(ValueError):
            text = link(text)
    engine_refuses("sdcpp", text)
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(Invalid):
            parse(text)


Reader = Callable[[Path, Random], None]
READERS: tuple[tuple[str, str, Reader], ...] = (
    ("farm.toml", FARM, _settings),
    ("models.toml", MODELS, _catalog),
    ("models.lock", LOCK, _lock),
    ("blocklist.txt", BLOCKED, _blocklist),
)
