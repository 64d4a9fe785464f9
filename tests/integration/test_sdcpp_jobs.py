"""What a job can ask of stable-diffusion.cpp beyond text-to-image, on tiny random models."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm.engines import missing_packages
from farm.errors import EngineCrashed, FarmError, InvalidConfig, ModelNotLoaded
from tests import sdcpp_models as models
from tests.sdcpp_kit import Kit, config, spec
from workers.child import Child
from workers.engine import EngineConfig
from workers.engines.sdcpp_arguments import arguments, clip_skip_of, steps_of
from workers.messages import Rendered

if missing_packages("sdcpp"):
    pytest.skip("stable-diffusion.cpp is not installed", allow_module_level=True)

SIDE = 64


def numbers(key: int) -> NDArray[np.uint8]:
    return np.random.default_rng(key).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def broken_loras(folder: Path) -> dict[str, Path]:
    """Files by what is wrong with them."""
    good = models.lora().read_bytes()
    shapes = models.lora_shapes()
    odd = shapes | {"diffusion_model.single_blocks.0.linear2.lora_B.weight": (128, 3)}
    alone = {name: shape for name, shape in shapes.items() if "linear1.lora_B" not in name}
    elsewhere = {name.replace("blocks", "towers"): shape for name, shape in shapes.items()}
    made = {
        "unlike": models.lora_shapes(hidden=256), "odd": odd, "alone": alone,
        "elsewhere": elsewhere, "model": models.transformer(),
    }  # fmt: skip
    files = {name: folder / f"{name}.safetensors" for name in made}
    for name, found in made.items():
        models.write(files[name], models.tensors(found))
    for name, data in (("cut", good[:-100]), ("text", b"<html>not found</html>" * 9)):
        files[name] = folder / f"{name}.safetensors"
        files[name].write_bytes(data)
    files["pickle"] = folder / "pickle.pt"
    files["pickle"].write_bytes(good)
    return files | {"missing": folder / "missing.safetensors", "folder": folder}


BROKEN = {
    "unlike": r"layer of \d+ inputs and \d+ outputs, which this model does not have",
    "odd": "its counterpart's", "alone": "has no counterpart",
    "elsewhere": "none of its tensors fits this model", "model": "this file is no LoRA",
    "cut": "truncated", "text": "neither safetensors nor GGUF", "pickle": "can hold programs",
    "missing": "missing", "folder": "not a regular file",
}  # fmt: skip


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One worker with everything, loaded once."""
    folder = tmp_path_factory.mktemp("kit")
    loras = {"ink": models.lora(), "oil": models.lora(1), **broken_loras(folder)}
    told = dataclasses.replace(config(models.klein_with_encoder()), loras=loras)
    made = Kit(folder / "log", told)
    yield made
    made.child.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[EngineConfig], Kit]]:
    made: list[Kit] = []

    def start(told: EngineConfig) -> Kit:
        made.append(Kit(tmp_path / f"log-{len(made)}", told))
        return made[-1]

    yield start
    for one in made:
        one.child.close()


def pixels(kit: Kit, **params: Any) -> NDArray[np.int64]:
    result = kit.render(**params)
    assert isinstance(result, np.ndarray), result
    return result.astype(np.int64)


# ------------------------------------------------------------------- input pictures
def test_a_vae_with_an_encoder_changes_no_text_to_image(
    kit: Kit, other: Callable[[EngineConfig], Kit]
) -> None:
    assert other(config(models.klein())).picture() == kit.picture()


def test_strength_leads_from_the_input_to_a_new_picture(kit: Kit) -> None:
    init = numbers(1)
    given = {"init_image": kit.take(init), "steps": 4}
    assert np.array_equal(pixels(kit, **given, strength=0.0), init), "it comes back itself"
    new = pixels(kit, steps=4)
    away = [
        np.abs(pixels(kit, **given, strength=strength) - new).mean()
        for strength in (0.25, 0.5, 0.75, 1.0)
    ]
    assert away == sorted(away, reverse=True)
    assert away[0] > 2 * away[2] > 0
    assert np.array_equal(pixels(kit, steps=4), new)


def test_a_strength_below_one_step_is_a_small_change_all_the_same(kit: Kit) -> None:
    init = kit.take(numbers(1))
    few, many = (pixels(kit, init_image=init, strength=0.05, steps=steps) for steps in (1, 20))
    assert np.array_equal(few, many), "the last of twenty steps"


def test_inpainting_keeps_what_the_mask_does_not_paint(kit: Kit) -> None:
    init, mask = numbers(2), np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 8:40] = 255
    given = {"init_image": kit.take(init), "mask_image": kit.take(mask), "strength": 0.9}
    result = pixels(kit, **given)
    assert np.array_equal(result[mask == 0], init[mask == 0])
    assert np.abs(result - init)[mask == 255].mean() > 10
    around = numbers(3)
    around[mask == 255] = init[mask == 255]
    moved = pixels(kit, **{**given, "init_image": kit.take(around)})
    assert not np.array_equal(moved[mask == 255], result[mask == 255]), "it sees what is around"
    nothing = kit.take(np.zeros((SIDE, SIDE), np.uint8))
    assert np.array_equal(pixels(kit, **{**given, "mask_image": nothing}), init)


def test_input_pictures_that_cannot_be_used_are_told(kit: Kit) -> None:
    key = kit.take(numbers(1))
    kit.inputs[f"inputs/{'0' * 64}.png"] = b"no picture"
    told = kit.refusal(init_image=f"inputs/{'0' * 64}.png", strength=0.5)
    assert (told.code, "no picture that can be read" in told.message) == (
        "ERR_INVALID_PARAMETER", True,
    )  # fmt: skip
    absent = kit.refusal(init_image=f"inputs/{'1' * 64}.png", strength=0.5)
    assert "did not come with the job" in absent.message
    assert kit.refusal(init_image=key, strength=0.5, width=72).code == "ERR_INVALID_PARAMETER"


def test_without_a_vae_encoder_such_jobs_are_refused(
    other: Callable[[EngineConfig], Kit],
) -> None:
    plain = other(config(models.klein()))
    init = plain.take(numbers(1))
    for params, kind in (
        ({}, "image-to-image"),
        ({"mask_image": plain.take(Image.new("L", (SIDE, SIDE), 255))}, "inpainting"),
    ):
        told = plain.refusal(init_image=init, strength=0.5, **params)
        assert told.code == "ERR_INVALID_PARAMETER"
        assert told.message.startswith(f"{kind} needs a VAE encoder")


# ----------------------------------------------------------------------------- LoRAs
def test_a_lora_changes_the_picture_by_its_weight_and_leaves_no_trace(kit: Kit) -> None:
    plain = pixels(kit)
    ink = [pixels(kit, loras={"ink": weight}) for weight in (0.1, 1.0)]
    distances = [np.abs(one - plain).mean() for one in ink]
    assert 0 < distances[0] < distances[1]
    both = pixels(kit, loras={"ink": 1.0, "oil": -0.5})
    assert np.abs(both - ink[1]).mean() > 0
    assert np.array_equal(pixels(kit, loras={"ink": 1.0, "oil": 0.0}), ink[1])
    assert np.array_equal(pixels(kit, loras={"ink": 0.0}), plain), "a weight of 0 is as none"
    assert np.array_equal(pixels(kit), plain), "later renders are as before, bit for bit"


def test_loras_go_with_quantised_weights(kit: Kit, other: Callable[[EngineConfig], Kit]) -> None:
    loras = {"ink": models.lora()}
    quantised = other(dataclasses.replace(config(models.klein_gguf("q8_0")), loras=loras))
    plain = quantised.picture()
    assert quantised.picture(loras={"ink": 1.0}) != plain
    assert quantised.picture() == plain
    assert quantised.info.loras == {"ink": kit.info.loras["ink"]}


def test_the_hash_of_each_good_lora_is_told(kit: Kit) -> None:
    good = {"ink": models.lora(), "oil": models.lora(1)}
    for name, file in good.items():
        assert kit.info.loras[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(kit.info.loras) == {*good, "elsewhere"}, "what it fits only a render tells"


@pytest.mark.parametrize("name", BROKEN)
def test_a_lora_that_cannot_be_used_fails_its_jobs_and_no_other(kit: Kit, name: str) -> None:
    pid = kit.child.pid
    for _ in range(2):
        told = kit.refusal(loras={name: 1.0, "ink": 1.0})
        assert told.code == "ERR_INVALID_PARAMETER"
        assert told.message.startswith(f"LoRA {name}: ")
        assert re.search(BROKEN[name], told.message)
    assert isinstance(kit.render(steps=1), np.ndarray)
    assert kit.child.pid == pid


def test_an_unknown_lora_and_one_in_the_prompt_are_refused(kit: Kit) -> None:
    assert kit.refusal(loras={"chalk": 1.0}).message == ("LoRA chalk: this worker does not have it")
    told = kit.refusal(prompt=f"a cat <lora:{models.lora()}:1>")
    assert told.code == "ERR_INVALID_PROMPT"


def test_a_lora_whose_file_was_changed_is_looked_at_anew(
    tmp_path: Path, other: Callable[[EngineConfig], Kit]
) -> None:
    file = tmp_path / "ink.safetensors"
    file.write_bytes(models.lora().read_bytes())
    told = dataclasses.replace(config(models.klein()), loras={"ink": file})
    one = other(told)
    before = one.picture(loras={"ink": 1.0})
    file.write_bytes(models.lora(1).read_bytes()[:-10])
    with pytest.raises(EngineCrashed, match="LoRA ink: its file was changed"):
        one.render(loras={"ink": 1.0})
    with pytest.raises(InvalidConfig, match="others now than when this worker began"):
        one.child.start()
    assert "truncated" in other(told).refusal(loras={"ink": 1.0}).message
    file.write_bytes(models.lora().read_bytes())
    one.child.start()
    assert one.picture(loras={"ink": 1.0}) == before


# ------------------------------------------------------------------------- one load
def test_all_kinds_of_jobs_share_one_load(kit: Kit) -> None:
    init = kit.take(numbers(1))
    mask = kit.take(np.where(numbers(4)[..., 0] > 99, 255, 0).astype(np.uint8))
    pid, loads = kit.child.pid, kit.loads()
    small: dict[str, Any] = {"steps": 1, "width": 32, "height": 32}
    kinds: list[dict[str, Any]] = [
        {}, {"init_image": init, "strength": 0.6}, {"loras": {"ink": 0.7}},
        {"init_image": init, "mask_image": mask, "strength": 0.9, "loras": {"oil": 1.0}},
    ]  # fmt: skip
    done = 0
    for kind in kinds * 2:
        jobs = [spec(seed=n, **small, **kind) for n in range(3)]
        events = list(kit.child.render(jobs, kit.inputs))
        done += sum(isinstance(event, Rendered) for event in events)
    assert done == 24
    assert (kit.child.pid, kit.loads(), loads) == (pid, 1, 1)


# ------------------------------------------------------------- what needs no library
@pytest.mark.parametrize(
    ("steps", "strength", "expected"),
    [
        (20, None, (20, 20, 1.0)), (20, 1.0, (20, 20, 1.0)), (20, 0.5, (20, 10, 0.475)),
        (20, 0.99, (20, 19, 0.925)), (4, 0.3, (4, 1, 0.125)), (4, 0.2, (5, 1, 0.1)),
        (1, 0.05, (20, 1, 0.025)), (1, 1e-9, (1_000, 1, 0.0005)),
    ],
)  # fmt: skip
def test_as_many_steps_as_in_diffusers(
    steps: int, strength: float | None, expected: tuple[int, int, float]
) -> None:
    init = None if strength is None else f"inputs/{'0' * 64}.png"
    found = steps_of(spec(steps=steps, strength=strength, init_image=init))
    assert found == pytest.approx(expected)
    if found.taken < found.schedule:  # as the library counts, in float32
        assert int(np.float32(found.schedule) * np.float32(found.strength)) + 1 == found.taken


@pytest.mark.parametrize(
    ("version", "asked", "expected"),
    [
        ("SD 1.x", None, -1), ("SD 1.x", 1, 2), ("SD 1.x Inpaint", 11, 12), ("SD 2.x", 1, 3),
        ("SDXL", 1, 3), ("SDXL (SSD1B)", 2, 4), ("SD3.x", 1, 3), ("Flux.2 klein", None, -1),
        ("Flux.2 klein", 1, None), ("Z-Image", 1, None), ("SDXS (09)", 1, None),
    ],
)  # fmt: skip
def test_clip_skip_counts_from_what_the_model_leaves_out_anyway(
    version: str, asked: int | None, expected: int | None
) -> None:
    job = spec(clip_skip=asked)
    assert clip_skip_of(job, version) == expected
    assert arguments(job, version, None, distilled=False)["clip_skip"] == expected


def test_a_model_without_clip_refuses_clip_skip(kit: Kit) -> None:
    told = kit.refusal(clip_skip=2)
    assert told.code == "ERR_INVALID_PARAMETER"
    assert told.message == "clip_skip: this model has no CLIP layers that can be skipped"


# --------------------------------------------------------------------------- memory
def test_tiles_are_what_is_left_to_ease_the_memory(
    kit: Kit, other: Callable[[EngineConfig], Kit]
) -> None:
    eased = other(dataclasses.replace(config(models.klein_with_encoder()), eased=1))
    assert eased.info.versions["vae_tiling"] == "0x0"
    assert "vae_tiling" not in kit.info.versions
    assert eased.info.weights_sha256 == kit.info.weights_sha256
    assert eased.picture() == kit.picture(), "one tile holds a small picture"
    large: dict[str, Any] = {"width": 640, "height": 64, "steps": 1}
    tiled, whole = pixels(eased, **large), pixels(kit, **large)
    assert 0 < np.abs(tiled - whole).mean() < 0.5 * np.abs(whole - whole.mean()).mean()
    init = eased.take(numbers(1))
    assert pixels(eased, **large, init_image=init, strength=0.5).std() > 1


def private_memory(pid: int | None) -> int:
    """What RLIMIT_DATA counts of a process, in bytes."""
    found = re.search(r"VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found.group(1))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' memory")
def test_beyond_the_memory_limit_tiles_help_and_then_the_job_is_told(
    kit: Kit, other: Callable[[EngineConfig], Kit]
) -> None:
    told = config(models.klein(), threads=1)
    free = other(told)
    limit = private_memory(free.child.pid) + 180_000_000
    tight = other(dataclasses.replace(told, memory_limit=limit))
    assert tight.info.memory == limit
    assert kit.info.memory
    assert limit < kit.info.memory <= psutil.virtual_memory().total
    expected = free.picture()
    assert tight.picture() == expected
    wide = {"width": 1024, "height": 128, "steps": 1}  # 218 MB to decode, and in tiles half of it
    assert isinstance(tight.render(**wide), np.ndarray)
    assert "insufficient memory" in tight.log.read_text(errors="replace")
    refused = tight.refusal(width=2048, height=2048, steps=1)
    assert refused.code == "ERR_OUT_OF_MEMORY", refused.message
    assert "insufficient memory" in refused.message
    assert tight.picture() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' memory")
def test_a_limit_in_which_the_engine_cannot_start_is_told(
    tmp_path: Path, other: Callable[[EngineConfig], Kit]
) -> None:
    told = config(models.klein(), threads=1)
    limit = private_memory(other(told).child.pid) // 2
    child = Child(dataclasses.replace(told, memory_limit=limit), log=tmp_path / "tight")
    with pytest.raises(FarmError, match=r"insufficient memory|bad_alloc|MemoryError") as caught:
        child.start()
    assert caught.value.code in ("ERR_ENGINE_CRASHED", "ERR_MODEL_NOT_LOADED")


def test_weights_beyond_the_limit_are_told_before_they_are_loaded(tmp_path: Path) -> None:
    told = dataclasses.replace(config(models.klein()), memory_limit=10_000_000)
    child = Child(told, log=tmp_path / "log")
    with pytest.raises(ModelNotLoaded, match="limit is 10,000,000; raise it, or quantise"):
        child.start()
