"""What a job can ask of the diffusers engine: input pictures, long prompts, clip skip."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farm.catalog import Weights
from farm.demo import SHAPES_DIR
from farm.errors import InvalidParameter, InvalidPrompt
from tests.diffusers_kit import (
    FAMILIES,
    FLOAT32_TOLERANCE,
    INPUTS,
    KINDS,
    LONG,
    PICTURES,
    QUIET,
    Steps,
    config,
    engine,
    floats,
    of_kind,
    right_part,
    spec,
    stored,
)
from tests.models import tiny
from workers.child import Child
from workers.engine import EngineConfig
from workers.engines.diffusers_engine import DiffusersEngine
from workers.messages import Rendered

pytestmark = QUIET


def rendered(family: str, *jobs: Any) -> list[Any]:
    return list(engine(family).render(jobs, Steps(), INPUTS))


# ---------------------------------------------------------------------- input pictures
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours_change_nothing(family: str, kind: str) -> None:
    together = floats(family, [of_kind(kind, n) for n in range(4)], INPUTS)
    others = floats(family, [of_kind(kind, n) for n in (5, 6, 2, 7)], INPUTS)
    assert torch.equal(together[2], others[2])
    alone = floats(family, [of_kind(kind, 2)], INPUTS)[0]
    assert (together[2] - alone).abs().max() <= FLOAT32_TOLERANCE
    assert len({picture.numpy().tobytes() for picture in together}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_all_kinds_share_one_load_and_leave_no_trace(family: str) -> None:
    plain = floats(family, [spec()])
    for kind in KINDS:
        floats(family, [of_kind(kind)], INPUTS)
        assert torch.equal(floats(family, [spec()]), plain)
    made = engine(family)
    loaded = made._pipelines.get("text-to-image").pipe
    for kind in KINDS:
        other = made._pipelines.get(kind).pipe  # type: ignore[arg-type]
        assert other is made._pipelines.get(kind).pipe  # type: ignore[arg-type]
        told = {name for name in loaded.config if name in other.config and name[0] != "_"}
        assert {n: other.config[n] for n in told} == {n: loaded.config[n] for n in told}
        for name, part in loaded.components.items():
            if isinstance(part, torch.nn.Module):
                assert other.components[name] is part
                assert {p.dtype for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_strength_zero_gives_the_input_back(family: str, kind: str) -> None:
    (picture,) = rendered(family, of_kind(kind, 3, strength=0.0))
    assert np.array_equal(picture, decoded(PICTURES[3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_mask_keeps_is_kept(family: str) -> None:
    (picture,) = rendered(family, of_kind("inpainting", 3, strength=1.0))
    first = 16 + 4 * 3
    given = decoded(PICTURES[3])
    assert np.array_equal(picture[:, :first], given[:, :first])
    assert np.abs(picture[:, first:].astype(int) - given[:, first:]).mean() > 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["text-to-image", *KINDS])
def test_sizes_are_exact_or_refused(family: str, kind: str) -> None:
    for width in (72, 80):
        try:
            (result,) = rendered(family, of_kind(kind, width=width))
        except InvalidParameter as error:
            result = error
        if isinstance(result, InvalidParameter):
            assert width == 72, result.message
        else:
            assert result.shape == (64, width, 3)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("strength", [0.01, 0.2, 1 / 3])
def test_less_than_a_whole_step_is_one(family: str, strength: float) -> None:
    watch = Steps()
    job = of_kind("image-to-image", strength=strength)
    (picture,) = engine(family).render([job], watch, INPUTS)
    assert isinstance(picture, np.ndarray)
    assert watch.seen == [(1, 1)]


def test_a_job_without_its_picture_is_refused_alone() -> None:
    lost = of_kind("image-to-image", 1, init_image=f"inputs/{'0' * 64}.png")
    results = rendered("sd15", of_kind("image-to-image", 0), lost)
    assert isinstance(results[0], np.ndarray)
    assert isinstance(results[1], InvalidParameter)
    assert "did not come with the job" in results[1].message


def test_a_size_that_klein_would_shrink_is_refused() -> None:
    job = of_kind("image-to-image", width=1040, height=1024)
    with pytest.raises(InvalidParameter, match="size 1040x1024: with an input picture"):
        engine("klein").render([job], Steps(), INPUTS)


def test_a_pipeline_without_the_kind_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(pipe: Any) -> Any:
        raise ValueError("AutoPipeline can't find a pipeline")

    made = DiffusersEngine(config(tiny("sd15")))
    made.load()
    monkeypatch.setattr("diffusers.AutoPipelineForInpainting.from_pipe", none)
    with pytest.raises(InvalidParameter, match="inpainting: StableDiffusionPipeline of diffusers"):
        made.render([of_kind("inpainting")], Steps(), INPUTS)


@pytest.fixture(scope="module")
def shapes() -> Iterator[DiffusersEngine]:
    """A trained model, so that strength and prompt mean something."""
    weights = Weights(path=SHAPES_DIR, dtype="float32")
    made = DiffusersEngine(EngineConfig("diffusers", "shapes", weights, threads=1))
    made.load()
    yield made
    made.close()


def test_more_strength_changes_more(shapes: DiffusersEngine) -> None:
    def shape(prompt: str, **params: Any) -> Any:
        return spec(prompt=prompt, steps=6, guidance_scale=2.0, seed=5, **params)

    (red,) = shapes.render([shape("a red circle on a blue background")], Steps())
    picture, mask = stored(red), stored(right_part(32))
    inputs = dict([picture, mask])

    def change(strength: float, prompt: str = "a green square on a yellow background") -> float:
        job = shape(prompt, init_image=picture[0], strength=strength)
        (after,) = shapes.render([job], Steps(), inputs)
        return float(np.abs(after.astype(int) - red).mean())

    changes = [change(strength) for strength in (0.0, 0.2, 0.5, 0.8, 1.0)]
    assert changes == sorted(changes)
    assert changes[0] == 0
    assert changes[-1] > 100
    assert change(0.5, "a red circle on a blue background") < 10

    job = shape(
        "a green square on a yellow background",
        init_image=picture[0],
        mask_image=mask[0],
        strength=1.0,
    )
    (half,) = shapes.render([job], Steps(), inputs)
    assert np.array_equal(half[:, :32], red[:, :32])
    assert np.abs(half[:, 32:].astype(int) - red[:, 32:]).mean() > 50


def decoded(picture: tuple[str, bytes]) -> Any:
    return np.asarray(Image.open(io.BytesIO(picture[1])))


# -------------------------------------------------------------------------- long prompts
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("kind", ["text-to-image", *KINDS])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_tail_of_a_long_prompt_changes_the_picture(family: str, kind: str, field: str) -> None:
    one, other = (
        floats(family, [of_kind(kind, **{field: LONG + tail})], INPUTS) for tail in ("cat", "dog")
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_our_encoding_is_the_pipelines_own(family: str) -> None:
    made = engine(family)
    prompts, negatives = ["a red cat", "(red:1.2) [dog] AND BREAK"], ["", "dog"]
    with torch.no_grad():
        theirs = made._pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=negatives,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
    ours = [made._texts.encode(texts, 1, None) for texts in (prompts, negatives)]
    assert torch.equal(theirs[0], ours[0][0])
    assert torch.equal(theirs[1], ours[1][0])
    if family == "sdxl":
        assert torch.equal(theirs[2], ours[0][1])
        assert torch.equal(theirs[3], ours[1][1])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_prompts_of_other_lengths_do_not_pad_each_other(family: str) -> None:
    short, long, longer = spec(0), spec(1, prompt=LONG), spec(2, negative_prompt=LONG * 2)
    watch = Steps()
    together = engine(family).render([longer, short, long, short], watch)
    for job, picture in zip([longer, short, long], together, strict=False):
        (alone,) = engine(family).render([job], Steps())
        assert np.abs(picture.astype(int) - alone).max() <= 1
    assert watch.seen == [(n, 9) for n in range(1, 10)]


def test_strict_mode_with_long_prompts_gives_equal_bytes(tmp_path: Path) -> None:
    child = Child(config(tiny("sd15"), micro_batch=3, strict=True), log=tmp_path / "log")
    child.start()
    jobs = [spec(0), spec(1, prompt=LONG), spec(2), spec(3, prompt=LONG * 2), spec(4)]

    def bytes_of(*chosen: Any) -> list[bytes]:
        events = [e for e in child.render(chosen) if isinstance(e, Rendered)]
        return [e.pixels.tobytes() for e in sorted(events, key=lambda e: e.id)]

    together = bytes_of(*jobs)
    assert [bytes_of(job)[0] for job in jobs] == together
    child.close()


def test_strict_mode_does_not_pad_qwen_images_prompts() -> None:
    made = DiffusersEngine(config(tiny("qwen_image"), strict=True))
    made.load()
    short, long = spec(2), spec(2, prompt=LONG, seed=9)
    assert np.array_equal(
        made.render([short, long], Steps())[0], made.render([short, short], Steps())[0]
    )


@pytest.mark.parametrize(
    ("family", "limit"),
    [("sd3", 512), ("flux", 512), ("klein", 512), ("qwen_image", 1024), ("z_image", 512)],
)
def test_what_a_long_encoder_cannot_read_is_refused_with_its_count(family: str, limit: int) -> None:
    made = engine(family)
    around = made._texts._count("x") - 1
    fits, beyond = "x" * (limit - around), "x" * (limit - around + 1)
    if family in ("sd3", "flux"):  # a mark for the word's beginning
        assert made._texts._count(fits) == limit
    results = rendered(family, spec(), spec(prompt=beyond), spec(prompt=fits))
    assert isinstance(results[0], np.ndarray)
    assert isinstance(results[1], InvalidPrompt)
    assert f"it has {limit + 1} tokens, and this model reads at most {limit}" in results[1].message
    assert isinstance(results[2], np.ndarray)
    (changed,) = rendered(family, spec(prompt=fits[:-1] + "y"))
    assert not np.array_equal(changed, results[2])


# ----------------------------------------------------------------------------- clip skip
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_clip_skip_changes_the_picture(family: str) -> None:
    plain, skipped = floats(family, [spec()]), floats(family, [spec(clip_skip=1)])
    assert not torch.equal(plain, skipped)
    assert torch.equal(floats(family, [spec()]), plain)


@pytest.mark.parametrize(
    ("family", "told"),
    [("flux", "clip_skip: FluxPipeline has none"), ("sd15", "at most 1 for this model, got 2")],
)
def test_clip_skip_that_cannot_be_is_refused(family: str, told: str) -> None:
    (result,) = rendered(family, spec(clip_skip=2))
    assert isinstance(result, InvalidParameter)
    assert told in result.message


@pytest.fixture(scope="module", autouse=True)
def _forget_engines() -> Iterator[None]:
    yield
    engine.cache_clear()
