"""JobSpec: what one picture is. Validated, frozen, unknown keys refused.

Three texts are derived from it, each over canonical JSON (sorted keys, no spaces, UTF-8): the
whole job, its compatibility key (what must be equal for jobs to share one micro-batch), and
its fingerprint (the job, the engine and the hash of the weights: the same picture).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring as quoted
from operator import itemgetter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from farm.errors import InvalidParameter, InvalidPrompt, RowError
from farm.samplers import SAMPLERS, canonical_scheduler

MAX_PROMPT_CHARS = 8_000
MAX_SEED = 2**63 - 1
MAX_LORAS = 8
DEFAULT_STRENGTH = 0.8  # as the image-to-image pipelines of diffusers have it
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
INPUT_PATTERN = r"^inputs/[0-9a-f]{64}\.(png|jpg|webp)$"
INPUT_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_INPUT_PIXELS = 64_000_000


def refuse_controls(text: str) -> str:
    """Raises ValueError for characters that no model reads and that SQL or terminals choke on."""
    if text.isprintable():  # the usual case, fast
        return text
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t":
            raise ValueError(f"control character U+{ord(char):04X}")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("empty")
    return text


def _lora_weights(given: Any) -> Any:
    """A mapping of names to weights, or its text form "NAME:WEIGHT, NAME", as sorted pairs."""
    if isinstance(given, str):
        pairs = [part.strip().partition(":") for part in given.split(",") if part.strip()]
        given = [(name.strip(), weight.strip() or "1") for name, _, weight in pairs]
    elif isinstance(given, Mapping):
        given = list(given.items())
    try:
        found = tuple(sorted((str(name), float(weight)) for name, weight in given))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("no names with weights") from None
    if len(dict(found)) != len(found):
        raise ValueError("a name stands twice")
    return found


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(refuse_controls)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Input = Annotated[str, Field(pattern=INPUT_PATTERN)]
LoraWeight = tuple[Name, Annotated[float, Field(ge=-4, le=4, allow_inf_nan=False)]]
Loras = Annotated[
    tuple[LoraWeight, ...], Field(max_length=MAX_LORAS), BeforeValidator(_lora_weights)
]
Kind = Literal["text-to-image", "image-to-image", "inpainting"]


class JobSpec(BaseModel):
    """One picture to render. Sizes in pixels.

    `init_image`, `mask_image`: keys of input pictures in the blob store, by their SHA-256; white
    in the mask is painted anew. `strength`: how far from the init image, 0 (it comes back) to 1.
    `loras`: names in the catalogue with weights. `clip_skip`: layers of a CLIP text encoder left
    out, counted from the last. `engine`: the only one that may render it; None: any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Name
    engine: Literal["diffusers", "sdcpp", "fake"] | None = None
    prompt: Annotated[Text, AfterValidator(_not_blank)]
    negative_prompt: Text = ""
    width: Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
    height: Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
    steps: Annotated[int, Field(ge=1, le=500)]
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    scheduler: Annotated[str, AfterValidator(canonical_scheduler)] | None = None
    format: Literal["png", "webp", "jpeg"] = "png"
    init_image: Input | None = None
    mask_image: Input | None = None
    strength: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    loras: Loras = ()
    clip_skip: Annotated[int, Field(ge=1, le=11)] | None = None

    @model_validator(mode="after")
    def _pictures_go_together(self) -> JobSpec:
        if self.mask_image and not self.init_image:
            raise ValueError("mask_image goes with init_image only")
        if (self.strength is None) != (self.init_image is None):
            raise ValueError("strength and init_image go together")
        return self

    @classmethod
    def from_record(cls, fields: Mapping[str, Any]) -> JobSpec:
        """A spec that was validated when it was recorded; JSON has made lists of its tuples.

        A record that somebody has changed is read as far as it can be; see `record_fault`.
        """
        return cls.model_construct(**{**fields, "loras": _pairs(fields.get("loras", ())) or ()})

    def like_this(self, prompt: str, negative_prompt: str, seed: int) -> JobSpec:
        """A job that differs in these only, which were validated; `model_copy` takes longer."""
        made = JobSpec.__new__(JobSpec)
        own = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        object.__setattr__(made, "__dict__", {**self.__dict__, **own})
        object.__setattr__(made, "__pydantic_fields_set__", self.__pydantic_fields_set__)
        object.__setattr__(made, "__pydantic_extra__", None)
        object.__setattr__(made, "__pydantic_private__", None)
        return made

    @property
    def kind(self) -> Kind:
        return kind_of(self.init_image, self.mask_image)

    def canonical(self) -> str:
        """The job as canonical JSON."""
        return _canonical(self.model_dump())

    @property
    def key(self) -> str:
        """Compatibility key, 16 hex digits: equal for jobs that may share a micro-batch."""
        return compatibility_key(self.model_dump())

    def fingerprint(
        self, engine: str, weights_sha256: str, loras: Mapping[str, str] | None = None
    ) -> str:
        """SHA-256 (64 hex digits) of the job, the engine and the weights: one per picture.

        `loras`: the SHA-256 of each LoRA that the job names. Which engine it asked for is no
        part of it, which one rendered it is.
        """
        whole = self._identity(engine, weights_sha256, loras or {})
        return hashlib.sha256(_canonical(whole).encode()).hexdigest()

    def _identity(self, engine: str, weights: str, loras: Mapping[str, str]) -> dict[str, Any]:
        hashes = [loras[name] for name, _ in self.loras]
        return {**self.model_dump(), "engine": engine, "weights": [weights, *hashes]}


def _pairs(given: Any) -> tuple[tuple[Any, Any], ...] | None:
    """Lists of two as tuples; None for what is no such list."""
    try:
        return tuple((name, weight) for name, weight in given)
    except (TypeError, ValueError):
        return None


def record_fault(fields: Mapping[str, Any]) -> InvalidParameter | None:
    """What is wrong with a recorded job, which a person or a program has changed; None: nothing."""
    try:
        JobSpec.model_validate({**fields, "loras": _pairs(fields.get("loras", ()))})
    except ValidationError as error:
        told = describe(row_errors(0, error))
        return InvalidParameter(f"its record in the database is not what was submitted: {told}")
    return None


class Fingerprints:
    """`JobSpec.fingerprint` for many jobs of few shapes: only texts and seeds are written anew."""

    def __init__(self, engine: str, weights_sha256: str, loras: Mapping[str, str]) -> None:
        self._engine, self._weights, self._loras = engine, weights_sha256, loras
        self._around: dict[Any, tuple[str, str, str]] = {}

    def of(self, spec: JobSpec) -> str:
        """Raises KeyError for a LoRA whose hash is not known."""
        values = spec.__dict__
        shape = _shape(values)
        around = self._around.get(shape)
        if around is None:
            if len(self._around) > 1_000:
                self._around.clear()
            around = self._around[shape] = self._pieces(spec)
        head, middle, tail = around
        negative, prompt = quoted(values["negative_prompt"]), quoted(values["prompt"])
        text = f'{head}{negative},"prompt":{prompt}{middle}{values["seed"]}{tail}'
        return hashlib.sha256(text.encode()).hexdigest()

    def _pieces(self, spec: JobSpec) -> tuple[str, str, str]:
        """The canonical text before the negative prompt, between prompt and seed, and after."""
        whole = spec.model_copy(update={"prompt": "", "negative_prompt": "", "seed": 0})
        text = _canonical(whole._identity(self._engine, self._weights, self._loras))
        head, rest = text.split('"negative_prompt":"","prompt":""')
        middle, tail = rest.split('"seed":0')
        return f'{head}"negative_prompt":', f'{middle}"seed":', tail


class Shape:
    """What jobs have in common that differ in their texts and seeds only."""

    __slots__ = ("key", "spec")

    def __init__(self, spec: JobSpec) -> None:
        self.spec, self.key = spec, spec.key


class NewJob(NamedTuple):
    """A job on its way in: a million of them share few shapes, which are checked once."""

    shape: Shape
    prompt: str
    negative_prompt: str
    seed: int

    @classmethod
    def of(cls, spec: JobSpec) -> NewJob:
        return cls(Shape(spec), spec.prompt, spec.negative_prompt, spec.seed)

    @property
    def spec(self) -> JobSpec:
        return self.shape.spec.like_this(self.prompt, self.negative_prompt, self.seed)


SDCPP_PROMPT_BYTES = 4_000
"""As UTF-8. A token may be one byte, and the text encoder's time and memory grow with the square
of their number: 4,000 take 1.3 GB, and up to 2 s; 32,000 end the process."""


def engine_refuses(engine: str, text: str) -> str | None:
    """Why an engine takes no such text, whatever its model is; None where it does."""
    if engine != "sdcpp":
        return None
    if "<lora:" in text.lower():
        return "<lora:...> in a prompt would open a file; name LoRAs of the catalogue in `loras`"
    if (length := len(text.encode(errors="surrogatepass"))) > SDCPP_PROMPT_BYTES:
        return f"{length:,} bytes of text; engine sdcpp reads {SDCPP_PROMPT_BYTES:,} at most"
    return None


FIELDS = tuple(JobSpec.model_fields)
_shape = itemgetter(*(n for n in FIELDS if n not in ("prompt", "negative_prompt", "seed")))
# What may differ within a micro-batch; of the pictures, only whether there is one counts.
PER_JOB = ("prompt", "negative_prompt", "seed", "format", "engine", "init_image", "mask_image")
_common = itemgetter(*(name for name in FIELDS if name not in PER_JOB))
_PICTURE = "a PNG, JPEG or WebP file, blob:KEY of one in the blob store, or job:BATCH/INDEX"
EXPECTED: dict[str, str] = {
    "model": "the name of a model in the catalogue",
    "engine": "one of diffusers, sdcpp, or nothing for any",
    "prompt": f"a text of 1 to {MAX_PROMPT_CHARS:,} characters without control characters",
    "negative_prompt": f"a text of up to {MAX_PROMPT_CHARS:,} characters, no control characters",
    "width": "a multiple of 8 from 16 to 8192",
    "height": "a multiple of 8 from 16 to 8192",
    "steps": "a whole number from 1 to 500",
    "guidance_scale": "a number from 0 to 100",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "scheduler": f"one of {', '.join(SAMPLERS)}, or its diffusers class name",
    "format": "one of png, webp, jpeg",
    "init_image": _PICTURE,
    "mask_image": f"{_PICTURE}; white is painted anew",
    "strength": "a number from 0 to 1, with an init_image",
    "loras": f"up to {MAX_LORAS} names in the catalogue with weights from -4 to 4",
    "clip_skip": "a whole number from 1 to 11",
}


def kind_of(init_image: str | None, mask_image: str | None) -> Kind:
    """What a job with these pictures is."""
    if mask_image:
        return "inpainting"
    return "image-to-image" if init_image else "text-to-image"


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def compatibility_key(params: Mapping[str, Any]) -> str:
    """The key of a job given as a mapping of its fields; see JobSpec.key."""
    shared = {name: params[name] for name in FIELDS if name not in PER_JOB}
    shared["kind"] = kind_of(params["init_image"], params["mask_image"])
    return hashlib.sha256(_canonical(shared).encode()).hexdigest()[:16]


def one_key(specs: Iterable[JobSpec]) -> bool:
    """Whether all of these have the same compatibility key."""
    return len({(_common(spec.__dict__), spec.kind) for spec in specs}) <= 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({len(text):,} characters)"


def _named(message: str) -> str:
    """The field that a fault of the whole begins with."""
    first = message.removeprefix("Value error, ").split(" ", 1)[0]
    return first if first in FIELDS else "row"


def row_errors(line: int, error: ValidationError) -> list[RowError]:
    """A pydantic error as one RowError a field."""
    rows: dict[str, RowError] = {}
    for item in error.errors(include_url=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else _named(item["msg"])
        code = InvalidPrompt.code if name.endswith("prompt") else InvalidParameter.code
        value = item["input"]
        if not item["loc"] and isinstance(value, Mapping):  # a fault of the whole
            value = value.get(name)
        expected, got = EXPECTED.get(name, f"one of {', '.join(FIELDS)}"), _shown(value)
        if item["type"] == "missing":
            got = "nothing"
        elif item["type"] == "value_error":
            got = f"{got}: {item['msg'].removeprefix('Value error, ')}"
        elif item["type"] == "extra_forbidden":
            expected, got = f"a known field, {expected}", f"the unknown field {_shown(name)}"
        rows.setdefault(name, RowError(line, name, got, expected, code))
    return list(rows.values())


def describe(errors: Iterable[RowError]) -> str:
    """One sentence for a single job's errors (their line number left out)."""
    return "; ".join(f"{e.field}: expected {e.expected}, got {e.got}" for e in errors)
