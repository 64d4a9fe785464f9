"""Loading with diffusers on tiny random pipelines: one file, other components, options."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from diffusers.models import modeling_utils
from safetensors.torch import load_file, save_file

from farm.catalog import Weights
from farm.errors import FarmError, InvalidConfig, ModelNotLoaded, PictureBlocked
from tests.ldm_layout import vae_file, write_single_file
from tests.load_kit import Loaded
from tests.models import tiny
from workers.engine import EngineConfig
from workers.engines.diffusers_engine import DiffusersEngine

# numpy 2 tells diffusers' schedulers, which turn tensors to arrays, of a protocol to come
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@functools.cache
def plain() -> Loaded:
    return Loaded(tiny("sd15"))


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    plain.cache_clear()


def refusal(kind: type[FarmError], path: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        Loaded(path, **settings)
    return caught.value.message


# -------------------------------------------------------------------------- one file
def config_only(family: str, to: Path) -> Path:
    """The pipeline's directory as one downloads it for a checkpoint of one file."""
    return Path(shutil.copytree(tiny(family), to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """A checkpoint of the original layout; beside it `config`."""
    config_only("sd15", tmp_path / "config")
    return write_single_file(tiny("sd15"), tmp_path / "sd15.safetensors")


def test_one_file_gives_the_pictures_of_its_directory(one_file: Path) -> None:
    loaded = Loaded(one_file, config="config")
    assert np.array_equal(loaded.picture(), plain().picture())
    assert type(loaded.pipe) is type(plain().pipe)
    absolute = Loaded(one_file, config=str(one_file.parent / "config"))
    assert absolute.info.weights_sha256 == loaded.info.weights_sha256


def test_the_hash_of_one_file_covers_file_and_config(one_file: Path) -> None:
    before = Loaded(one_file, config="config").info.weights_sha256
    renamed = one_file.rename(one_file.with_name("other.safetensors"))
    assert Loaded(renamed, config="config").info.weights_sha256 == before
    scheduler = one_file.parent / "config" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    other_config = Loaded(renamed, config="config").info.weights_sha256
    tensors = load_file(renamed)
    tensors["model.diffusion_model.out.2.bias"] += 1
    save_file(tensors, renamed)
    assert len({before, other_config, Loaded(renamed, config="config").info.weights_sha256}) == 3


def test_one_file_in_dtypes_of_its_own(one_file: Path) -> None:
    mixed = {"dtype": {"default": "bfloat16", "vae": "float32"}}
    loaded = Loaded(one_file, weights=mixed, config="config")
    assert loaded.pipe.unet.dtype == loaded.pipe.text_encoder.dtype == torch.bfloat16
    assert loaded.pipe.vae.dtype == torch.float32
    assert loaded.info.versions["dtype"] == "text_encoder bfloat16, unet bfloat16, vae float32"
    of_directory = Loaded(tiny("sd15"), weights=mixed)
    assert of_directory.info.versions["dtype"] == loaded.info.versions["dtype"]
    assert np.array_equal(loaded.picture(), of_directory.picture())


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _without_vae(file: Path) -> None:
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("first_stage_model")}
    save_file(tensors, file)


def _without_one(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_cut, "sd15.safetensors: truncated"),
        (lambda file: file.write_bytes(b""), "sd15.safetensors: empty"),
        (_without_one, "; tensors are missing"),
        (_without_vae, "sd15.safetensors: "),
        (Path.unlink, "sd15.safetensors: missing"),
        (lambda file: shutil.rmtree(file.parent / "config" / "tokenizer"), "tokenizer: missing"),
        (lambda file: shutil.rmtree(file.parent / "config"), "config: there is no such directory"),
    ],
)
def test_a_broken_file_or_config_is_named(
    one_file: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    spoil(one_file)
    assert told in refusal(ModelNotLoaded, one_file, config="config")


def test_one_file_without_config_is_refused_with_what_to_do(one_file: Path) -> None:
    message = refusal(InvalidConfig, one_file)
    assert "needs options.config" in message
    assert "model_index.json" in message


def test_a_pickle_is_taken_only_when_allowed(one_file: Path) -> None:
    pickle = one_file.with_suffix(".ckpt")
    torch.save({"state_dict": load_file(one_file)}, pickle)
    allowed = Loaded(pickle, weights={"allow_pickle": True}, config="config")
    assert np.array_equal(allowed.picture(), plain().picture())
    weights = Weights.model_construct(path=pickle, options={"config": "config"})
    with pytest.raises(ModelNotLoaded, match=r"only as \.safetensors"):
        DiffusersEngine(EngineConfig("diffusers", "tiny", weights)).load()
    gguf = one_file.rename(one_file.with_suffix(".gguf"))
    assert "only as .safetensors" in refusal(ModelNotLoaded, gguf, config="config")


# ------------------------------------------------------------------------ components
@pytest.fixture
def other_vae(tmp_path: Path) -> Path:
    vae = AutoencoderKL.from_pretrained(tiny("sd15"), subfolder="vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.2
    vae.save_pretrained(tmp_path / "other-vae")
    return tmp_path / "other-vae"


def test_another_vae_gives_the_pictures_of_a_model_that_has_it(
    other_vae: Path, tmp_path: Path
) -> None:
    swapped = Loaded(tiny("sd15"), components={"vae": str(other_vae)})
    whole = Path(shutil.copytree(tiny("sd15"), tmp_path / "whole"))
    shutil.rmtree(whole / "vae")
    shutil.copytree(other_vae, whole / "vae")
    assert np.array_equal(swapped.picture(), Loaded(whole).picture())
    assert not np.array_equal(swapped.picture(), plain().picture())
    assert swapped.info.weights_sha256 == Loaded(whole).info.weights_sha256
    assert swapped.info.weights_sha256 != plain().info.weights_sha256
    (whole / "vae" / "diffusion_pytorch_model.safetensors").unlink()  # not needed: its own is gone
    assert np.array_equal(
        Loaded(whole, components={"vae": "../other-vae"}).picture(), swapped.picture()
    )


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_vae_of_one_file(layout: str, tmp_path: Path) -> None:
    file = tmp_path / "vae.safetensors"
    if layout == "original":
        vae_file(tiny("sd15"), file)
    else:
        shutil.copy(tiny("sd15") / "vae" / "diffusion_pytorch_model.safetensors", file)
    loaded = Loaded(tiny("sd15"), components={"vae": str(file)})
    assert np.array_equal(loaded.picture(), plain().picture())


def test_other_text_encoder_tokenizer_and_scheduler(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.safetensors"
    tensors = load_file(tiny("sd15") / "text_encoder" / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, encoder, {"format": "pt"})
    DDIMScheduler(beta_end=0.02, steps_offset=1, clip_sample=False).save_pretrained(
        tmp_path / "scheduler"
    )
    loaded = Loaded(
        tiny("sd15"),
        components={
            "text_encoder": str(encoder),
            "tokenizer": str(tiny("sd15") / "tokenizer"),
            "scheduler": str(tmp_path / "scheduler"),
        },
    )
    assert loaded.pipe.scheduler.config.beta_end == 0.02
    name = "embeddings.position_embedding.weight"
    found = {n.removeprefix("text_model."): t for n, t in tensors.items()}[name]
    state = loaded.pipe.text_encoder.state_dict()
    got = {n.removeprefix("text_model."): t for n, t in state.items()}[name]
    assert torch.equal(got, found * 1.5)
    assert not np.array_equal(loaded.picture(), plain().picture())


def test_a_component_of_another_class_of_the_same_kind(tmp_path: Path) -> None:
    channels = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    AutoencoderTiny(
        **channels, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4
    ).save_pretrained(tmp_path / "taesd")
    loaded = Loaded(tiny("sd15"), components={"vae": str(tmp_path / "taesd")})
    assert isinstance(loaded.pipe.vae, AutoencoderTiny)
    assert loaded.picture().shape == (64, 64, 3)


def test_a_component_beside_one_file(one_file: Path, other_vae: Path) -> None:
    _without_vae(one_file)
    loaded = Loaded(one_file, config="config", components={"vae": other_vae.name})
    swapped = Loaded(tiny("sd15"), components={"vae": str(other_vae)})
    assert np.array_equal(loaded.picture(), swapped.picture())


def test_broken_components_are_named(other_vae: Path, tmp_path: Path) -> None:
    weights = other_vae / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, weights, {"format": "pt"})
    told = {"vae": str(other_vae)}
    message = refusal(ModelNotLoaded, tiny("sd15"), components=told)
    assert f"{other_vae}: tensor decoder.conv_out.bias of vae is missing" in message
    _cut(weights)
    assert f"{weights}: truncated" in refusal(ModelNotLoaded, tiny("sd15"), components=told)
    shutil.rmtree(other_vae)
    assert f"{other_vae} is not there" in refusal(InvalidConfig, tiny("sd15"), components=told)
    (tmp_path / "vae.bin").write_bytes(b"x")
    pickle = {"vae": str(tmp_path / "vae.bin")}
    assert "neither directory nor" in refusal(InvalidConfig, tiny("sd15"), components=pickle)
    scheduler = {"scheduler": str(vae_file(tiny("sd15"), tmp_path / "x.safetensors"))}
    assert "needs a directory" in refusal(InvalidConfig, tiny("sd15"), components=scheduler)


# -------------------------------------------------------------------- safety checker
def unchecked(tmp_path: Path) -> Loaded:
    """The model of sd15_refusing, saved without a safety checker."""
    folder = Path(shutil.copytree(tiny("sd15_refusing"), tmp_path / "unchecked"))
    index = folder / "model_index.json"
    told = {"safety_checker": [None, None], "requires_safety_checker": False}
    index.write_text(json.dumps({**json.loads(index.read_text()), **told}))
    return Loaded(folder)


def test_the_safety_checker_is_on_by_default_and_off_by_name(tmp_path: Path) -> None:
    assert isinstance(Loaded(tiny("sd15_refusing")).result(), PictureBlocked)
    assert isinstance(Loaded(tiny("sd15_refusing"), safety_checker=True).result(), PictureBlocked)
    folder = Path(shutil.copytree(tiny("sd15_refusing"), tmp_path / "m"))
    shutil.rmtree(folder / "safety_checker")  # what is left out need not be there
    loaded = Loaded(folder, safety_checker=False)
    assert loaded.pipe.safety_checker is None
    assert np.array_equal(loaded.picture(), unchecked(tmp_path).picture())
    assert "safety_checker: missing" in refusal(ModelNotLoaded, folder)
    assert "names none" in refusal(InvalidConfig, tiny("sd15"), safety_checker=True)


def test_one_file_has_the_safety_checker_of_its_config(tmp_path: Path) -> None:
    config_only("sd15_refusing", tmp_path / "config")
    file = write_single_file(tiny("sd15_refusing"), tmp_path / "m.safetensors")
    assert "safety_checker/model.safetensors: missing" in refusal(
        ModelNotLoaded, file, config="config"
    )
    loaded = Loaded(file, config="config", safety_checker=False)
    assert np.array_equal(loaded.picture(), unchecked(tmp_path).picture())
    checker = "safety_checker/model.safetensors"
    shutil.copy(tiny("sd15_refusing") / checker, tmp_path / "config" / checker)
    assert isinstance(Loaded(file, config="config").result(), PictureBlocked)


# --------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"speed": 9}, "has no option speed, it has: components, config, device_map"),
        ({"offload": "all"}, "option offload: one of none, model, sequential; not 'all'"),
        ({"offload": "model", "device": "cpu"}, "option offload: model needs a GPU, this is cpu"),
        ({"device_map": "auto"}, "option device_map: one of cuda, balanced, cpu; not 'auto'"),
        ({"device_map": "cuda", "device": "cpu"}, "option device_map: cuda is not cpu"),
        ({"device_map": "cpu", "device": "cuda:1"}, "option device_map: cpu is not cuda:1"),
        ({"device_map": "cpu", "offload": "model"}, "device_map: cpu goes without offload"),
        ({"vae_tiling": 1}, "option vae_tiling: one of false, true; not '1'"),
        ({"vae_slicing": "yes"}, "option vae_slicing: one of false, true; not 'yes'"),
        ({"safety_checker": "off"}, "option safety_checker: one of false, true"),
        ({"components": "vae"}, "option components: a table of component = path"),
        ({"components": {"vae": 3}}, "option components.vae: a path; not '3'"),
        ({"components": {"vae": "a\0b"}}, "option components.vae: a path"),
        ({"components": {"../vae": "x"}}, "'../vae' names no component"),
        ({"components": {"transformer": "x"}}, "no transformer in "),
        ({"components": {"vae": "nowhere"}}, "nowhere is not there"),
        ({"config": "x"}, "option config: only with a path that is one file"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], told: str) -> None:
    assert told in refusal(InvalidConfig, tiny("sd15"), **options)


def test_a_repo_has_no_place_for_relative_paths() -> None:
    weights = Weights(repo="some/model", options={"components": {"vae": "vae"}})
    with pytest.raises(InvalidConfig, match="the path must be absolute, not vae"):
        DiffusersEngine(EngineConfig("diffusers", "tiny", weights)).load()


def test_a_device_map_of_the_cpu_changes_nothing(other_vae: Path) -> None:
    loaded = Loaded(tiny("sd15"), device_map="cpu")
    assert loaded.info.device == "cpu"
    assert loaded.info.weights_sha256 == plain().info.weights_sha256
    assert np.array_equal(loaded.picture(), plain().picture())
    vae = {"vae": str(other_vae)}
    swapped = Loaded(tiny("sd15"), components=vae, device_map="cpu").picture()
    assert np.array_equal(swapped, Loaded(tiny("sd15"), components=vae).picture())


def test_parallel_loading_reads_shards_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd15"), dtype=torch.float32)
    pipeline.save_pretrained(tmp_path / "m", max_shard_size="300KB")
    threaded = modeling_utils._load_shard_files_with_threadpool
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return threaded(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "_load_shard_files_with_threadpool", counted)
    assert np.array_equal(Loaded(tmp_path / "m").picture(), plain().picture())
    assert not calls
    loaded = Loaded(tmp_path / "m", parallel_loading=True)
    assert np.array_equal(loaded.picture(), plain().picture())
    assert calls


def test_index_json_of_a_class_that_is_not_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("sd15"), tmp_path / "m"))
    index = folder / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "vae": ["os", "system"]}))
    message = refusal(ModelNotLoaded, folder, components={"vae": str(tiny("sd15") / "vae")})
    assert "neither library has a os.system" in message


def test_a_killed_engine_leaves_no_semaphore_behind() -> None:
    code = (
        "import sys; from pathlib import Path; from farm.catalog import Weights;"
        "from workers.child import Child; from workers.engine import EngineConfig;"
        "child = Child(EngineConfig('diffusers', 'm', Weights(path=Path(sys.argv[1])), 'cpu'));"
        "child.start(); child.kill()"
    )
    words = [sys.executable, "-c", code, str(tiny("sd15"))]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "leaked" not in ran.stderr
