"""The shipped demo model draws what the prompt says, also what it was never shown in training."""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from farm.demo import SHAPES_DIR
from workers.demo import judge, shapes
from workers.demo.judge import Reading, Score
from workers.demo.shapes import Bytes, Scene, held_out

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PLAIN, WORDED = 384, 140
"""Plain prompts, and prompts that also name a size, a place or both."""
LEAST = 0.98
"""Least part that must be right of the plain prompts, and of the size and place words."""
LEAST_SMALL = 0.75
"""The same for colour, shape and background of small shapes: their tips and corners are soft."""


class Exam:
    """All scenes asked for, the pictures that the model drew, and what the judge saw in them."""

    def __init__(self) -> None:
        self.scenes = judge.exam(PLAIN) + judge.exam(WORDED, seed=8, words=True)
        self.pictures: list[Bytes] = judge.render(
            SHAPES_DIR, [scene.prompt() for scene in self.scenes]
        )
        self.readings = [judge.read(picture) for picture in self.pictures]

    def score(self, rows: Sequence[int]) -> Score:
        return judge.score([self.scenes[i] for i in rows], [self.readings[i] for i in rows])

    def wrong(self, rows: Sequence[int]) -> list[tuple[str, Reading]]:
        """Prompts and readings of the pictures that are wrong in any respect asked for."""
        pairs = [(self.scenes[i], self.readings[i]) for i in rows]
        return [
            (s.prompt(), r)
            for s, r in pairs
            if not (r.shows(s) and (r.size, r.place) == (s.size, s.place))
        ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model gains nothing by threads, and loses much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exam() -> Exam:
    return Exam()


def is_held_out(scene: Scene) -> bool:
    return held_out(scene.colour, scene.shape, scene.background)


def test_pictures_show_what_the_prompts_say(exam: Exam, capsys: pytest.CaptureFixture[str]) -> None:
    rows = range(PLAIN)
    kept = [i for i in rows if is_held_out(exam.scenes[i])]
    everything, unseen = exam.score(rows), exam.score(kept)
    with capsys.disabled():
        print(f"\ndemo model, {judge.STEPS} steps, guidance {judge.GUIDANCE}")
        print(f"  plain prompts: {everything}")
        print(f"  of them kept out of training: {unseen}")
    assert everything.count >= 320
    assert unseen.count >= 100
    assert everything.all_three >= LEAST * everything.count, exam.wrong(rows)
    assert unseen.all_three >= LEAST * unseen.count, exam.wrong(kept)


def test_size_and_place_words_hold(exam: Exam, capsys: pytest.CaptureFixture[str]) -> None:
    rows = range(PLAIN, PLAIN + WORDED)
    result = exam.score(rows)
    kept = sum(is_held_out(exam.scenes[i]) for i in rows)
    with capsys.disabled():
        print(f"\n  prompts with size and place words ({kept} kept out of training): {result}")
    for words in (shapes.SIZES, shapes.PLACES):
        part = "size" if words is shapes.SIZES else "place"
        for word in words:
            asked = [i for i in rows if getattr(exam.scenes[i], part) == word]
            assert len(asked) >= 10
            right = sum(getattr(exam.readings[i], part) == word for i in asked)
            assert right >= math.floor(0.95 * len(asked)), (word, exam.wrong(asked))
    assert min(result.size, result.place) >= LEAST * result.count, exam.wrong(rows)
    small = [i for i in rows if exam.scenes[i].size == "small"]
    others = [i for i in rows if i not in small]
    for part, least in ((small, LEAST_SMALL), (others, LEAST)):
        assert exam.score(part).all_three >= least * len(part), exam.wrong(part)


def test_the_seed_fixes_the_picture_and_other_seeds_give_others() -> None:
    prompts = ["a red circle on a blue background"] * 2
    first = judge.render(SHAPES_DIR, prompts, seed=5, batch=2)
    again = judge.render(SHAPES_DIR, prompts, seed=5, batch=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_aliases_give_the_very_picture_of_the_word_they_stand_for() -> None:
    prompts = [
        ("an orange heart on a grey background", "a orange heart on a gray background"),
        ("a big grey star on a red background", "a large gray star on a red background"),
        ("a little cyan ring on a pink background", "a small cyan ring on a pink background"),
    ]
    used = {word for alias, _ in prompts for word in alias.split()}
    assert used >= set(shapes.ALIASES)
    pictures = [judge.render(SHAPES_DIR, side) for side in zip(*prompts, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))


def test_image_to_image_and_inpainting_follow_the_prompt() -> None:
    import torch
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    scenes = judge.exam(16)
    grounds = [np.ones((64, 64, 3)) * shapes.nominal_rgb(s.background) for s in scenes]
    empty = [Image.fromarray(np.round(ground * 255).astype(np.uint8)) for ground in grounds]
    dull = [Scene("white" if s.background != "white" else "black", s.shape, s.background)
            for s in scenes]  # fmt: skip
    drawn = [Image.fromarray(shapes.draw_scene(s, random.Random(2))) for s in dull]
    middle = np.zeros((64, 64), np.uint8)
    middle[8:56, 8:56] = 255
    mask = [Image.fromarray(middle)] * len(scenes)
    for kind, inputs in (
        (StableDiffusionImg2ImgPipeline, {"image": drawn, "strength": 0.8}),
        (StableDiffusionInpaintPipeline,
         {"image": empty, "mask_image": mask, "strength": 1.0, "height": 64, "width": 64}),
    ):  # fmt: skip
        pipeline = kind.from_pretrained(SHAPES_DIR, local_files_only=True, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        out = pipeline(
            prompt=[s.prompt() for s in scenes],
            num_inference_steps=12,
            guidance_scale=judge.GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(i) for i in range(len(scenes))],
            output_type="np",
            **inputs,
        )
        pictures = np.round(out.images * 255).astype(np.uint8)
        result = judge.score(scenes, [judge.read(picture) for picture in pictures])
        assert result.all_three >= 15, (kind.__name__, result)


def test_the_autoencoder_gives_pictures_back() -> None:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(SHAPES_DIR / "vae", dtype=torch.float32)
    pictures, _ = shapes.training_set(32, seed=99)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    noise = ((y - x) ** 2).mean().item()
    assert 10 * math.log10(4 / noise) >= 34  # decibels, peak to noise


def test_the_directory_is_small_whole_and_names_no_machine() -> None:
    files = [p for p in SHAPES_DIR.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    index = json.loads((SHAPES_DIR / "model_index.json").read_text())
    parts = {key for key, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert {p.suffix for p in files} == {".json", ".safetensors", ".md"}
    for file in files:
        if file.suffix == ".json":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r'"(/|[A-Za-z]:\\\\)[\w.]+[/\\]', text), file


def test_weights_are_finite_halves() -> None:
    import torch
    from safetensors.torch import load_file

    for file in SHAPES_DIR.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.dtype in (torch.float16, torch.int64), (file, name)
            assert bool(torch.isfinite(tensor).all()), (file, name)


def test_the_card_states_the_recommended_settings() -> None:
    card = Path(SHAPES_DIR / "README.md").read_text(encoding="utf-8")
    assert f"steps: {judge.STEPS}\n" in card
    assert f"guidance: {judge.GUIDANCE}\n" in card
