"""A child with a tiny model of stable-diffusion.cpp loaded."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farm.catalog import Weights
from farm.errors import FarmError
from farm.spec import JobSpec
from workers.child import Child
from workers.engine import EngineConfig, EngineInfo
from workers.messages import Failed, Rendered

SPEC: dict[str, Any] = {
    "model": "tiny", "prompt": "a red cat", "negative_prompt": "", "width": 64, "height": 64,
    "steps": 2, "guidance_scale": 1.0, "seed": 1, "scheduler": None, "format": "png",
}  # fmt: skip
PARTS = {part: f"{part}.safetensors" for part in ("diffusion_model", "llm", "vae")}


def spec(**params: Any) -> JobSpec:
    return JobSpec(**{**SPEC, **params})


def config(path: Path | None, threads: int | None = 2, **options: Any) -> EngineConfig:
    return EngineConfig("sdcpp", "tiny", Weights(path=path, options=options), threads=threads)


def png(picture: Image.Image | np.ndarray[Any, Any]) -> tuple[str, bytes]:
    """An input picture: its key and its file."""
    file = io.BytesIO()
    whole = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    whole.save(file, "PNG")
    data = file.getvalue()
    return f"inputs/{hashlib.sha256(data).hexdigest()}.png", data


class Kit:
    """A child with the model loaded, and how often it was."""

    def __init__(self, log: Path, told: EngineConfig) -> None:
        self.log = log
        self.child = Child(told, log=log)
        self.info: EngineInfo = self.child.start()
        self.inputs: dict[str, bytes] = {}

    def take(self, picture: Image.Image | np.ndarray[Any, Any]) -> str:
        """The key of a picture that jobs may name from now on."""
        key, data = png(picture)
        self.inputs[key] = data
        return key

    def render(self, **params: Any) -> np.ndarray[Any, Any] | FarmError:
        return self.result(spec(**params))

    def result(self, job: JobSpec) -> np.ndarray[Any, Any] | FarmError:
        for event in self.child.render([job], self.inputs):
            if isinstance(event, Rendered):
                pixels: np.ndarray[Any, Any] = event.pixels
            elif isinstance(event, Failed):
                return event.error
        return pixels

    def picture(self, **params: Any) -> bytes:
        result = self.render(**params)
        assert isinstance(result, np.ndarray), result
        return result.tobytes()

    def refusal(self, **params: Any) -> FarmError:
        result = self.render(**params)
        assert isinstance(result, FarmError)
        return result

    def loads(self) -> int:
        return self.log.read_text(errors="replace").count("total params memory size")
