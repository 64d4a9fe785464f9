"""The real diffusers code on tiny random pipelines: equal pictures, and refusals that help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from farm.catalog import Weights
from farm.errors import (
    BadImage,
    EngineCrashed,
    FarmError,
    InvalidConfig,
    InvalidParameter,
    JobCancelled,
    ModelNotLoaded,
    OutOfMemory,
    PictureBlocked,
)
from farm.samplers import SAMPLERS
from farm.spec import JobSpec
from tests.diffusers_kit import FLOAT32_TOLERANCE, QUIET, Steps, config, engine, floats, spec
from tests.models import tiny
from workers.child import Child
from workers.engine import EngineConfig
from workers.engines.diffusers_engine import DiffusersEngine, to_pixels
from workers.messages import Failed, Rendered, Started

pytestmark = QUIET


def refusal(path: Path) -> str:
    with pytest.raises(ModelNotLoaded) as caught:
        DiffusersEngine(config(path)).load()
    return caught.value.message


# ------------------------------------------------------------------------- one picture
@pytest.mark.parametrize(
    "family", ["sd15", "sdxl", "sd3", "flux", "klein", "qwen_image", "z_image"]
)
@pytest.mark.parametrize("size", [4, 8])
def test_alone_or_among_others_within_tolerance(family: str, size: int) -> None:
    together = floats(family, [spec(n) for n in range(size)])
    for number in range(size):
        alone = floats(family, [spec(number)])[0]
        assert (together[number] - alone).abs().max() <= FLOAT32_TOLERANCE
    assert len({picture.numpy().tobytes() for picture in together}) == size


@pytest.mark.parametrize(
    "family", ["sd15", "sdxl", "sd3", "flux", "klein", "qwen_image", "z_image"]
)
def test_at_one_size_of_micro_batch_neighbours_and_place_change_nothing(family: str) -> None:
    first = floats(family, [spec(0), spec(1), spec(2), spec(3)])[1]
    other = floats(family, [spec(5), spec(6), spec(7), spec(1)])[3]
    assert torch.equal(first, other)


def test_the_bytes_are_those_of_the_pipeline_itself() -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd15"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    job = spec(1)
    theirs = pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance_scale,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(job.seed),
    )
    (ours,) = engine("sd15").render([job], Steps())
    assert np.array_equal(np.asarray(theirs.images[0]), ours)


def test_to_pixels_rounds_and_survives_nan() -> None:
    column = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, float("nan"), 1.2])
    assert to_pixels(column.expand(1, 3, 1, 6))[0][0, :, 0].tolist() == [0, 0, 1, 255, 0, 255]


def test_steps_are_told() -> None:
    watch = Steps()
    engine("sd15").render([spec()], watch)
    assert watch.seen == [(1, 3), (2, 3), (3, 3)]


def test_cancelling_between_steps_leaves_the_engine_as_it_was() -> None:
    before = floats("sd15", [spec()])
    watch = Steps(cancel_after=2)
    with pytest.raises(JobCancelled):
        engine("sd15").render([spec()], watch)
    assert len(watch.seen) == 2
    assert torch.equal(floats("sd15", [spec()]), before)


def test_a_size_that_the_model_rounds_is_refused() -> None:
    (result,) = engine("flux").render([spec(width=72)], Steps())
    assert isinstance(result, InvalidParameter)
    assert result.message == "size 72x64: this model gives 64x64"


def test_a_refused_picture_says_so() -> None:
    (result,) = engine("sd15_refusing").render([spec()], Steps())
    assert isinstance(result, PictureBlocked)
    assert "safety checker" in result.message


def test_nan_spoils_only_its_own_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine("sd15")._pipe.vae.decode

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        pictures = decode(*args, **kwargs)
        pictures[0][1, 0, 3, 3] = float("nan")
        return pictures

    monkeypatch.setattr(engine("sd15")._pipe.vae, "decode", spoilt)
    results = engine("sd15").render([spec(0), spec(1), spec(2)], Steps())
    assert [isinstance(result, FarmError) for result in results] == [False, True, False]
    assert isinstance(results[1], BadImage)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.AcceleratorError("device-side assert triggered", 710), EngineCrashed),
        (RuntimeError("CUDA error: an illegal memory access"), EngineCrashed),
        (RuntimeError("sizes do not match"), RuntimeError),
    ],
)
def test_failures_of_torch_have_their_names(
    monkeypatch: pytest.MonkeyPatch, error: Exception, named: type[Exception]
) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine("sd15")._pipe.unet, "forward", forward)
        with pytest.raises(named):
            engine("sd15").render([spec()], Steps())
    assert isinstance(engine("sd15").render([spec()], Steps())[0], np.ndarray)


# --------------------------------------------------------------------------- schedulers
def test_a_scheduler_changes_the_picture_and_leaves_no_trace() -> None:
    own = floats("sd15", [spec()])
    seen = {own.numpy().tobytes()}
    names = ("euler_a", "dpm++_2m_karras", "unipc", "dpm++_2m_sde", "heun", "lcm", "tcd")
    for name in names:
        picture = floats("sd15", [spec(scheduler=name)])
        assert torch.equal(picture, floats("sd15", [spec(scheduler=name)]))
        seen.add(picture.numpy().tobytes())
        assert torch.equal(floats("sd15", [spec()]), own)
    assert len(seen) == 1 + len(names)


@pytest.mark.parametrize("name", [name for name, s in SAMPLERS.items() if not s.flow])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_does_few_steps_too(name: str, steps: int) -> None:
    picture = floats("sd15", [spec(scheduler=name, steps=steps)])
    assert bool(picture.isfinite().all())
    assert picture.std() > 0.01


def test_more_steps_than_a_scheduler_has_are_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"50 x 1\.0 is smaller than `num_inf"):
        engine("sd15").render([spec(scheduler="lcm", steps=60)], Steps())


def test_naming_the_models_own_scheduler_changes_nothing() -> None:
    assert torch.equal(floats("sd15", [spec(scheduler="ddim")]), floats("sd15", [spec()]))


def test_noise_drawn_in_the_steps_is_each_jobs_own() -> None:
    together = floats("sd15", [spec(n, scheduler="euler_a") for n in range(3)])
    alone = floats("sd15", [spec(2, scheduler="euler_a")])[0]
    assert (together[2] - alone).abs().max() <= FLOAT32_TOLERANCE


def test_an_incompatible_scheduler_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="scheduler euler: this model can do flow_euler"):
        engine("flux").render([spec(scheduler="euler")], Steps())
    with pytest.raises(InvalidParameter, match="scheduler flow_euler: this model can do ddim, "):
        engine("sd15").render([spec(scheduler="flow_euler")], Steps())


# ------------------------------------------------------------------- through the child
def bytes_of(child: Child, jobs: Sequence[JobSpec]) -> list[bytes]:
    found = {e.id: e.pixels.tobytes() for e in child.render(jobs) if isinstance(e, Rendered)}
    return [found[number] for number in range(len(jobs))]


def test_strict_mode_gives_equal_bytes_in_every_company_and_process(tmp_path: Path) -> None:
    child = Child(config(tiny("sd15"), micro_batch=4, strict=True), log=tmp_path / "log")
    info = child.start()
    assert (info.device, info.micro_batch) == ("cpu", 4)
    assert {"torch", "diffusers", "transformers", "dtype"} <= set(info.versions)
    five = bytes_of(child, [spec(n) for n in range(5)])
    assert bytes_of(child, [spec(1)]) == [five[1]]
    assert bytes_of(child, [spec(8), spec(4), spec(1)])[1:] == [five[4], five[1]]

    codes: list[str] = []
    for event in child.render([spec(n, steps=400) for n in range(6)]):
        if isinstance(event, Started):
            child.cancel(range(6))
        if isinstance(event, Failed):
            codes.append(event.error.code)
    assert codes == ["ERR_CANCELLED"] * 6
    assert bytes_of(child, [spec(1)]) == [five[1]]

    child.kill()
    assert child.start().weights_sha256 == info.weights_sha256
    assert bytes_of(child, [spec(n) for n in range(5)]) == five
    child.close()


def test_a_broken_model_is_named_through_the_child(tmp_path: Path) -> None:
    child = Child(config(tmp_path / "nowhere"), log=tmp_path / "log")
    with pytest.raises(ModelNotLoaded, match=r"nowhere: there is no such directory"):
        child.start()


# ------------------------------------------------------------------ broken directories
@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        return Path(shutil.copytree(tiny(family), tmp_path / family))

    return make


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _lose_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, file, {"format": "pt"})


def _nan(file: Path) -> None:
    tensors = {name: torch.full_like(t, float("nan")) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def _pickle_only(file: Path) -> None:
    file.rename(file.with_suffix(".bin"))


UNET = "unet/diffusion_pytorch_model.safetensors"
CORPUS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model_index.json", Path.unlink, "model_index.json: missing"),
    ("model_index.json", lambda f: f.write_text("{]"), "model_index.json: not valid JSON"),
    ("model_index.json", lambda f: f.write_text("{}"), "model_index.json: names no components"),
    ("unet", shutil.rmtree, "unet: missing, model_index.json wants a UNet2DConditionModel there"),
    ("unet/config.json", Path.unlink, "unet/config.json: missing"),
    (UNET, Path.unlink, UNET + ": missing"),
    (UNET, _truncate, UNET + ": truncated, "),
    (UNET, lambda f: f.write_bytes(b""), UNET + ": truncated, or not a safetensors file (0 bytes)"),
    (UNET, lambda f: f.write_bytes(b"\x02" + bytes(7) + b"[]"), UNET + ": its header is broken"),
    (UNET, _pickle_only, "(only diffusion_pytorch_model.bin, which are not read)"),
    (UNET, _lose_tensor, "is missing"),
    (UNET, _nan, "the first test picture has NaN values"),
    ("text_encoder/model.safetensors", Path.unlink, "text_encoder/model.safetensors: missing"),
    ("text_encoder/model.safetensors", _lose_tensor, "tensors are missing"),
    ("tokenizer", shutil.rmtree, "tokenizer: missing, model_index.json wants a CLIPTokenizer"),
    ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json: missing"),
    ("scheduler/scheduler_config.json", lambda f: f.write_text("x"), "not valid JSON"),
]


@pytest.mark.parametrize(("name", "spoil", "told"), CORPUS)
def test_a_broken_directory_is_told_by_file(
    copy: Callable[[str], Path], name: str, spoil: Callable[[Path], Any], told: str
) -> None:
    folder = copy("sd15")
    spoil(folder / name)
    message = refusal(folder)
    assert told in message
    assert str(folder) in message


def test_an_unknown_pipeline_class_is_told(copy: Callable[[str], Path]) -> None:
    folder = copy("sd15")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "NoPipeline"}))
    assert "NoPipeline" in refusal(folder)


def test_the_hash_covers_weights_and_configuration(copy: Callable[[str], Path]) -> None:
    folder = copy("sd15")

    def sha256() -> str:
        return DiffusersEngine(config(folder)).load().weights_sha256

    before = sha256()
    (folder / "README.md").write_text("not part of the model")
    assert sha256() == before
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert sha256() != before


def test_shards_and_variants_are_checked(tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny("sd15"), dtype=torch.float32)
    pipeline.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size="300KB")
    weights = Weights(path=tmp_path / "m", variant="fp16")
    whole = EngineConfig("diffusers", "tiny", weights, threads=1)
    assert DiffusersEngine(whole).load().device == "cpu"
    shard = sorted((tmp_path / "m" / "unet").glob("*00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ModelNotLoaded, match=shard.name):
        DiffusersEngine(whole).load()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weights": Weights()}, "neither path nor repo"),
        ({"weights": Weights(path=Path("x"), options={"speed": 9})}, "no option speed"),
        ({"weights": Weights(path=Path("x")), "device": "warp"}, "device 'warp'"),
        ({"weights": Weights(path=Path("x")), "device": "cuda:77"}, "device 'cuda:77'"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidConfig, match=told):
        DiffusersEngine(EngineConfig("diffusers", "tiny", **settings)).load()


@pytest.fixture(scope="module", autouse=True)
def _forget_engines() -> Iterator[None]:
    yield
    engine.cache_clear()
