"""The demo model's ruler is straight: what is drawn is read, and what is wrong is called wrong."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from workers.demo import judge, shapes
from workers.demo.judge import UNREAD, Reading, read
from workers.demo.shapes import RES, SHAPES, Bytes, Floats, Scene, held_out

ROOT = Path(__file__).parents[2]
RED, BLUE, YELLOW = (shapes.nominal_rgb(name) for name in ("red", "blue", "yellow"))


def painted(mask: Floats, colour: Floats = RED, background: Floats = BLUE) -> Bytes:
    """A mask (RES, RES) as a picture."""
    mixed = mask[..., None] * colour + (1 - mask[..., None]) * background
    return np.round(mixed * 255).astype(np.uint8)


def grid() -> tuple[Floats, Floats]:
    line = (np.arange(RES) + 0.5) / RES * 2 - 1
    x, y = np.meshgrid(line, line)
    return x, y


# ------------------------------------------------------------ the held-out set
def test_held_out_set_has_the_stated_size() -> None:
    kept = [t for t in shapes.triples() if held_out(*t)]
    assert (len(shapes.triples()), len(kept)) == (1056, 111)


def test_every_word_is_both_kept_out_and_trained() -> None:
    for part, words in enumerate((shapes.COLOURS, SHAPES, shapes.COLOURS)):
        for kept in (True, False):
            found = {t[part] for t in shapes.triples() if held_out(*t) is kept}
            assert found == set(words)


def test_training_never_meets_a_held_out_triple() -> None:
    rng = random.Random(1)
    scenes = [shapes.training_scene(rng)[0] for _ in range(60_000)]
    met = {(s.colour, s.shape, s.background) for s in scenes}
    assert met == {t for t in shapes.triples() if not held_out(*t)}


def test_a_training_set_is_fixed_by_its_seed_and_its_captions_tell_the_truth() -> None:
    pictures, captions = shapes.training_set(40, seed=3)
    again, same = shapes.training_set(40, seed=3)
    assert np.array_equal(pictures, again)
    assert captions == same
    assert set(" ".join(captions).replace(",", "").split()) <= set(shapes.WORDS)
    for picture, caption in zip(pictures, captions, strict=True):
        seen = read(picture)
        assert seen.shape in caption
        assert all(word in caption for word in (seen.colour, seen.background, seen.size))
        assert seen.place in caption


def test_prompt_with_size_and_place() -> None:
    scene = Scene("red", "circle", "blue", "small", "left")
    assert scene.prompt() == "a small red circle on a blue background on the left"
    assert Scene("red", "circle", "blue").prompt() == "a red circle on a blue background"


# ------------------------------------------------------------------- the judge
def test_drawn_pictures_are_read_right() -> None:
    rng = random.Random(5)
    scenes = [shapes.training_scene(rng)[0] for _ in range(600)]
    result = judge.score(scenes, [read(shapes.draw_scene(s, rng)) for s in scenes])
    wanted = 0.99 * result.count
    assert min(result.all_three, result.size, result.place) >= wanted


def test_every_held_out_triple_is_read_right_when_drawn() -> None:
    rng = random.Random(6)
    for triple in filter(lambda t: held_out(*t), shapes.triples()):
        scene = Scene(*triple)
        assert read(shapes.draw_scene(scene, rng)).shows(scene), scene


def test_slightly_blurred_pictures_are_still_read() -> None:
    rng = random.Random(7)
    for shape in SHAPES:
        scene = Scene("white", shape, "purple")
        picture = Image.fromarray(shapes.draw_scene(scene, rng))
        assert read(np.asarray(picture.filter(ImageFilter.GaussianBlur(1)))).shows(scene)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_word_is_reported_wrong(shape: str) -> None:
    drawn = Scene("red", shape, "blue", "small", "left")
    seen = read(shapes.draw_scene(drawn, random.Random(8)))
    assert seen.shows(drawn)
    for other in SHAPES:
        assert seen.shows(Scene("red", other, "blue")) is (other == shape)
    assert not seen.shows(Scene("orange", shape, "blue"))
    assert not seen.shows(Scene("red", shape, "purple"))
    assert not seen.shows(Scene("blue", shape, "red"))
    claims = [Scene("red", shape, "blue", "large", "left"), Scene("red", shape, "blue", "small")]
    results = [judge.score([claim], [seen]) for claim in claims]
    assert [(r.size, r.place) for r in results] == [(0, 1), (1, 0)]


def test_score_counts_each_part() -> None:
    scene = Scene("red", "ring", "blue")
    good = Reading("red", "ring", "blue", "", "", fit=1.0)
    bad = Reading("red", "star", "black", "small", "", fit=0.5)
    result = judge.score([scene, scene], [good, bad])
    counts = (result.colour, result.shape, result.background, result.all_three, result.size)
    assert counts == (2, 1, 1, 1, 1)
    assert "2 pictures: all three 50.00%" in str(result)


def test_an_empty_picture_shows_no_shape() -> None:
    seen = read(painted(np.zeros((RES, RES))))
    assert (seen.background, seen.colour, seen.shape) == ("blue", UNREAD, UNREAD)


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (RES, RES, 3), np.uint8)
    seen = read(noise)
    assert (seen.background, seen.colour, seen.shape) == (UNREAD, UNREAD, UNREAD)


def test_two_shapes_are_no_shape() -> None:
    both = shapes.coverage("circle", 0.25, (-0.4, 0)) + shapes.coverage("circle", 0.25, (0.4, 0))
    assert read(painted(both)).shape == UNREAD


def test_stretched_and_half_shapes_are_not_taken_for_whole_ones() -> None:
    x, y = grid()
    bar = (np.abs(x) < 0.6) & (np.abs(y) < 0.3)
    half = (np.hypot(x, y) < 0.5) & (y < 0)
    assert [read(painted(m.astype(np.float32))).shape for m in (bar, half)] == [UNREAD] * 2


def test_blobs_are_no_shape() -> None:
    x, y = grid()
    rng = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for _ in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 7), np.uint8))
        waves = np.asarray(coarse.resize((RES, RES), Image.Resampling.BICUBIC))
        blob = (waves > 128) & (np.hypot(x, y) < 0.7)
        found[read(painted(blob.astype(np.float32))).shape] += 1
    assert found[UNREAD] >= 38, found


def test_two_colours_have_no_one_name() -> None:
    x, _ = grid()
    mask = shapes.coverage("circle", 0.45)
    picture = painted(mask)
    picture[(mask > 0.5) & (x > 0)] = np.round(YELLOW * 255)
    assert read(picture).colour == UNREAD
    split = painted(mask)
    split[(mask < 0.5) & (x > 0)] = np.round(YELLOW * 255)
    assert read(split).background == UNREAD


def test_shapes_and_judge_need_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); "
        "import workers.demo.shapes, workers.demo.judge"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
