"""`farm models fetch`, `verify` and `add` against a hub that cuts, lies, is slow or is hostile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from farm.catalog import Lane, load_catalog
from tests.hub import BIG, COMMIT, SECOND, Hub
from tests.servers import poll

pytest.importorskip("pycurl")

ENTRY = """
[models.tiny]
licence = "LICENCE"
licence_url = "https://example.org/terms"
terms = "be kind"
[models.tiny.engines.diffusers]
repo = "me/tiny"
"""
WANTED = {"README.md", "model_index.json", "unet/config.json", BIG, SECOND}


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Farm = Callable[..., Ran]


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.stop()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    (path / "models.toml").write_text(ENTRY.replace("LICENCE", "mit"))
    return path


@pytest.fixture
def env(home: Path, hub: Hub) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FARM_", "HF_"))}
    kept = {k: v for k, v in kept.items() if not k.lower().endswith("_proxy")}
    return kept | {"FARM_HOME": str(home), "HF_ENDPOINT": hub.url}


@pytest.fixture
def farm(env: dict[str, str], tmp_path: Path) -> Farm:
    """Each call is a process of its own."""

    def call(*args: object, **more: str) -> Ran:
        argv = [sys.executable, "-m", "farm", *map(str, args)]
        done = subprocess.run(
            argv, env=env | more, cwd=tmp_path, capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def place(home: Path) -> Path:
    return home / "models" / "tiny" / "diffusers"


def names(place: Path) -> set[str]:
    found = (f for f in place.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {f.relative_to(place).as_posix() for f in found}


def part_sizes(place: Path) -> list[int]:
    """Bytes of the files on their way, the largest last."""
    return sorted(p.stat().st_size for p in place.parent.glob(".*.parts/*.part")) or [0]


# ---- the way it should go


def test_a_repository_comes_whole_and_is_locked(
    farm: Farm, hub: Hub, home: Path, place: Path
) -> None:
    assert "diffusers (not fetched)" in farm("models", "list").out
    ran = farm("models", "fetch", "tiny", "--json")
    assert ran.code == 0, ran.err
    assert "licence mit; https://example.org/terms; be kind" in ran.err
    told = ran.json["fetched"][0]
    assert (told["state"], told["files"], told["revision"]) == ("fetched", 5, COMMIT)
    assert told["received"] == told["size"] == sum(len(hub.files[name]) for name in WANTED)
    assert names(place) == WANTED
    assert all((place / name).read_bytes() == hub.files[name] for name in WANTED)
    assert not [p for p in place.parent.iterdir() if p.name.endswith((".parts", ".old"))]

    lock = json.loads((home / "models.lock").read_text())["models"]["tiny"]["engines"]["diffusers"]
    assert lock["revision"] == COMMIT
    assert lock["files"][BIG] == {
        "sha256": sha256(hub.files[BIG]).hexdigest(), "size": len(hub.files[BIG]),
    }  # fmt: skip
    catalog = load_catalog(home / "models.toml", home / "models")
    assert catalog.weights(Lane("tiny", "diffusers")).path == place
    listed = {m["name"]: m for m in farm("models", "--json").json}["tiny"]
    size = sum(len(hub.files[name]) for name in WANTED)
    assert listed["weights"]["diffusers"] == {
        "state": "fetched", "path": str(place), "bytes": size,
    }  # fmt: skip
    assert str(place) in farm("models", "show", "tiny").out

    hub.asked.clear()
    again = farm("models", "fetch", "tiny", "--json").json["fetched"][0]
    assert (again["state"], hub.asked) == ("already here", [])


def test_verify_names_what_changed(farm: Farm, place: Path) -> None:
    assert farm("models", "verify", "tiny").code == 1  # not locked
    assert farm("models", "fetch", "tiny").code == 0
    assert farm("models", "verify").code == 0
    data = bytearray((place / BIG).read_bytes())
    data[1_234_567] ^= 1
    (place / BIG).write_bytes(data)
    (place / "README.md").unlink()
    (place / "more.txt").write_text("x")
    ran = farm("models", "verify", "tiny", "--json")
    assert ran.code == 1
    assert {(fault["what"], fault["file"]) for fault in ran.json["faults"]} == {
        ("changed", BIG), ("missing", "README.md"), ("extra", "more.txt"),
    }  # fmt: skip
    shutil.rmtree(place)
    assert "not fetched" in farm("models", "verify", "tiny").out
    assert farm("models", "verify").code == 0


@pytest.mark.parametrize("mirror", ["files", "models_dir", "http"])
def test_without_the_hub_from_a_directory_or_a_mirror(
    farm: Farm, hub: Hub, home: Path, place: Path, tmp_path: Path, mirror: str
) -> None:
    source: object = tmp_path / "mirror"
    if mirror == "http":
        assert farm("models", "fetch", "tiny").code == 0
        shutil.rmtree(place)  # but the lock stays and tells what there is
        source = hub.url
    elif mirror == "models_dir":
        hub.write_to(tmp_path / "mirror" / "tiny" / "diffusers")
    else:
        hub.write_to(tmp_path / "mirror")
    ran = farm("models", "fetch", "tiny", "--from", source, HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.code == 0, ran.err
    assert names(place) == WANTED
    assert farm("models", "verify", "tiny").code == 0


def test_a_licence_with_terms_is_asked_for_once(farm: Farm, home: Path, place: Path) -> None:
    (home / "models.toml").write_text(ENTRY.replace("LICENCE", "openrail++"))
    ran = farm("models", "fetch", "tiny")
    assert (ran.code, place.exists()) == (2, False)
    assert "--accept-licence" in ran.err
    assert farm("models", "fetch", "tiny", "--accept-licence").code == 0
    assert json.loads((home / "models.lock").read_text())["models"]["tiny"]["accepted"]
    assert farm("models", "fetch", "tiny", "--update").code == 0


def test_one_file_by_url(farm: Farm, hub: Hub, home: Path) -> None:
    url, digest = f"{hub.url}/{BIG}", sha256(hub.files[BIG]).hexdigest()
    added = farm("models", "add", "one", "--url", url, "--sha256", digest, "-e", "sdcpp",
                 "--licence", "mit")  # fmt: skip
    assert added.code == 0, added.err
    ran = farm("models", "fetch", "one")
    assert ran.code == 0, ran.err
    catalog = load_catalog(home / "models.toml", home / "models")
    found = catalog.weights(Lane("one", "sdcpp")).path
    assert found is not None
    assert found.read_bytes() == hub.files[BIG]
    assert farm("models", "verify", "one").code == 0


def test_add_appends_and_pins(farm: Farm, home: Path, tmp_path: Path) -> None:
    before = (home / "models.toml").read_text()
    assert farm("models", "add", "tiny", "--repo", "me/tiny", "-e", "diffusers").code == 2
    ran = farm("models", "add", "pinned", "--repo", "me/tiny", "-e", "diffusers", "--json")
    assert ran.code == 0, ran.err
    text = (home / "models.toml").read_text()
    assert text.startswith(before)
    entry = load_catalog(home / "models.toml").get("pinned")
    assert (entry.licence, entry.engines["diffusers"].revision) == ("openrail++", COMMIT)
    told = entry.defaults
    assert (entry.family, told.width, told.steps, told.guidance_scale) == ("sdxl", 1024, 50, 5.0)
    assert farm("models", "fetch", "pinned", "--accept-licence").code == 0

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    assert farm("models", "add", "mine", "--path", "mine", "-e", "diffusers").code == 0
    assert farm("models", "verify", "mine").code == 0
    (tmp_path / "mine" / "model_index.json").write_text("{ }")
    assert farm("models", "verify", "mine").code == 1
    for bad in (
        ["--path", "x"],  # a path that is not there
        ["--url", "http://h/x.safetensors"],  # no hash
        ["--url", "http://h/x.ckpt", "--sha256", "a" * 64],  # a pickle
        ["--path", "x", "--repo", "a/b"],
        ["--repo", "../b"],
    ):
        assert farm("models", "add", "bad", "-e", "diffusers", *bad).code == 2, bad
    assert farm("models", "add", "x]\ny", "--path", "mine", "-e", "diffusers").code == 2
    offline = farm("models", "add", "later", "--repo", "me/x", "-e", "diffusers",
                   HF_ENDPOINT="http://127.0.0.1:9")  # fmt: skip
    assert (offline.code, "unpinned" in offline.err) == (0, True)


def test_add_takes_what_is_said_of_a_model(farm: Farm, home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    ran = farm("models", "add", "mine", "--path", "mine", "-e", "diffusers", "--licence", "mit",
               "--terms", 'be "kind"', "--attribution", "Jo", "--memory-gb", "7.5")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "defaults of flux: 1024x1024, 28 steps, guidance 3.5" in ran.err
    entry = load_catalog(home / "models.toml").get("mine")
    assert (entry.family, entry.terms, entry.memory_gb) == ("flux", 'be "kind"', 7.5)
    shown = farm("models", "show", "mine").out
    for told in ('be "kind"', "Jo", "7.5 GB", "1024x1024, 28 steps, guidance 3.5", "local, 31 B"):
        assert told in shown
    ran = farm("models", "add", "other", "--path", "mine", "-e", "diffusers", "--family", "sd9")
    assert (ran.code, "family" in ran.err) == (2, True)


def test_a_model_gets_weights_for_another_engine(farm: Farm, home: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    more = ["models", "add", "tiny", "-e", "sdcpp", "--path", "tiny.gguf"]
    assert farm(*more, "--licence", "mit").code == 2  # that stands there
    ran = farm(*more)
    assert ran.code == 0, ran.err
    assert "added weights for sdcpp, of tiny, to" in ran.err
    entry = load_catalog(home / "models.toml").get("tiny")
    assert (list(entry.engines), entry.terms) == (["diffusers", "sdcpp"], "be kind")
    assert farm("models", "verify", "tiny", "--json").json["files"] == 1
    assert farm(*more).code == 2  # again
    built_in = farm("models", "add", "shapes", "-e", "sdcpp", "--path", "tiny.gguf")
    assert (built_in.code, "there is a model shapes" in built_in.err) == (2, True)


def test_a_lora_has_a_place_beside_the_models(
    farm: Farm, hub: Hub, home: Path, tmp_path: Path
) -> None:
    hub.files = {"README.md": b"a card", "pixel.safetensors": b"low rank", "preview.png": b"x"}
    add = ["models", "add", "pixel", "--lora", "--for", "tiny", "--repo", "me/tiny"]
    ran = farm(*add, "--terms", "name its maker")
    assert ran.code == 0, ran.err
    assert (farm("models", "fetch", "pixel").code, "openrail++" in ran.err) == (2, False)
    ran = farm("models", "fetch", "pixel", "--accept-licence", "--json")
    assert ran.code == 0, ran.err
    assert "pixel (LoRA): fetched, 1 file" in ran.err
    file = home / "models" / "pixel" / "lora" / "pixel.safetensors"
    assert names(file.parent) == {"pixel.safetensors"}
    lora = load_catalog(home / "models.toml", home / "models").loras["pixel"]
    assert (lora.weights.path, lora.models, lora.licence) == (file, ("tiny",), "openrail++")

    listed = {m["name"]: m for m in farm("models", "--json").json}
    assert {name: listed[name]["kind"] for name in ("pixel", "tiny", "shapes")} == {
        "pixel": "lora", "tiny": "model", "shapes": "model",
    }  # fmt: skip
    assert listed["pixel"]["weights"]["lora"]["state"] == "fetched"
    assert "pixel  fetched  tiny" in farm("models", "list").out
    shown = farm("models", "show", "pixel").out
    assert all(told in shown for told in ("name its maker", "me/tiny at", str(file.parent)))
    assert "pixel (fetched)" in farm("models", "show", "tiny").out
    assert farm("models", "show", "tiny", "--json").json["loras"] == {"pixel": "fetched"}

    assert farm("models", "verify", "pixel").code == 0
    file.write_bytes(b"low rank?")
    ran = farm("models", "verify", "--json")
    assert [(f["model"], f["engine"], f["what"]) for f in ran.json["faults"]] == [
        ("pixel", "lora", "changed")
    ]


def test_a_lora_is_added_by_its_own_options(farm: Farm, home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"low rank")
    (tmp_path / "a.pt").write_bytes(b"a pickle")
    file = ("--path", "a.safetensors")
    for bad, named in (
        (["--lora", *file], "--for MODEL"),
        (["--for", "tiny", *file], "--for MODEL"),
        (["--lora", "--for", "tiny", "-e", "diffusers", *file], "leave out --engine"),
        (["--lora", "--for", "tiny", "--family", "sd1", *file], "no --family"),
        (["--lora", "--for", "tiny", "--path", "a.pt"], "pickled"),
        (["--lora", "--for", "tni", *file], "no model 'tni'"),
        (file, "--engine"),
    ):
        ran = farm("models", "add", "a", *bad)
        assert (ran.code, named in ran.err) == (2, True), (bad, ran.err)
    assert "[loras" not in (home / "models.toml").read_text()
    assert farm("models", "add", "tiny", "--lora", "--for", "tiny", *file).code == 2  # a model's
    assert farm("models", "add", "a", "--lora", "--for", "tiny", *file).code == 0
    assert farm("models", "add", "a", "-e", "sdcpp", *file).code == 2  # the LoRA's now


def test_what_was_fetched_is_what_diffusers_loads(farm: Farm, home: Path, tmp_path: Path) -> None:
    """Also with a dtype for each component; a worker needs no hub then."""
    pytest.importorskip("diffusers")
    from tests.models import tiny
    from workers.child import Child
    from workers.engine import EngineConfig

    with (home / "models.toml").open("a") as file:
        file.write('dtype = { default = "float32", vae = "float32" }\n')
    ran = farm("models", "fetch", "tiny", "--from", tiny("sd15"))
    assert ran.code == 0, ran.err
    weights = load_catalog(home / "models.toml", home / "models").weights(Lane("tiny", "diffusers"))
    assert weights.path == home / "models" / "tiny" / "diffusers"
    child = Child(EngineConfig("diffusers", "tiny", weights, threads=1), log=tmp_path / "log")
    try:
        assert child.start().weights_sha256
    finally:
        child.close()


# ---- cut, slow, killed


def test_a_new_process_goes_on_from_the_byte_it_had(farm: Farm, hub: Hub, place: Path) -> None:
    hub.mischief.cut, hub.mischief.falls = 1_700_000, False
    ran = farm("models", "fetch", "tiny", "--retries", "0", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "ERR_HUB_UNAVAILABLE")
    assert not place.exists()
    assert part_sizes(place)[-1] == 1_700_000
    hub.mischief.cut, hub.mischief.down = None, False
    hub.asked.clear()
    ran = farm("models", "fetch", "tiny", "--json")
    assert ran.code == 0, ran.err
    assert hub.ranges() == ["bytes=1700000-"]
    assert [a.if_range is not None for a in hub.asked if a.path == f"/lfs/{BIG}"] == [True]
    assert (place / BIG).read_bytes() == hub.files[BIG]
    assert farm("models", "verify", "tiny").code == 0


def test_one_process_goes_on_after_a_cut(farm: Farm, hub: Hub, place: Path) -> None:
    hub.mischief.cut = 1_000_000

    def mend() -> None:
        poll(lambda: hub.mischief.down, "the cut", 60)
        asked = len(hub.asked)
        poll(lambda: len(hub.asked) > asked, "another request, which fails", 60)
        hub.mischief.cut, hub.mischief.down = None, False

    thread = Thread(target=mend)
    thread.start()
    assert farm("models", "fetch", "tiny").code == 0
    thread.join()
    assert hub.ranges()[-1] == "bytes=1000000-"
    assert names(place) == WANTED


@pytest.mark.parametrize("change", ["no_range", "content"])
def test_it_begins_anew_where_the_rest_does_not_fit(
    farm: Farm, hub: Hub, place: Path, change: str
) -> None:
    hub.mischief.cut = 1_700_000
    assert farm("models", "fetch", "tiny", "--retries", "0").code == 1
    hub.mischief.cut, hub.mischief.down = None, False
    hub.mischief.no_range = change == "no_range"
    if change == "content":
        hub.files[BIG] = hub.files[BIG][::-1]
    ran = farm("models", "fetch", "tiny")
    assert ran.code == 0, ran.err
    assert (place / BIG).read_bytes() == hub.files[BIG]


def test_killed_in_the_middle_and_started_again(
    farm: Farm, hub: Hub, env: dict[str, str], place: Path, tmp_path: Path
) -> None:
    argv = [sys.executable, "-m", "farm", "models", "fetch", "tiny", "--limit-rate", "1M"]
    process = subprocess.Popen(argv, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while part_sizes(place)[-1] < 500_000:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not place.exists()
    had = part_sizes(place)
    hub.asked.clear()
    ran = farm("models", "fetch", "tiny", "--json")
    assert ran.code == 0, ran.err
    asked = hub.ranges()
    assert len(asked) == 1
    assert asked[0] in [f"bytes={size}-" for size in had]
    assert ran.json["fetched"][0]["received"] < ran.json["fetched"][0]["size"]
    assert names(place) == WANTED


def test_the_limit_is_not_exceeded(farm: Farm, hub: Hub) -> None:
    """Two files at once share it: 3.75 MB at 1 MiB/s are 3.58 s, and connecting takes time too."""
    begun = time.monotonic()
    ran = farm("models", "fetch", "tiny", "--limit-rate", "1M", "--json")
    wall = time.monotonic() - begun
    told = ran.json["fetched"][0]
    rate = told["received"] / told["seconds"]
    print(f"{rate / 2**20:.3f} MiB/s over {told['seconds']} s (process {wall:.2f} s)")
    assert told["seconds"] >= 3
    assert 0.5 < rate / 2**20 < 1.1


# ---- lies and traps


def refused(ran: Ran, place: Path, *, code: int = 2) -> None:
    assert ran.code == code, ran.err
    assert ran.json["error"]["code"] == "ERR_UNTRUSTED_MODEL"
    assert not place.exists()


def test_a_wrong_byte_is_refused_and_removed(farm: Farm, hub: Hub, place: Path) -> None:
    hub.mischief.flip = True
    ran = farm("models", "fetch", "tiny", "--json")
    refused(ran, place)
    assert "wrong bytes" in ran.json["error"]["message"]
    assert part_sizes(place)[-1] < len(hub.files[BIG])
    hub.mischief.flip = False
    assert farm("models", "fetch", "tiny").code == 0


def test_what_the_lock_says_goes_before_what_the_hub_says(
    farm: Farm, hub: Hub, place: Path
) -> None:
    assert farm("models", "fetch", "tiny").code == 0
    shutil.rmtree(place)
    hub.files[BIG] = hub.files[BIG][::-1]
    ran = farm("models", "fetch", "tiny", "--json")
    refused(ran, place)
    assert "models.lock" in ran.json["error"]["message"]
    assert farm("models", "fetch", "tiny", "--update").code == 0


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "a\\evil", "a//b", "x\n", "", "unet", "." * 300],
)
def test_a_hostile_file_name_is_refused(
    farm: Farm, hub: Hub, place: Path, tmp_path: Path, name: str
) -> None:
    hub.mischief.names = [name]
    refused(farm("models", "fetch", "tiny", "--json"), place)
    assert not list(tmp_path.rglob("evil"))


def test_pickles_are_refused_unless_allowed(farm: Farm, hub: Hub, home: Path, place: Path) -> None:
    del hub.files[BIG], hub.files["unet/diffusion_pytorch_model.fp16.safetensors"]
    refused(farm("models", "fetch", "tiny", "--json"), place)
    with (home / "models.toml").open("a") as file:
        file.write("allow_pickle = true\n")
    assert farm("models", "fetch", "tiny").code == 0
    assert "unet/diffusion_pytorch_model.bin" in names(place)


def test_a_redirect_to_a_private_address_is_refused(farm: Farm, hub: Hub, place: Path) -> None:
    other = Hub()
    try:
        for target in (
            other.url,
            f"http://localhost:{other.server_port}",
            "http://0x7f.1:80",
            "http://[::ffff:127.0.0.1]:80",
            "file:///etc",
            "http://169.254.169.254",
        ):
            hub.mischief.redirect = target
            refused(farm("models", "fetch", "tiny", "--json"), place)  # fmt: skip
        assert other.asked == []
    finally:
        other.stop()


def test_the_token_goes_to_the_hub_alone(farm: Farm, hub: Hub, place: Path) -> None:
    other = Hub()
    try:
        hub.mischief.redirect = other.url
        allowed = json.dumps([f"127.0.0.1:{other.server_port}"])
        ran = farm("-vv", "models", "fetch", "tiny", HF_TOKEN="hf_geheim", FARM_HUB_HOSTS=allowed)
        assert ran.code == 0, ran.err
        assert {a.token for a in hub.asked} == {"Bearer hf_geheim"}
        assert other.asked
        assert {a.token for a in other.asked} == {None}
        written = [f.read_bytes() for f in place.parents[2].rglob("*") if f.is_file()]
        assert "geheim" not in ran.out + ran.err
        assert not any(b"geheim" in data for data in written)
    finally:
        other.stop()


def test_doctor_says_fetch(farm: Farm) -> None:
    assert "farm models fetch tiny" in farm("doctor").out
