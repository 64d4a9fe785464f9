"""Broken model files, hostile parameters and settings: each is told, and the worker survives."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.catalog import Weights
from farm.engines import missing_packages
from farm.errors import FarmError, InvalidConfig, ModelNotLoaded
from farm.spec import JobSpec
from tests import sdcpp_models as models
from tests.sdcpp_kit import PARTS, SPEC, Kit, config
from workers.child import Child
from workers.engine import EngineConfig
from workers.engines.checkpoint_files import check_checkpoint

if missing_packages("sdcpp"):
    pytest.skip("stable-diffusion.cpp is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """The one worker that must survive everything here."""
    made = Kit(tmp_path_factory.mktemp("kit") / "log", config(models.klein()))
    yield made
    made.child.close()


# ------------------------------------------------------------- hostile parameters
A_CHARACTER = "é" * 2_001
KEY = f"inputs/{'0' * 64}.png"
HOSTILE: list[tuple[dict[str, Any], str, str]] = [
    ({"guidance_scale": math.nan}, "ERR_INVALID_PARAMETER", "guidance_scale: expected a number"),
    ({"guidance_scale": math.inf}, "ERR_INVALID_PARAMETER", "guidance_scale: expected a number"),
    ({"guidance_scale": -1.0}, "ERR_INVALID_PARAMETER", "from 0 to 100, got -1.0"),
    ({"width": 65_536}, "ERR_INVALID_PARAMETER", "width: expected a multiple of 8 from 16"),
    ({"height": 65_536}, "ERR_INVALID_PARAMETER", "height: expected a multiple of 8 from 16"),
    ({"width": 0}, "ERR_INVALID_PARAMETER", "got 0"),
    ({"width": -64}, "ERR_INVALID_PARAMETER", "got -64"),
    ({"width": 2**31}, "ERR_INVALID_PARAMETER", "got 2147483648"),
    ({"width": 72}, "ERR_INVALID_PARAMETER", "multiples of 16, the next is 80x64"),
    ({"steps": 0}, "ERR_INVALID_PARAMETER", "steps: expected a whole number from 1 to 500"),
    ({"steps": 2**31}, "ERR_INVALID_PARAMETER", "got 2147483648"),
    ({"seed": -1}, "ERR_INVALID_PARAMETER", "seed: expected a whole number from 0"),
    ({"seed": 2**63}, "ERR_INVALID_PARAMETER", "got 9223372036854775808"),
    ({"scheduler": "warp"}, "ERR_INVALID_PARAMETER", "scheduler: expected one of ddim"),
    ({"scheduler": "deis"}, "ERR_INVALID_PARAMETER", "scheduler deis: engine sdcpp can do ddim"),
    ({"prompt": "x" * 40_000}, "ERR_INVALID_PROMPT", "1 to 8,000 characters"),
    ({"prompt": "a\0b"}, "ERR_INVALID_PROMPT", "control character U+0000"),
    ({"prompt": "\ud800"}, "ERR_INVALID_PROMPT", "prompt: expected a text"),
    ({"prompt": " "}, "ERR_INVALID_PROMPT", "empty"),
    ({"prompt": A_CHARACTER}, "ERR_INVALID_PROMPT", "4,002 bytes of text; engine sdcpp reads 4,0"),
    ({"negative_prompt": A_CHARACTER}, "ERR_INVALID_PROMPT", "4,002 bytes of text"),
    ({"prompt": "a <lora:../x:1>"}, "ERR_INVALID_PROMPT", "<lora:...> in a prompt would open"),
    ({"prompt": "a <LoRA:/etc/passwd:1>"}, "ERR_INVALID_PROMPT", "would open a file"),
    ({"negative_prompt": "<lora:x:1>"}, "ERR_INVALID_PROMPT", "would open a file"),
    ({"init_image": KEY, "strength": math.nan}, "ERR_INVALID_PARAMETER", "strength: expected a nu"),
    ({"init_image": KEY, "strength": 1.5}, "ERR_INVALID_PARAMETER", "from 0 to 1, with an init_im"),
    ({"init_image": "/etc/passwd", "strength": 0.5}, "ERR_INVALID_PARAMETER", "init_image: expec"),
    ({"mask_image": KEY}, "ERR_INVALID_PARAMETER", "mask_image goes with init_image only"),
    ({"loras": (("../x", 1.0),)}, "ERR_INVALID_PARAMETER", "names in the catalogue"),
    ({"loras": (("ink", math.inf),)}, "ERR_INVALID_PARAMETER", "weights from -4 to 4"),
    ({"loras": (("ink", 1.0),)}, "ERR_INVALID_PARAMETER", "LoRA ink: this worker does not have it"),
    ({"clip_skip": -1}, "ERR_INVALID_PARAMETER", "clip_skip: expected a whole number from 1"),
    ({"prompt": "(" * 1_900 + "a" + ")" * 1_900}, "ERR_BAD_IMAGE", "all pixels have the same"),
]  # fmt: skip


def test_hostile_parameters_are_refused_and_the_worker_lives(kit: Kit) -> None:
    pid, good = kit.child.pid, kit.picture(steps=1)
    told = set()
    for params, code, sentence in HOSTILE:
        result = kit.result(JobSpec.model_construct(**{**SPEC, **params}))
        assert isinstance(result, FarmError), params
        assert result.code == code, (params, result.message)
        assert sentence in result.message
        told.add(result.message)
        assert kit.picture(steps=1) == good
    assert kit.child.pid == pid
    assert len(told) > 20


@pytest.mark.parametrize(
    "prompt",
    ["x" * 4_000, "😀" * 1_000, "((((" * 1_000, "[a:b]" * 800, "a\u0301" * 1_300, "<|im_end|>" * 9],
)
def test_the_longest_and_oddest_prompts_are_survived(kit: Kit, prompt: str) -> None:
    pid = kit.child.pid
    kit.render(prompt=prompt, steps=1)
    assert isinstance(kit.render(steps=1), np.ndarray)
    assert kit.child.pid == pid


# --------------------------------------------------------------- broken model files
def _header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON header of a safetensors file, the data stay."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _offsets(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        last = list(header)[-1]
        old = header[last]["data_offsets"]
        header[last]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


def _last(**entry: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[list(header)[-1]].update(entry)


def _keep(wanted: Callable[[str], bool]) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        models.write(file, {n: t for n, t in models.whole().items() if wanted(n)})

    return change


def _nan(file: Path) -> None:
    whole = {name: np.full_like(t, np.nan) for name, t in models.whole().items()}
    models.write(file, whole)


def _misshapen(file: Path) -> None:
    whole = dict(models.whole())
    whole[models.DIT + "img_in.weight"] = np.zeros((128, 64), np.float16)
    models.write(file, whole)


def _half_an_encoder(file: Path) -> None:
    one = {models.VAE + "encoder.conv_in.weight": np.zeros((128, 3, 3, 3), np.float16)}
    models.write(file, models.whole() | one)


def _gguf(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(models.klein_gguf().read_bytes()))


def _with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda file: _header(file, change)


def _again(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


LONG = (2**40).to_bytes(8, "little")
BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", Path.unlink, "missing (No such file"),
    ("fifo", _again(os.mkfifo), "not a regular file"),
    ("device", _again(lambda f: f.symlink_to("/dev/zero")), "not a regular file"),
    ("empty", lambda f: f.write_bytes(b""), "empty, 0 bytes"),
    ("tiny", lambda f: f.write_bytes(b"abc"), "neither safetensors nor GGUF, or truncated"),
    ("text", lambda f: f.write_text("<html>not found</html>"), "neither safetensors nor GGUF"),
    ("long header", lambda f: f.write_bytes(LONG + b"{}"), "neither safetensors nor GGUF"),
    ("no json", lambda f: f.write_bytes(b"\x02" + bytes(7) + b"{]"), "its header is broken"),
    ("a list", lambda f: f.write_bytes(b"\x02" + bytes(7) + b"[]"), "its header is broken"),
    ("nothing", lambda f: f.write_bytes(b"\x02" + bytes(7) + b"{}"), "holds no tensors"),
    ("deep", lambda f: f.write_bytes((9000).to_bytes(8, "little") + b"[" * 9000), "is broken"),
    ("cut", lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated, tensor first_stage_mod"),
    ("cut header", lambda f: f.write_bytes(f.read_bytes()[:900]), "or truncated (900 bytes)"),
    ("offsets beyond", _with_header(_offsets(10**9, 10**9)), "bytes beyond it"),
    ("offsets overlap", _with_header(_offsets(-8, -8)), "overlaps the one before"),
    ("offsets below", _with_header(_last(data_offsets=[-64, 0])), "are no sizes"),
    ("offsets reversed", _with_header(_last(data_offsets=[64, 0])), "-64 bytes, its shape needs"),
    ("huge shape", _with_header(_last(shape=[2**31, 2**31])), "its shape needs 9,223,372,036,85"),
    ("odd shape", _with_header(_last(shape=["x"])), "are no sizes"),
    ("six dimensions", _with_header(_last(shape=[1] * 5 + [32])), "has 6 dimensions"),
    ("unknown type", _with_header(_last(dtype="F4")), "unknown type F4"),
    ("no shape", _with_header(lambda h: h[list(h)[-1]].pop("shape")), "is broken (KeyError"),
    ("NaN weights", _nan, "the first test picture is of one colour; wrong weights?"),
    ("no transformer", _keep(lambda n: not n.startswith(models.DIT)), "klein.safetensors: "),
    ("a part only", _keep(lambda n: n.startswith(models.LLM)), "klein.safetensors: "),
    ("no VAE", _keep(lambda n: not n.startswith(models.VAE)), "not in model file"),
    ("half an encoder", _half_an_encoder, "not in model file"),
    ("one tensor lost", _keep(lambda n: "txt_in" not in n), "klein.safetensors: "),
    ("one misshapen", _misshapen, "klein.safetensors: "),
    ("GGUF version", _gguf(lambda d: d[:4] + b"\x63\0\0\0" + d[8:]), "GGUF version 99, known"),
    ("GGUF cut", _gguf(lambda d: d[:-5000]), "truncated, tensor"),
    ("GGUF header cut", _gguf(lambda d: d[:500]), "truncated inside its header"),
    ("GGUF magic only", _gguf(lambda d: d[:4]), "truncated inside its header"),
    ("GGUF tensors", _gguf(lambda d: d[:8] + LONG + d[16:]), "1,099,511,627,776 tensors"),
    ("GGUF name", _gguf(lambda d: d[:16] + bytes(8) + LONG + d[24:]), "a name of 1,099,511,627"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "told"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_file_is_told_and_harms_nobody(
    kit: Kit, tmp_path: Path, name: str, spoil: Callable[[Path], object], told: str
) -> None:
    file = tmp_path / "klein.safetensors"
    file.write_bytes(models.klein().read_bytes())
    spoil(file)
    child = Child(config(file), log=tmp_path / "log", load_timeout_s=30)
    with pytest.raises(ModelNotLoaded) as caught:
        child.start()
    assert caught.value.code == "ERR_MODEL_NOT_LOADED"
    assert str(file) in caught.value.message
    assert told in caught.value.message
    assert not child.alive
    assert isinstance(kit.render(steps=1), np.ndarray)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".PKL"])
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(models.klein().read_bytes())
    with pytest.raises(ModelNotLoaded, match=r"are not read, they can hold programs"):
        check_checkpoint(file)


WTYPES = ("q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "iq2_xxs", "tq1_0", "NVFP4", "", 1)
SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(({"wtype": wtype}, "option wtype: one of default, f32, f16, bf16, q8_0") for wtype in WTYPES),
    ({"rng": "dice"}, "option rng: one of cuda, std_default; not 'dice'"),
    ({"flash_attn": "yes"}, "option flash_attn: one of False, True; not 'yes'"),
    ({"flash_attn": 1}, "option flash_attn"),
    ({"vae_tiling": "8x8"}, "option vae_tiling: true, false or a size"),
    ({"vae_tiling": "32x"}, "option vae_tiling"),
    ({"vae_tiling": 32}, "option vae_tiling"),
    ({"vae": ""}, "option vae: the name of a file"),
    ({"vae": "a\0b"}, "option vae: the name of a file"),
    ({"vae": 7}, "option vae: the name of a file"),
    ({"scm_mask": "1,1"}, "has no option scm_mask, it has: diffusion_model, vae, taesd"),
    ({"diffusion_model": "x"}, "needs a directory as path"),
]


@pytest.mark.parametrize(("options", "told"), SETTINGS)
def test_settings_that_the_library_would_not_survive(options: dict[str, Any], told: str) -> None:
    from workers.engines.sdcpp_options import options_of

    with pytest.raises(InvalidConfig) as caught:
        options_of(config(models.klein(), **options))
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (Weights(repo="a/b"), "reads local files; first: farm models fetch tiny"),
        (Weights(), "needs path"),
        (Weights(path=Path("x"), dtype="float16"), "has no dtype; options.wtype names"),
        (Weights(path=Path("/")), "is a directory; name its options.diffusion_model"),
        (Weights(path=Path("x"), options={"wtype": "q8_1"}), "option wtype"),
    ],
)
def test_wrong_settings_are_told_through_the_child(
    tmp_path: Path, weights: Weights, told: str
) -> None:
    child = Child(EngineConfig("sdcpp", "tiny", weights), log=tmp_path / "log")
    with pytest.raises(InvalidConfig, match=told):
        child.start()


def test_a_missing_part_is_told_by_its_name(tmp_path: Path) -> None:
    parts = {**PARTS, "vae": "elsewhere.safetensors"}
    child = Child(config(models.klein_parts(), **parts), log=tmp_path / "log")
    with pytest.raises(ModelNotLoaded, match=r"parts/elsewhere\.safetensors: missing"):
        child.start()


def test_a_device_that_the_build_has_not_is_told(tmp_path: Path) -> None:
    told = EngineConfig("sdcpp", "tiny", Weights(path=models.klein()), device="tpu")
    child = Child(told, log=tmp_path / "log")
    with pytest.raises(InvalidConfig, match=r"device 'tpu': this build of stable-diffusion\.cpp"):
        child.start()
