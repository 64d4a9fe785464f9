"""Which pictures go into a dataset: what is measured of them, and how they are judged."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from farm import datasets
from farm.datasets import near
from farm.datasets.gates import Gates, GatesSection, Judge, Measures, Rejection
from farm.datasets.near import Near, NearHashes
from farm.datasets.scores import ScoreSection
from farm.errors import InvalidConfig, ModelNotLoaded
from tests.picture_kit import animated, bomb

SIDE = 128
OFF: dict[str, Any] = {"blank": False, "exact_duplicates": False}
PARAMS = {"prompt": "a red ball"}
FORMS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95},
    "WEBP": {"quality": 92},
}


def file(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **(FORMS[form] | how))
    return out.getvalue()


def scene(seed: int) -> Image.Image:
    """Soft coloured lights and some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    light = np.full((SIDE, SIDE, 3), 128.0)
    for _ in range(12):
        cx, cy, size = rng.random(3)
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.06 + 0.3 * size) ** 2)
        light += spot[..., None] * rng.normal(0, 120, 3)
    light += rng.normal(0, 3, light.shape)
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def flat(*colour: int, grain: int = 0) -> Image.Image:
    """One colour, each value up to `grain` above it."""
    rng = np.random.default_rng(0)
    pixels = np.array(colour) + rng.integers(0, grain + 1, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def with_square(ground: str, colour: str, side: int = 16) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), ground)
    image.paste(colour, (40, 40, 40 + side, 40 + side))
    return image


def judged(pictures: Sequence[bytes], **section: Any) -> list[Rejection | None]:
    """What a run with this section says of each, in this order."""
    told = GatesSection(**section)
    gates, judge = Gates(told), Judge(told)
    said = []
    for row, data in enumerate(pictures):
        measures = gates.measure(data, PARAMS)
        reason = judge.reason(measures)
        if reason is None:
            judge.accept(row, measures)
        said.append(reason)
    return said


def names(said: Sequence[Rejection | None]) -> list[str | None]:
    return [one and one.gate for one in said]


# -------------------------------------------------------------------------------- the section
@pytest.mark.parametrize(
    "section",
    [
        {"blanc": True},
        {"min_std": 0},
        {"min_std": float("nan")},
        {"near_duplicates": 13},
        {"near_duplicates": -1},
        {"attempts": 0},
        {"attempts": 33},
        {"safety": "ignore"},
        {"min_side": 513, "max_side": 512},
        {"scores": [{"name": "a", "plugin": "module"}]},
        {"scores": [{"name": "a", "plugin": "../x:y"}]},
        {"scores": [{"name": "a/b", "plugin": "m:a"}]},
        {"scores": [{"name": "a", "plugin": "m:a", "min": 2, "max": 1}]},
        {"scores": [{"name": "a", "plugin": "m:a", "max": float("inf")}]},
        {"scores": [{"name": "a", "plugin": "m:a"}, {"name": "a", "plugin": "m:b"}]},
    ],
)
def test_a_section_that_means_nothing_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatesSection(**section)


def test_without_a_section_blank_pictures_and_exact_duplicates_are_rejected() -> None:
    pictures = [file(scene(1)), file(flat(0, 0, 0)), file(scene(1)), file(scene(2))]
    assert names(judged(pictures)) == [None, "blank", "exact_duplicates", None]


def test_where_no_gate_looks_nothing_is_decoded() -> None:
    gates = Gates(GatesSection(**OFF))
    assert not gates.look
    assert gates.measure(b"no picture", PARAMS) == {}
    judge = Judge(GatesSection(**OFF))
    assert judge.reason(None) is None
    judge.accept(0, None)


@pytest.mark.parametrize(
    ("section", "measured"),
    [
        ({"blank": True}, {"std"}),
        ({"exact_duplicates": True}, {"pixels"}),
        ({"near_duplicates": 2}, {"phash"}),
        ({"min_side": 1}, {"size"}),
        ({"max_side": 999}, {"size"}),
        ({"scores": [{"name": "a", "plugin": "tests.score_kit:Sharpness"}]}, {"scores"}),
    ],
)
def test_only_what_is_asked_is_measured(section: dict[str, Any], measured: set[str]) -> None:
    gates = Gates(GatesSection(**(OFF | section)))
    assert gates.look
    assert set(gates.measure(file(scene(1)), PARAMS)) == measured


def test_measures_are_kept_as_json_and_judged_alike() -> None:
    told = GatesSection(near_duplicates=4, min_side=64)
    measures = Gates(told).measure(file(scene(1), "JPEG"), PARAMS)
    read = json.loads(json.dumps(measures))
    assert read == measures
    judge = Judge(told)
    assert judge.reason(read) is None
    judge.accept(3, read)
    assert judge.reason(measures) == Rejection("exact_duplicates", "the pixels of row 3")


def test_the_mark_tells_what_is_measured_and_not_what_the_limits_are() -> None:
    score = {"name": "a", "plugin": "tests.score_kit:Sharpness"}

    def mark(**section: Any) -> str:
        return Gates(GatesSection(**section)).mark

    assert mark() == mark(min_std=9, attempts=3, safety="fail")
    assert mark(near_duplicates=2) == mark(near_duplicates=9)
    assert mark(scores=[score]) == mark(scores=[score | {"min": 3}])
    different = [
        mark(),
        mark(blank=False),
        mark(near_duplicates=1),
        mark(min_side=8),
        mark(scores=[score]),
        mark(scores=[score | {"options": {"power": 2}}]),
    ]
    assert len(set(different)) == len(different)


# -------------------------------------------------------------------------------- blank, size
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (12, 200, 90)])
def test_one_colour_is_blank(form: str, colour: tuple[int, int, int]) -> None:
    assert names(judged([file(flat(*colour), form)])) == ["blank"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "image",
    [
        scene(3),
        flat(0, 0, 0, grain=255),
        with_square("white", "red"),
        with_square("#f00", "#008200"),
    ],
    ids=["scene", "noise", "small square", "squares of one grey"],
)
def test_what_shows_something_is_not_blank(form: str, image: Image.Image) -> None:
    assert judged([file(image, form)]) == [None]


def test_how_much_grain_is_blank_can_be_said() -> None:
    pictures = [file(flat(90, 90, 90, grain=grain)) for grain in (1, 4, 20)]
    assert names(judged(pictures)) == ["blank", "blank", None]
    assert judged(pictures[1:], min_std=1.2) == [None, None]
    assert names(judged(pictures, min_std=8)) == ["blank"] * 3
    assert judged(pictures, blank=False) == [None] * 3
    assert judged(pictures)[0] == Rejection("blank", "standard deviation 0.5, less than 2")


@pytest.mark.parametrize("grain", [0, 1, 7, 255])
@pytest.mark.parametrize("colour", [(0, 0, 0), (12, 200, 90), (0, 0, 255)])
def test_the_deviation_is_that_of_the_most_varied_colour(
    colour: tuple[int, int, int], grain: int
) -> None:
    image = flat(*colour, grain=grain)
    measured = Gates(GatesSection()).measure(file(image), PARAMS)["std"]
    assert measured == pytest.approx(np.asarray(image).std(axis=(0, 1)).max(), abs=1e-3)


def test_sides() -> None:
    pictures = [
        file(scene(n).resize(size)) for n, size in enumerate([(64, 48), (64, 64), (65, 64)])
    ]
    assert names(judged(pictures, min_side=64)) == ["min_side", None, None]
    assert judged(pictures, min_side=64)[0] == Rejection("min_side", "48 pixels, less than 64")
    assert names(judged(pictures, max_side=64)) == [None, None, "max_side"]


# -------------------------------------------------------------------------------- duplicates
def test_exact_duplicates_have_the_same_pixels_in_whatever_file() -> None:
    image, other = scene(1), PngInfo()
    other.add_text("parameters", "another seed")
    changed = image.copy()
    changed.putpixel((5, 5), (1, 2, 3))
    pictures = [
        file(image),
        file(image, pnginfo=other),
        file(image, "WEBP", lossless=True),
        file(changed),
        file(Image.frombytes("RGB", (SIDE // 2, SIDE * 2), image.tobytes())),
    ]
    assert len(set(pictures)) == 5
    said = judged(pictures)
    assert names(said) == [None, "exact_duplicates", "exact_duplicates", None, None]
    assert said[1] == Rejection("exact_duplicates", "the pixels of row 0")
    assert judged(pictures, exact_duplicates=False) == [None] * 5


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": lambda image: file(image, "JPEG", quality=60),
    "WebP": lambda image: file(image, "WEBP", quality=80),
    "brighter": lambda image: file(ImageEnhance.Brightness(image).enhance(1.05)),
    "paler": lambda image: file(ImageEnhance.Contrast(image).enhance(0.8)),
    "half": lambda image: file(image.resize((SIDE // 2, SIDE // 2))),
    "a corner": lambda image: file(ImageOps.expand(image.crop((1, 1, SIDE - 1, SIDE - 1)), 1)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_the_same_picture_changed_a_little_is_a_near_duplicate(how: str) -> None:
    for seed in range(4):
        said = judged([file(scene(seed)), CHANGES[how](scene(seed))], near_duplicates=6)
        assert said[0] is None
        assert said[1] is not None
        assert said[1].gate == "near_duplicates"
        assert said[1].why in {f"distance {n} from row 0" for n in range(7)}


def test_mirrored_turned_and_other_pictures_are_others() -> None:
    image = scene(1)
    pictures = [image, ImageOps.mirror(image), image.rotate(90), scene(2), scene(3)]
    assert judged([file(one) for one in pictures], near_duplicates=8) == [None] * 5


def test_near_duplicates_are_seen_in_grey() -> None:
    """As the section's description says."""
    pictures = [file(with_square("white", colour, 48)) for colour in ("#f00", "#008200")]
    assert names(judged(pictures, near_duplicates=2)) == [None, "near_duplicates"]
    assert judged(pictures) == [None, None]


def hashed(value: int, pixels: int = 0) -> Measures:
    return {"std": 9.0, "pixels": f"{pixels:032x}", "phash": f"{value:016x}"}


def test_of_two_that_are_alike_the_first_stays_so_the_order_decides() -> None:
    """B is near to A and to C, which are not near to each other."""
    a, b, c = (hashed(bits, pixels) for pixels, bits in enumerate((0b0000, 0b0011, 0b1111)))

    def accepted(*order: Measures) -> list[int]:
        judge, rows = Judge(GatesSection(near_duplicates=2)), []
        for row, measures in enumerate(order):
            if judge.reason(measures) is None:
                judge.accept(row, measures)
                rows.append(row)
        return rows

    assert accepted(a, b, c) == [0, 2]
    assert accepted(b, a, c) == [0]
    assert accepted(a, c, b) == [0, 1]


def test_the_first_of_the_near_ones_is_told_and_rows_may_come_in_any_order() -> None:
    judge = Judge(GatesSection(near_duplicates=4))
    for row, value in ((17, 0b111), (3, 0b1)):
        judge.accept(row, hashed(value, row))
    assert judge.reason(hashed(0, 99)) == Rejection("near_duplicates", "distance 3 from row 17")
    assert judge.reason(hashed(2**64 - 1, 98)) is None


def test_what_was_accepted_before_a_gate_was_asked_for_is_not_known_to_it() -> None:
    judge = Judge(GatesSection(near_duplicates=4))
    judge.accept(0, {"std": 9.0})
    assert judge.reason(hashed(0)) is None


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=7)), max_size=40),
    st.integers(0, 12),
    st.integers(1, 9),
)
def test_the_judge_says_what_a_naive_one_says(
    pictures: list[tuple[int, set[int]]], most: int, piece: int
) -> None:
    bases = (0, 2**64 - 1, 0xF0F0F0F0F0F0F0F0, 1)
    values = [bases[base] ^ sum(1 << bit for bit in flips) for base, flips in pictures]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "_PIECE", piece)
        judge = Judge(GatesSection(near_duplicates=most))
        accepted: list[tuple[int, int]] = []
        for row, value in enumerate(values):
            expected = None
            for kept, other in accepted:
                if value == other:
                    expected = Rejection("exact_duplicates", f"the pixels of row {kept}")
            for kept, other in accepted:
                distance = bin(value ^ other).count("1")
                if expected is None and most and distance <= most:
                    expected = Rejection("near_duplicates", f"distance {distance} from row {kept}")
            said = judge.reason(hashed(value, value))
            assert said == expected
            if said is None:
                judge.accept(row, hashed(value, value))
                accepted.append((row, value))


def test_more_hashes_than_a_piece_holds() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 150_000, np.uint64)
    hashes = NearHashes(3)
    for row, value in enumerate(values):
        hashes.add(row, int(value))
    for row in (0, 2**16 - 1, 2**16, 2**17, 149_999):
        assert hashes.find(int(values[row]) ^ 0b101) == Near(row, 2)
    assert hashes.find(int(values[7]) ^ 0b1111) is None


def test_what_near_duplicates_need_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "near")
    monkeypatch.delitem(sys.modules, "farm.datasets.near")
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(InvalidConfig, match=r"pip install 'renderfarm\[dataset\]'"):
        Judge(GatesSection(near_duplicates=4))


# -------------------------------------------------------------------------------- spoilt files
SPOILT = {
    "nothing": b"",
    "text": b"no picture",
    "bomb": bomb(40_000),
    "another kind": file(Image.new("RGB", (8, 8)), "PNG").replace(b"PNG", b"GNP"),
    "a million empty chunks": b"\x89PNG\r\n\x1a\n" + bytes(12) * 100_000,
    "scan upon scan": file(scene(1), "JPEG")[:-2] + b"\xff\xda" * 2_000,
    **{f"half a {form}": file(scene(1), form)[:-400] for form in FORMS},
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_cannot_be_decoded_is_rejected_and_says_why(how: str) -> None:
    (said,) = judged([SPOILT[how]], near_duplicates=4, min_side=8)
    assert said is not None
    assert said.gate == "broken"
    assert 5 < len(said.why) < 400
    assert "\n" not in said.why


def test_of_an_animated_file_the_first_frame_is_the_picture() -> None:
    assert judged([animated("PNG"), animated("WEBP")]) == [None, None]


PLAIN = {form: file(scene(1).resize((24, 24)), form) for form in FORMS}


@settings(deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_no_bytes_make_it_raise(form: str, at: int, noise: bytes) -> None:
    data = bytearray(PLAIN[form])
    at %= len(data)
    data[at : at + len(noise)] = noise
    told = GatesSection(near_duplicates=4, min_side=8)
    measures = Gates(told).measure(bytes(data), PARAMS)
    Judge(told).reason(measures)
    assert set(measures) in ({"broken"}, {"size", "std", "pixels", "phash"})


# -------------------------------------------------------------------------------- plug-ins
def scored(plugin: str = "tests.score_kit:Sharpness", **more: Any) -> dict[str, Any]:
    return {"scores": [{"name": "sharp", "plugin": plugin, **more}]}


def test_a_score_is_kept_and_held_against_its_limits() -> None:
    gates = Gates(GatesSection(**scored()))
    soft, sharp = file(scene(1)), file(flat(0, 0, 0, grain=255))
    low, high = (gates.measure(data, PARAMS)["scores"]["sharp"] for data in (soft, sharp))
    assert low < 20 < high
    assert judged([soft, sharp], **scored()) == [None, None]
    said = judged([soft, sharp], **scored(min=20))
    assert said == [Rejection("scores.sharp", f"{low:g}, less than 20"), None]
    assert names(judged([soft, sharp], **scored(max=20))) == [None, "scores.sharp"]
    squared = Gates(GatesSection(**scored(options={"power": 2}))).measure(soft, PARAMS)
    assert squared["scores"]["sharp"] == pytest.approx(low**2)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe's folder; what is imported from it is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_may_lie_beside_the_recipe_and_hides_nothing(beside: Path) -> None:
    (beside / "our_gate.py").write_text(
        "class Words:\n    def score(self, image, prompt):\n        return len(prompt.split())\n"
    )
    (beside / "imagehash.py").write_text("raise RuntimeError('hidden')\n")
    sys.modules.pop("imagehash")
    told = GatesSection(near_duplicates=4, **scored("our_gate:Words"))
    measures = Gates(told, beside).measure(file(scene(1)), {"prompt": "a red ball"})
    assert measures["scores"] == {"sharp": 3}


FAULTS = {
    "no_such_module:A": "ModuleNotFoundError: No module named 'no_such_module'",
    "bad_syntax:A": "SyntaxError",
    "plugins:Missing": "has no attribute 'Missing'",
    "plugins:NoOptions": "NoOptions() takes no arguments",
    "plugins:NoScore": "without a method score",
    "plugins:number": "not callable",
}
PLUGINS = """
from farm.errors import ModelNotLoaded
number = 3
class NoScore:
    def __init__(self, **options): pass
class NoOptions:
    def score(self, image, prompt): return 1.0
class Away:
    def __init__(self, **options): raise ModelNotLoaded("its weights are missing")
class Gives:
    def __init__(self, what): self.what = what
    def score(self, image, prompt): return float(self.what)
class Nothing(Gives):
    def score(self, image, prompt): return None
"""


@pytest.mark.parametrize("plugin", FAULTS)
def test_a_plugin_that_cannot_be_loaded(beside: Path, plugin: str) -> None:
    (beside / "plugins.py").write_text(PLUGINS)
    (beside / "bad_syntax.py").write_text("class A(\n")
    with pytest.raises(InvalidConfig) as caught:
        Gates(GatesSection(**scored(plugin, options={"x": 1})), beside)
    assert f"gates.scores: sharp ({plugin})" in caught.value.message
    assert FAULTS[plugin] in caught.value.message


def test_what_a_plugin_says_of_its_own_goes_through(beside: Path) -> None:
    (beside / "plugins.py").write_text(PLUGINS)
    with pytest.raises(ModelNotLoaded, match="its weights are missing"):
        Gates(GatesSection(**scored("plugins:Away")), beside)


@pytest.mark.parametrize(
    ("plugin", "what", "said"),
    [
        ("Gives", "nan", "gave nan, where a finite number must be"),
        ("Gives", "-inf", "gave -inf"),
        ("Gives", "x", "failed: ValueError: could not convert"),
        ("Nothing", "", "failed: TypeError: float() argument"),
    ],
)
def test_a_plugin_that_gives_no_number(beside: Path, plugin: str, what: str, said: str) -> None:
    (beside / "plugins.py").write_text(PLUGINS)
    gates = Gates(GatesSection(**scored(f"plugins:{plugin}", options={"what": what})), beside)
    with pytest.raises(InvalidConfig) as caught:
        gates.measure(file(scene(1)), PARAMS)
    assert f"sharp (plugins:{plugin}) {said}" in caught.value.message


def test_threads_measure_as_one_does_and_ask_a_plugin_one_by_one() -> None:
    section = GatesSection(near_duplicates=4, **scored("tests.score_kit:Alone"), min_side=8)
    pictures = [file(scene(n)) for n in range(16)]
    gates = Gates(section)
    alone = [gates.measure(data, PARAMS) for data in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: gates.measure(data, PARAMS), pictures * 3))
    assert together == alone * 3
    assert all(one["scores"]["sharp"] == 1 for one in together)


def test_a_score_is_named_in_what_it_says() -> None:
    assert str(ScoreSection(name="clip", plugin="a.b:C")) == "gates.scores: clip (a.b:C)"
