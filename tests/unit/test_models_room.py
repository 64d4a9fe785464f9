"""farm/models without a server: which files are wanted, which names and hosts are refused."""

from __future__ import annotations

import json
import socket
import sys
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import pycurl
import pytest

from farm.catalog import LORA, Family, Lane, Weights
from farm.cli.weights import parse_rate
from farm.errors import EnvironmentFault, FarmError, Invalid, InvalidConfig, UntrustedModel
from farm.models import place
from farm.models.entry import entry_text
from farm.models.families import family_defaults, family_of
from farm.models.guard import Hosts, is_public, origin, shown
from farm.models.listing import Listing, Remote, checked, wanted
from farm.models.lock import Locked, LockedFile, put_accepted, put_files, read_lock, safe_name
from farm.models.part import Flow, Part
from farm.models.transfer import Client, _Answer, curl_module

SDXL = """
README.md .gitattributes model_index.json sd_xl_base_1.0.safetensors
scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/merges.txt
text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
text_encoder/model.onnx text_encoder/openvino_model.bin text_encoder/openvino_model.xml
text_encoder/flax_model.msgpack text_encoder/pytorch_model.bin
unet/config.json unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model-00002-of-00002.safetensors
unet/diffusion_pytorch_model.fp16.safetensors unet/model.onnx_data
vae/config.json vae/diffusion_pytorch_model.safetensors
vae_decoder/model.onnx
"""
COMMON = """README.md model_index.json scheduler/scheduler_config.json tokenizer/vocab.json
tokenizer/merges.txt text_encoder/config.json unet/config.json vae/config.json
vae/diffusion_pytorch_model.safetensors"""


def chosen(names: list[str], engine: str = "diffusers", **about: object) -> set[str]:
    weights = Weights.model_validate({"repo": "me/x", **about})
    listing = Listing(None, checked(Remote(name, Path(name)) for name in names))
    return {file.name for file in wanted(listing, weights, engine).files}


def test_a_pipeline_comes_without_what_diffusers_does_not_load() -> None:
    assert chosen(SDXL.split()) == {
        *COMMON.split(),
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    }


def test_a_variant_is_taken_where_there_is_one() -> None:
    assert chosen(SDXL.split(), variant="fp16") == {
        *COMMON.split(),
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }


@pytest.mark.parametrize(
    "name", ["m.fp16-00001-of-00002.safetensors", "m-00001-of-00002.fp16.safetensors",
             "m.safetensors.index.fp16.json"],
)  # fmt: skip
def test_both_forms_of_a_sharded_variant(name: str) -> None:
    names = ["model_index.json", f"unet/{name}", "unet/m.safetensors"]
    assert chosen(names, variant="fp16") == {"model_index.json", f"unet/{name}"}
    assert chosen(names) == {"model_index.json", "unet/m.safetensors"}


def test_pickles_only_by_name_and_only_where_nothing_else_is() -> None:
    names = ["model_index.json", "unet/m.safetensors", "unet/m.bin", "vae/m.bin"]
    with pytest.raises(UntrustedModel, match=r"vae/m\.bin.*allow_pickle"):
        chosen(names)
    assert chosen(names, allow_pickle=True) == {*names} - {"unet/m.bin"}
    with pytest.raises(UntrustedModel, match=r"v1\.ckpt"):
        chosen(["v1.ckpt"], files=["*.ckpt"])


def test_of_many_quantisations_one_is_named() -> None:
    names = ["m-q4_0.gguf", "m-q8_0.gguf"]
    with pytest.raises(InvalidConfig, match=r"files = "):
        chosen(names, engine="sdcpp")
    assert chosen(names, engine="sdcpp", files=["*-q8_0.gguf"]) == {"m-q8_0.gguf"}
    with pytest.raises(InvalidConfig, match=r"none of its files"):
        chosen(names, engine="sdcpp", files=["*-q2.gguf"])


def test_of_a_lora_one_safetensors_file_comes() -> None:
    names = ["README.md", "pixel.safetensors", "pixel.pt", "preview.png"]
    assert chosen(names, engine=LORA) == {"pixel.safetensors"}
    two = [*names, "pixel-v2.safetensors"]
    with pytest.raises(InvalidConfig, match=r"pixel-v2\.safetensors, pixel\.safetensors; say with"):
        chosen(two, engine=LORA)
    assert chosen(two, engine=LORA, files=["*-v2*"]) == {"pixel-v2.safetensors"}
    with pytest.raises(UntrustedModel, match="pickled"):
        chosen(["pixel.pt"], engine=LORA, allow_pickle=True)
    with pytest.raises(InvalidConfig, match="there are: none"):
        chosen(["README.md"], engine=LORA)


@pytest.mark.parametrize(
    ("pipeline", "names", "family", "told"),
    [
        ("StableDiffusionPipeline", ["a/stable-diffusion-v1-5"], "sd1", (512, 50, 7.5)),
        ("StableDiffusionPipeline", ["stabilityai/sd-turbo"], "sd-turbo", (512, 1, 0.0)),
        ("StableDiffusionXLPipeline", ["sdxl", "me/base"], "sdxl", (1024, 50, 5.0)),
        ("StableDiffusionXLPipeline", ["mine", "me/SDXL-Turbo"], "sdxl", (512, 1, 0.0)),
        ("FluxPipeline", ["b/FLUX.1-schnell"], "flux", (1024, 4, 0.0)),
        ("Flux2KleinPipeline", ["b/FLUX.2-klein-4B"], "flux2-klein", (1024, 4, 1.0)),
        ("Flux2KleinPipeline", ["b/FLUX.2-klein-base-4B"], "flux2-klein", (1024, 50, 4.0)),
        ("WanPipeline", ["x"], None, None),
    ],
)
def test_a_pipeline_tells_family_and_defaults(
    pipeline: str, names: list[str], family: Any, told: tuple[int, int, float] | None
) -> None:
    assert family_of(pipeline, *names) == family
    found = family_defaults(family or "other", *names)
    assert (found and (found.width, found.steps, found.guidance_scale)) == told
    assert found is None or found.width == found.height


def test_every_family_but_other_has_defaults() -> None:
    families = set(get_args(Family)) - {"other"}
    assert all(family_defaults(family) for family in families)


def test_an_entry_s_text_reads_back_as_it_was() -> None:
    """Whatever a description says, TOML shall not take it for its own."""
    said = {
        "licence": 'a "quoted"\\ one',
        "description": "line\nline\x7f\t[models.x] # ünï 画 ''",
        "memory_gb": 2.5,
        "sizes": ["512x512", "64x64"],
        "terms": "",
        "defaults": {"width": 512, "steps": 4, "guidance_scale": 0.0},
        "engines": {"sdcpp": {"path": "/a b", "options": {"rng": "cuda", "flash_attn": False}}},
    }
    read = tomllib.loads(entry_text("models", "m", said))["models"]["m"]
    assert read == {key: value for key, value in said.items() if value != ""}


def test_a_file_named_as_a_folder_is_refused() -> None:
    with pytest.raises(UntrustedModel):
        checked([Remote("a", "http://h/a"), Remote("a/b", "http://h/a/b")])


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "a/../x", "/x", "a//x", "a/", "./x", "a\\x", "a\0", "a\n", "\u202ex", "", None,
     7, "x" * 300, "/".join(["x" * 200] * 6), "\ud800"],
)  # fmt: skip
def test_a_name_stays_inside(name: object) -> None:
    with pytest.raises(UntrustedModel):
        safe_name(name)


@pytest.mark.parametrize("name", ["a", "unet/x.safetensors", "a b/ü 画", "..a/...b", "-x"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("::1", False),
        ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False), ("fc00::1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("224.0.0.1", False), ("x", False),
        ("::127.0.0.1", False), ("::ffff:0:10.0.0.1", False), ("64:ff9b:1::a00:1", False),
        ("fec0::1", False), ("5f00::1", False), ("3fff::1", False), ("64:ff9b::808:808", True),
        ("2001:0:7f00:1::", False), ("::ffff:169.254.169.254", False), ("fd00:ec2::254", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    ["ftp://h/x", "file:///etc/passwd", "http://", "http:///x", "http://h:99999/", "x", "//h/x",
     "http://a\\@b/", "http://a b/", "http://h/\n", "gopher://h/"],
)  # fmt: skip
def test_only_http_is_asked(url: str) -> None:
    with pytest.raises(UntrustedModel):
        origin(url)


def test_where_a_redirect_may_lead() -> None:
    hosts = Hosts(["https://hub.lan", "http://127.0.0.1:8000"], ["store.lan", "10.0.0.9:9000"])
    for good in (
        "https://hub.lan/x",
        "https://store.lan:1/x",
        "https://10.0.0.9:9000/",
        "https://cdn.example.org/x",
    ):
        hosts.check(good, before="https://hub.lan/y")  # fmt: skip
    for bad in (
        "http://hub.lan/x",
        "https://10.0.0.9/",
        "https://localhost/",
        "https://[::1]/",
        "https://u:p@cdn.example.org/",
        "https://127.0.0.1:8001/",
        "https://2130706433/",
    ):
        with pytest.raises(UntrustedModel):
            hosts.check(bad, before="https://hub.lan/y")  # fmt: skip


def test_what_a_name_leads_to_is_looked_at_as_it_is_opened() -> None:
    """A name of a stranger may lead to one address when it is looked up and to another after."""
    client = Client(Hosts(["https://hub.lan"]), Flow(), hub_url="https://hub.lan")
    way = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    for url, address, opens in (
        ("https://cdn.example.org/x", "8.8.8.8", True),
        ("https://cdn.example.org/x", "127.0.0.1", False),
        ("https://cdn.example.org/x", "169.254.169.254", False),
        ("https://cdn.example.org/x", "::1", False),
        ("https://hub.lan/x", "10.0.0.9", True),
    ):
        answer = _Answer()
        place = client._opener(url, answer)(0, (*way, (address, 443)))
        assert (place != pycurl.SOCKET_BAD, answer.refused) == (opens, not opens)
        for opened in answer.sockets:
            opened.close()


def test_a_shown_url_holds_no_secret() -> None:
    assert shown("https://u:geheim@h/a/b?sig=geheim#geheim") == "https://h/a/b"


@pytest.mark.parametrize(("text", "rate"), [("5M", 5 * 2**20), ("500k", 512_000), ("2048", 2048),
                                            ("1.5G", 1.5 * 2**30)])  # fmt: skip
def test_rates_are_curl_s(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "M", "5X", "-5M", "nan", "inf", "0", "5 M/s", "1"])
def test_a_rate_that_is_none(text: str) -> None:
    with pytest.raises(Invalid, match="--limit-rate"):
        parse_rate(text)


def test_the_lock_is_sorted_and_not_written_without_need(tmp_path: Path) -> None:
    path, lane = tmp_path / "models.lock", Lane("m", "diffusers")
    locked = Locked(files={"b": LockedFile(size=1), "a": LockedFile(size=2, sha256="0" * 64)})
    put_files(path, lane, locked)
    put_accepted(path, "m", "openrail++")
    text = path.read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"
    assert read_lock(path).find(lane, {}) == locked
    assert read_lock(path).find(lane, {"repo": "me/other"}) is None
    before = path.stat().st_mtime_ns, path.stat().st_ino
    put_files(path, lane, locked)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"version": 2}', '{"models": {"../x": {}}}',
     '{"models": {"m": {"engines": {"diffusers": {"files": {"../x": {}}}}}}}',
     '{"models": {"m": {"engines": {"diffusers": {"files": {"x": {"sha256": "x"}}}}}}}'],
)  # fmt: skip
def test_a_broken_lock_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "models.lock").write_text(text)
    with pytest.raises(InvalidConfig, match=r"models\.lock"):
        read_lock(tmp_path / "models.lock")


def test_a_lock_that_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="directory"):
        read_lock(tmp_path)


def test_a_part_goes_on_with_its_hash(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        with Part(tmp_path / "x.part", lambda n: None) as part:
            part.write(data)
            part.finish()
    assert part.sha256.hexdigest() == sha256(b"onetwo").hexdigest()


def test_too_little_disk_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="GiB are free"):
        place.check_space(tmp_path, 2**60)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        place.alone_at(tmp_path / "diffusers"),
        pytest.raises(FarmError, match="another process"),
        place.alone_at(tmp_path / "diffusers"),
    ):
        pass


def test_a_kill_between_the_last_renames_loses_nothing(tmp_path: Path) -> None:
    lane_dir = tmp_path / "diffusers"
    staging = place.staging_for(lane_dir, {}, None)
    (part,) = place.parts_of(staging, ["unet/x"])
    (staging / "files" / "unet").mkdir()
    (staging / "files" / "unet" / "x").write_text("moved, then killed")
    assert place.parts_of(staging, ["unet/x"]) == [part]
    found = Locked(files={"unet/x": LockedFile(size=18)})
    place.appear(staging, [part], found, lane_dir)
    assert (lane_dir / "unet" / "x").read_text() == "moved, then killed"
    assert place.read_note(lane_dir, {}) == found
    assert not staging.exists()


def test_without_pycurl_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycurl", None)
    with pytest.raises(InvalidConfig, match=r"pip install 'renderfarm\[models\]'"):
        curl_module()
