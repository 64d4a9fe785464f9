"""What goes in and comes out, for the checks of requests and for OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from farm.prompts import MAX_PICTURES
from farm.spec import Text
from farm.submitting import MAX_EXPIRES_S, MAX_LABEL, MAX_PRIORITY

BATCH_ID = r"^[0-9a-hjkmnp-tv-z]{16}$"
Label = Annotated[Text, Field(max_length=MAX_LABEL)]
BATCH: dict[str, Any] = {
    "id": "0f9k2m4x7q3w5t8b", "name": "tonight", "owner": "", "priority": 0, "paused": False,
    "ready": True, "whole": True, "total": 8, "done": False, "created_at": 1795219200.5,
    "counts": {"queued": 4, "running": 1, "succeeded": 3, "failed": 0, "cancelled": 0},
    "by_model": {"shapes": {"queued": 4, "running": 1, "succeeded": 3, "failed": 0,
                            "cancelled": 0}},
    "started_at": 1795219201.0, "finished_at": None, "rate": 2.5, "eta_s": 2.0,
    "cancelled": False, "after": None, "waits": False, "expires_at": None,
}  # fmt: skip


class Order(BaseModel):
    """Whose batch, how many pictures of each prompt, and what every row inherits."""

    model_config = ConfigDict(extra="forbid")

    name: Label = ""
    owner: Label = ""
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="larger goes first")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="pictures of each prompt")
    after: str | None = Field(
        None, pattern=BATCH_ID, description="a batch that must be done with first"
    )
    expires_s: float | None = Field(
        None, gt=0, le=MAX_EXPIRES_S, description="cancel what has not begun in so many seconds"
    )
    reuse: bool = Field(True, description="link pictures that were rendered before")
    model: Label | None = Field(None, description="see /v1/models")
    engine: Label | None = Field(None, description="the only one that may render; default: any")
    negative_prompt: Text | None = None
    width: int | None = Field(None, description="pixels")
    height: int | None = Field(None, description="pixels")
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = Field(None, description="of the first picture of a prompt")
    scheduler: Label | None = None
    format: Label | None = Field(None, description="png, webp or jpeg")
    init_image: Text | None = Field(None, description="blob:KEY, of POST /v1/inputs")
    mask_image: Text | None = Field(None, description="blob:KEY; white is painted anew")
    strength: float | None = None
    clip_skip: int | None = None


class FileOrder(Order):
    """The same for a prompt file: the LoRAs as text."""

    loras: Text | None = Field(None, description="NAME:WEIGHT, NAME:WEIGHT")


class InlineOrder(Order):
    """The same with the prompts in it."""

    loras: dict[str, float] | Text | None = None
    prompts: list[str | dict[str, JsonValue]] = Field(
        min_length=1,
        description="texts, or objects of JobSpec fields",
        examples=[["a red circle", {"prompt": "a green star", "seed": 7}]],
    )


class Batch(BaseModel):
    """How far a batch is. Times in seconds since 1970; `rate` in jobs a second."""

    model_config = ConfigDict(json_schema_extra={"example": BATCH})

    id: str
    name: str
    owner: str
    priority: int
    paused: bool
    ready: bool
    whole: bool
    total: int
    counts: dict[str, int]
    by_model: dict[str, dict[str, int]]
    created_at: float
    started_at: float | None
    finished_at: float | None
    rate: float | None
    eta_s: float | None
    cancelled: bool = Field(description="a person wants no job of it any more")
    after: str | None = Field(description="the batch that it comes after")
    waits: bool = Field(description="whether that one is still under way")
    expires_at: float | None = Field(description="what has not begun by then is cancelled")
    done: bool


class Batches(BaseModel):
    """A page; `next` goes into `before` for the one after it."""

    batches: list[Batch]
    next: str | None


class Job(BaseModel):
    """A job. `picture` is where its picture is, once it succeeded."""

    id: str
    batch_id: str
    idx: int
    spec: dict[str, Any]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    failures: int
    claim_no: int
    engine: str | None
    progress: float
    started_at: float | None
    finished_at: float | None
    object_key: str | None
    sha256: str | None
    size_bytes: int | None
    render_s: float | None
    fingerprint: str | None
    error_code: str | None
    error: str | None
    picture: str | None


class Jobs(BaseModel):
    """A page; `next` goes into `after` for the one after it."""

    jobs: list[Job]
    next: int | None


class Cancelled(BaseModel):
    """How many jobs were cancelled at once, and how many running ones were asked to stop."""

    cancelled: int
    stopping: int


class Redriven(BaseModel):
    """How many jobs were queued again."""

    queued: int


class Input(BaseModel):
    """What rows name as init_image or mask_image."""

    name: str = Field(examples=["blob:inputs/" + "0" * 64 + ".png"])


class ModelLane(BaseModel):
    """A model on one engine and how many live workers serve it."""

    engine: str
    workers: int


class Model(BaseModel):
    """A model that jobs may name. `queued`: jobs of it that may be claimed."""

    name: str
    description: str
    licence: str
    licence_url: str
    terms: str
    attribution: str
    family: str
    defaults: dict[str, Any]
    sizes: list[str]
    loras: list[str]
    lanes: list[ModelLane]
    served: bool
    queued: int


class Models(BaseModel):
    models: list[Model]


class Worker(BaseModel):
    """A live worker. Times in seconds, memory in bytes."""

    id: str
    model: str
    engine: str
    device: str
    memory: int | None
    host: str
    pid: int
    state: str
    note: str
    info: dict[str, Any]
    rendered: int
    stored_bytes: int
    spooled: int = Field(description="Finished pictures that wait for the blob store.")
    seconds_per_picture: float | None
    opened_at: float
    silent_s: float


class Workers(BaseModel):
    workers: list[Worker]


class Health(BaseModel):
    status: Literal["ok"]
