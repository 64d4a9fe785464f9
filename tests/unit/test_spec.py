from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from farm.errors import FarmError, _tree, by_code
from farm.samplers import canonical_scheduler
from farm.spec import EXPECTED, FIELDS, MAX_SEED, PER_JOB, Fingerprints, JobSpec, row_errors
from farm.states import FINAL_STATES, TRANSITIONS, JobState, may_become
from tests.store_kit import spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "  \n"),
        ("prompt", "a\0b"),
        ("prompt", "a\x1bb"),
        ("prompt", "\ud800"),
        ("prompt", "x" * 1_000_000),
        ("prompt", 5),
        ("prompt", None),
        ("negative_prompt", "a\0"),
        ("width", 63),
        ("width", 0),
        ("width", 65536),
        ("width", "64"),
        ("width", 64.0),
        ("width", True),
        ("height", -8),
        ("steps", 0),
        ("steps", 501),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.5),
        ("scheduler", "magic"),
        ("format", "bmp"),
        ("model", "../shapes"),
        ("engine", "torch"),
        ("init_image", "/etc/passwd"),
        ("mask_image", f"inputs/{'a' * 64}.png"),
        ("strength", 0.5),
        ("loras", {"../x": 1.0}),
        ("loras", {"a": 5.0}),
        ("loras", {"a": float("nan")}),
        ("loras", {"a": 10**400}),
        ("loras", 3),
        ("loras", "a:1, a:2"),
        ("loras", {f"l{n}": 1.0 for n in range(9)}),
        ("clip_skip", 0),
        ("unknown", 1),
    ],
)
def test_bad_fields_are_named_with_what_was_expected(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**{"prompt": "a", field: value})  # type: ignore[arg-type]
    (error,) = row_errors(3, caught.value)
    assert (error.line, error.field) == (3, field)
    assert error.expected == EXPECTED.get(field, error.expected)
    assert len(str(error)) < 400


def test_text_of_many_languages_is_kept_as_it_is() -> None:
    for text in ("Ñandú", "赤い円", "빨간 원", "دائرة حمراء", "🟥 on 🟦", "a\nb\tc"):
        assert spec(text).prompt == text


def test_expected_speaks_of_every_field() -> None:
    assert set(EXPECTED) == set(FIELDS)


def test_schedulers_by_alias_and_class() -> None:
    assert canonical_scheduler("euler_a") == "euler_a"
    assert canonical_scheduler("EulerAncestralDiscreteScheduler") == "euler_a"
    assert canonical_scheduler("DPMSolverMultistepScheduler") == "dpm++_2m"
    a, b = spec(scheduler="EulerDiscreteScheduler"), spec(scheduler="euler")
    assert a == b
    assert a.key == b.key


@given(st.data())
def test_the_key_is_equal_exactly_when_a_micro_batch_may_be_shared(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f for f in FIELDS if f != "model"]))
    init = {"init_image": f"inputs/{'a' * 64}.png", "strength": 0.5}
    other = {
        "engine": "fake", "init_image": f"inputs/{'b' * 64}.webp", "strength": 0.6,
        "mask_image": f"inputs/{'c' * 64}.png", "loras": {"one": 0.5}, "clip_skip": 1,
        "prompt": "b", "negative_prompt": "c", "width": 72, "height": 72, "steps": 5,
        "guidance_scale": 4.5, "seed": 2, "scheduler": "ddim", "format": "jpeg",
    }[field]  # fmt: skip
    mask = {"mask_image": f"inputs/{'d' * 64}.png"} if field == "mask_image" else {}
    one, two = (spec(**{"prompt": "a", **init, **mask, **more}) for more in ({}, {field: other}))
    assert (one.key == two.key) == (field in PER_JOB)
    hashes = {"one": "1" * 64}
    same = one.fingerprint("fake", "w", hashes) == two.fingerprint("fake", "w", hashes)
    assert same == (field == "engine")


def test_the_kind_is_part_of_the_key() -> None:
    picture = f"inputs/{'a' * 64}.png"
    kinds = [
        spec(),
        spec(init_image=picture, strength=0.8),
        spec(init_image=picture, mask_image=picture, strength=0.8),
    ]
    assert [s.kind for s in kinds] == ["text-to-image", "image-to-image", "inpainting"]
    assert len({s.key for s in kinds}) == 3


@pytest.mark.parametrize(
    "given", [{"b": 1, "a": 0.5}, "b, a:0.5", [["b", 1.0], ["a", 0.5]], (("a", 0.5), ("b", 1.0))]
)
def test_loras_in_any_form_are_the_same_job(given: object) -> None:
    one = spec(loras=given)
    assert one.loras == (("a", 0.5), ("b", 1.0))
    assert JobSpec.from_record(json.loads(one.canonical())) == one
    assert hash(one) == hash(spec(loras="a:0.5,b:1"))


def test_fingerprint_follows_engine_and_weights_and_is_stable() -> None:
    one = spec("a red circle")
    assert one.fingerprint("diffusers", "w") != one.fingerprint("sdcpp", "w")
    assert one.fingerprint("diffusers", "w") != one.fingerprint("diffusers", "v")
    assert JobSpec.model_validate_json(one.canonical()) == one
    assert one.canonical().startswith('{"clip_skip":null,"engine":null,"format":"png","guidance')


def test_transitions() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert not TRANSITIONS[JobState.SUCCEEDED]
    assert may_become(JobState.QUEUED, JobState.RUNNING)
    assert not may_become(JobState.QUEUED, JobState.SUCCEEDED)
    for state in FINAL_STATES:
        assert TRANSITIONS[state] <= {JobState.QUEUED}


def test_every_error_has_a_code_of_its_own_and_is_in_the_drawn_tree() -> None:
    import farm.errors

    classes = _tree(FarmError)
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes)
    for cls in classes:
        assert cls.__name__ in (farm.errors.__doc__ or "")
        assert cls.__doc__
        rebuilt = by_code(cls.code, "sentence")
        assert type(rebuilt) is cls
        assert rebuilt.message == "sentence"
    assert cls().message


@given(
    texts=st.lists(st.tuples(st.text(), st.text(), st.integers(0, MAX_SEED)), min_size=1),
    loras=st.sampled_from(["", "one:0.5", "one, two:2"]),
    kind=st.sampled_from([{}, {"init_image": f"inputs/{'b' * 64}.webp", "strength": 0.25}]),
)
def test_fingerprints_of_many_are_those_of_each(
    texts: list[tuple[str, str, int]], loras: str, kind: dict[str, object]
) -> None:
    hashes = {"one": "1" * 64, "two": "2" * 64}
    many = Fingerprints("fake", "w" * 64, hashes)
    base = spec(loras=loras, **kind)
    for prompt, negative, seed in [*texts, ('"seed":0', '"negative_prompt":"","prompt":""', 0)]:
        own = {"prompt": prompt, "negative_prompt": negative, "seed": seed}
        one = base.model_copy(update=own)
        if "\ud800" <= max(prompt + negative + " ") <= "\udfff":
            continue
        assert many.of(one) == one.fingerprint("fake", "w" * 64, hashes)
