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
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from farm.errors import InvalidParameter, InvalidPrompt, RowError

MAX_PROMPT_CHARS = 8_000
MAX_SEED = 2**63 - 1
NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"

# Common sampler names -> diffusers scheduler class and the config values that differ from the
# model's own. https://huggingface.co/docs/diffusers/api/schedulers/overview lists the pairs.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_sde": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
_ALIAS_OF = {cls: alias for alias, (cls, config) in SCHEDULERS.items() if not config}
_ALIAS_OF["DPMSolverMultistepScheduler"] = "dpm++_2m"


def _clean_text(text: str) -> str:
    """Refuse characters that no model reads and that SQL, logs or terminals choke on."""
    for char in text:
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t":
            raise ValueError(f"control character U+{ord(char):04X}")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("empty")
    return text


def canonical_scheduler(name: str) -> str:
    """The alias for a scheduler alias or diffusers class name.

    Raises ValueError when neither is known.
    """
    alias = _ALIAS_OF.get(name, name.lower())
    if alias not in SCHEDULERS:
        raise ValueError("unknown scheduler")
    return alias


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(_clean_text)]


class JobSpec(BaseModel):
    """One picture to render. Sizes in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Annotated[str, Field(pattern=NAME_PATTERN)]
    prompt: Annotated[Text, AfterValidator(_not_blank)]
    negative_prompt: Text = ""
    width: Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
    height: Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
    steps: Annotated[int, Field(ge=1, le=500)]
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    scheduler: Annotated[str, AfterValidator(canonical_scheduler)] | None = None
    format: Literal["png", "webp", "jpeg"] = "png"

    def canonical(self) -> str:
        """The job as canonical JSON."""
        return _canonical(self.model_dump())

    @property
    def key(self) -> str:
        """Compatibility key, 16 hex digits: equal for jobs that may share a micro-batch."""
        return compatibility_key(self.model_dump())

    def fingerprint(self, engine: str, weights_sha256: str) -> str:
        """SHA-256 (64 hex digits) of the job, the engine and the weights: one per picture."""
        whole = {"engine": engine, "weights": weights_sha256, **self.model_dump()}
        return hashlib.sha256(_canonical(whole).encode()).hexdigest()


FIELDS = tuple(JobSpec.model_fields)
PER_JOB = ("prompt", "negative_prompt", "seed", "format")  # may differ within a micro-batch
EXPECTED: dict[str, str] = {
    "model": "the name of a model in the catalogue",
    "prompt": f"a text of 1 to {MAX_PROMPT_CHARS:,} characters without control characters",
    "negative_prompt": f"a text of up to {MAX_PROMPT_CHARS:,} characters, no control characters",
    "width": "a multiple of 8 from 16 to 8192",
    "height": "a multiple of 8 from 16 to 8192",
    "steps": "a whole number from 1 to 500",
    "guidance_scale": "a number from 0 to 100",
    "seed": f"a whole number from 0 to {MAX_SEED}",
    "scheduler": f"one of {', '.join(SCHEDULERS)}, or its diffusers class name",
    "format": "one of png, webp, jpeg",
}


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def compatibility_key(params: Mapping[str, Any]) -> str:
    """The key of a job given as a mapping of its fields; see JobSpec.key."""
    shared = {name: params[name] for name in FIELDS if name not in PER_JOB}
    return hashlib.sha256(_canonical(shared).encode()).hexdigest()[:16]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({len(text):,} characters)"


def row_errors(line: int, error: ValidationError) -> list[RowError]:
    """A pydantic error as one RowError a field."""
    rows: dict[str, RowError] = {}
    for item in error.errors(include_url=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else "row"
        code = InvalidPrompt.code if name.endswith("prompt") else InvalidParameter.code
        expected, got = EXPECTED.get(name, f"one of {', '.join(FIELDS)}"), _shown(item["input"])
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
