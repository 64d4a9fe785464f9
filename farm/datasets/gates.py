"""Gates: which pictures of a run go into its dataset.

    [gates]
    blank = true               # pictures of one colour, or nearly; an engine's NaNs come out so
    exact_duplicates = true    # the same pixels as a row before
    near_duplicates = 4        # much the same as a row before; 0 is off
    min_side = 512             # pixels
    attempts = 3               # a rejected row is rendered with new seeds, 3 times in all

    [[gates.scores]]
    name = "clip"
    plugin = "workers.scores:ClipScore"
    min = 22
    options = { path = "/models/clip-vit-large-patch14" }

Without [gates], blank pictures and exact duplicates are rejected, for nobody wants them in a
dataset; the rest is asked for. Plug-ins: see `scores`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from farm.datasets.scores import Number, Score, ScoreSection, words
from farm.datasets.seen import BYTES, Seen
from farm.errors import InvalidConfig, InvalidParameter
from farm.picture_bounds import refuse_endless, refuse_scans
from farm.spec import INPUT_FORMATS, MAX_INPUT_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ATTEMPTS = 32
MAX_DISTANCE = 12  # of 64 bits; among a million pictures every other one has a stranger so near
_MEASURES = 1  # raised when a measure changes its meaning
_BANDS = (0, 256, 512)  # where a histogram's begin
_LEVELS = range(256)
_SQUARES = [level**2 for level in _LEVELS]

Side = Annotated[int, Field(ge=1)]


class GatesSection(BaseModel):
    """[gates] of a recipe.

    `min_std`: a picture is blank if the standard deviation of each colour, in steps of 8 bits, is
    less. `near_duplicates`: the most bits of 64 in which perceptual hashes (pHash) differ and still
    count as one; 2 to 6 find the same picture saved anew, brighter or slightly changed. The hash
    sees shapes in grey: a red ball and a green one may be alike to it. `min_side`, `max_side`: of
    the shorter and the longer side, in pixels. `safety`: what is refused by the model's own safety
    checker is rejected, or fails as any job does. `attempts`: pictures tried for a row in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blank: bool = True
    min_std: Annotated[Number, Field(gt=0)] = 2.0
    exact_duplicates: bool = True
    near_duplicates: Annotated[int, Field(ge=0, le=MAX_DISTANCE)] = 0
    min_side: Side | None = None
    max_side: Side | None = None
    safety: Literal["reject", "fail"] = "reject"
    attempts: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)] = 1
    scores: tuple[ScoreSection, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> GatesSection:
        if self.min_side and self.max_side and self.min_side > self.max_side:
            raise ValueError("min_side must not be larger than max_side")
        names = [score.name for score in self.scores]
        if len(set(names)) < len(names):
            raise ValueError("scores: each needs a name of its own")
        return self


class Measures(TypedDict, total=False):
    """What was measured of a picture, as JSON has it: only what its gates ask for.

    `broken`: why it could not be decoded, and then nothing else. `std`: of the most varied colour.
    `pixels`: 128 bits of a hash of them. `phash`: 64 bits as hex.
    """

    broken: str
    size: list[int]
    std: float
    pixels: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    phash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    scores: dict[str, float]


@dataclass(frozen=True)
class Rejection:
    """Which gate refused a picture, and why: `near_duplicates`, `distance 3 from row 17`."""

    gate: str
    why: str


class Gates:
    """Measures pictures as far as the section asks for it; safe to share between threads.

    `folder`: the recipe's, where plug-ins may lie. Raises InvalidConfig for one that cannot be
    loaded.
    """

    def __init__(self, section: GatesSection, folder: Path | None = None) -> None:
        self._section, self._folder = section, folder
        self._sides = bool(section.min_side or section.max_side)
        self._scores = {told.name: Score(told, folder) for told in section.scores}

    @property
    def look(self) -> bool:
        """Whether pictures are looked at at all."""
        told = self._section
        asked = (told.blank, told.exact_duplicates, told.near_duplicates, self._sides, told.scores)
        return any(asked)

    @property
    def mark(self) -> str:
        """Measures of the same picture and mark are the same, whatever the gates' limits are."""
        told = self._section
        scores = [(one.name, one.plugin, one.options, self._code(one)) for one in told.scores]
        near = bool(told.near_duplicates)
        asked = [_MEASURES, told.blank, told.exact_duplicates, near, self._sides, scores]
        text = json.dumps(asked, sort_keys=True, default=str)  # TOML has dates, JSON has none
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _code(self, told: ScoreSection) -> str | None:
        """The SHA-256 of a plug-in that lies beside the recipe."""
        path = (
            self._folder and self._folder / f"{told.plugin.partition(':')[0].replace('.', '/')}.py"
        )
        return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else None

    def measure(self, data: bytes, params: Mapping[str, Any]) -> Measures:
        """Of a picture's file; `params`: the fields of its job. Raises InvalidConfig when a plug-in
        fails, or gives no finite number."""
        if not self.look:
            return {}
        try:
            image = _decoded(data)
        except InvalidParameter as error:
            return {"broken": error.message}
        told, found = self._section, Measures()
        if self._sides:
            found["size"] = list(image.size)
        if told.blank:
            found["std"] = _deviation(image)
        if told.exact_duplicates:
            found["pixels"] = _pixels(image)
        if told.near_duplicates:
            found["phash"] = _near().phash(image)
        if self._scores:
            prompt = str(params["prompt"])
            found["scores"] = {
                name: score.of(image, prompt) for name, score in self._scores.items()
            }
        return found


class Judge:
    """Says which pictures are good enough, those accepted before in mind; for one thread.

    The order decides: of two that are alike, the one that is judged first stays. The same pictures
    in the same order always lead to the same decisions.
    """

    def __init__(self, section: GatesSection) -> None:
        self._section = section
        self._pixels = Seen()
        if section.near_duplicates:
            self._near = _near().NearHashes(section.near_duplicates)

    def reason(self, measures: Measures | None) -> Rejection | None:
        """Why the picture is not accepted; None: it may be. None was measured where no gate looks.

        A duplicate is told with the row that was accepted first.
        """
        if measures is None:
            return None
        if "broken" in measures:
            return Rejection("broken", measures["broken"])
        return self._by_itself(measures) or self._exact(measures) or self._nearly(measures)

    def accept(self, row: int, measures: Measures | None) -> None:
        """Keep it in mind for those that come after it. What is not measured is not kept."""
        if measures is None:
            return
        if "pixels" in measures:
            self._pixels.add(_mark(measures["pixels"]), row)
        if "phash" in measures and self._section.near_duplicates:
            self._near.add(row, int(measures["phash"], 16))

    def _by_itself(self, measures: Measures) -> Rejection | None:
        told = self._section
        if told.min_side and (side := min(measures["size"])) < told.min_side:
            return Rejection("min_side", f"{side} pixels, less than {told.min_side}")
        if told.max_side and (side := max(measures["size"])) > told.max_side:
            return Rejection("max_side", f"{side} pixels, more than {told.max_side}")
        if told.blank and (std := measures["std"]) < told.min_std:
            return Rejection("blank", f"standard deviation {std:g}, less than {told.min_std:g}")
        for score in told.scores:
            value = measures["scores"][score.name]
            if score.min is not None and value < score.min:
                return Rejection(f"scores.{score.name}", f"{value:g}, less than {score.min:g}")
            if score.max is not None and value > score.max:
                return Rejection(f"scores.{score.name}", f"{value:g}, more than {score.max:g}")
        return None

    def _exact(self, measures: Measures) -> Rejection | None:
        if not self._section.exact_duplicates:
            return None
        row = self._pixels.get(_mark(measures["pixels"]))
        return None if row is None else Rejection("exact_duplicates", f"the pixels of row {row}")

    def _nearly(self, measures: Measures) -> Rejection | None:
        if not self._section.near_duplicates:
            return None
        found = self._near.find(int(measures["phash"], 16))
        if found is None:
            return None
        return Rejection("near_duplicates", f"distance {found.distance} from row {found.row}")


def _decoded(data: bytes) -> Image:
    """The picture in RGB. Raises InvalidParameter for what is none, and for one without bounds."""
    from PIL import Image

    try:
        refuse_endless(data)
        with Image.open(io.BytesIO(data), formats=INPUT_FORMATS) as picture:
            pixels = picture.width * picture.height
            if pixels > MAX_INPUT_PIXELS:
                raise InvalidParameter(f"{picture.width}x{picture.height} pixels are too many")
            if picture.format in ("JPEG", "MPO"):
                refuse_scans(data, pixels)
            return picture.convert("RGB")
    except InvalidParameter:
        raise
    except Exception as error:  # whatever a decoder says of spoilt bytes
        raise InvalidParameter(f"it cannot be decoded: {words(error)}") from None


def _deviation(image: Image) -> float:
    """As PIL.ImageStat has it, in a quarter of the time."""
    pixels, histogram = image.width * image.height, image.histogram()

    def variance(counts: list[int]) -> float:
        total, squares = sum(map(mul, counts, _LEVELS)), sum(map(mul, counts, _SQUARES))
        return float((squares - total**2 / pixels) / pixels)

    return round(math.sqrt(max(variance(histogram[band : band + 256]) for band in _BANDS)), 3)


def _pixels(image: Image) -> str:
    """By SHA-256, which processors have instructions for."""
    digest = hashlib.sha256(b"%d %d " % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def _mark(pixels: str) -> int:
    return int(pixels[-2 * BYTES :], 16)


def _near() -> ModuleType:
    """farm.datasets.near, whose packages not every machine has."""
    try:
        from farm.datasets import near
    except ImportError as error:
        raise InvalidConfig(
            "gates: near_duplicates needs imagehash and numpy: pip install 'renderfarm[dataset]'"
        ) from error
    return near
