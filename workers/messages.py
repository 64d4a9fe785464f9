"""What the worker and its engine's process say to each other over their pipe.

A bundle's jobs are named by their positions in it, 0 to n-1; an order names the bundle, so that
one which comes too late for its bundle does not touch the next. The child answers a Bundle with
events and one End. A Shipped is followed by the pictures' bytes as a message of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from farm.errors import FarmError, by_code
from farm.spec import JobSpec
from workers.engine import EngineInfo, Inputs, Pixels


# ------------------------------------------------------------------ to the child
@dataclass(frozen=True)
class Bundle:
    """`done`: those that need no rendering any more. `inputs`: files of their input pictures."""

    number: int
    specs: tuple[JobSpec, ...]
    done: frozenset[int] = frozenset()
    inputs: Inputs = field(default_factory=dict)


@dataclass(frozen=True)
class Cancel:
    bundle: int
    ids: frozenset[int]


@dataclass(frozen=True)
class StopAfterCurrent:
    bundle: int


@dataclass(frozen=True)
class Close:
    pass


Order = Bundle | Cancel | StopAfterCurrent | Close


# ---------------------------------------------------------------- from the child
@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True)
class Broken:
    """The engine gives up, and its process ends: the model did not load, or the device failed."""

    code: str
    message: str

    def error(self) -> FarmError:
        return by_code(self.code, self.message)


@dataclass(frozen=True)
class End:
    """Nothing more comes of this bundle."""

    bundle: int


@dataclass(frozen=True)
class Shipped:
    """Finished pictures of one shape; their bytes follow, one after the other."""

    ids: tuple[int, ...]
    seconds: float
    batch: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Fault:
    """A job's failure as it crosses the pipe."""

    id: int
    code: str
    message: str


# ------------------------------------------------------ events of Child.render
@dataclass(frozen=True)
class Started:
    """A micro-batch begins; it may name a job again that is tried anew."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """`fraction` of the steps of the micro-batch under way, 0 to 1; at 1 its decoding begins.

    That is told for certain only where the steps took long.
    """

    ids: tuple[int, ...]
    fraction: float


@dataclass(frozen=True)
class Cap:
    """The micro-batch was too large for the memory; `size` is the new cap."""

    size: int


@dataclass(frozen=True)
class Eased:
    """The engine makes do with less memory: what it did, and how many such rungs it has taken."""

    what: str
    rungs: int


@dataclass(frozen=True)
class TooLarge:
    """A picture of so many pixels does not fit alone, after all rungs; only `eased` were of use."""

    pixels: int
    eased: int


@dataclass(frozen=True)
class Rendered:
    """A picture, read-only pixels.

    `seconds`: the job's share of its micro-batch's time; `batch`: the size it ran in, padding
    counted.
    """

    id: int
    pixels: Pixels
    seconds: float
    batch: int


@dataclass(frozen=True)
class Failed:
    """The job's error; JobCancelled when it was cancelled."""

    id: int
    error: FarmError


@dataclass(frozen=True)
class GivenBack:
    """The job was not begun, because of stop_after_current."""

    id: int


Lesson = Cap | Eased | TooLarge
"""What a lack of memory taught."""

Event = Started | Progress | Lesson | Rendered | Failed | GivenBack
Message = Ready | Broken | End | Shipped | Fault | Started | Progress | Lesson | GivenBack
