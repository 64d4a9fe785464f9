"""LoRAs for stable-diffusion.cpp: which may be used, and what became of them.

The library reads a LoRA's file anew for each render. It aborts the process on shapes that do not
go together, and only logs that a file fits nothing of the model. So all that can be known of a file
is looked at here first, and a render tells afterwards how many tensors it took.

Names of tensors: https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference (A, B)
and https://github.com/kohya-ss/sd-scripts (down, up).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from farm.errors import EngineCrashed, FarmError, InvalidParameter, ModelNotLoaded
from farm.weight_files import sha256_of
from workers.engines.checkpoint_files import Tensor, checked_tensors

_DOWN = re.compile(r"\.(lora_A(\.default)?|lora_down|lora\.down)\.weight$|_lora\.down\.weight$")
_UPS = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
_OTHER_KINDS = (".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".diff", ".diff_b")
_NOT_RENDERING = re.compile(  # tensors of text encoders and VAEs, in models and in LoRAs
    r"^(cond_stage_model|conditioner|text_encoders?|first_stage_model|vae|tae|clip|te\d?)\b"
    r"|^(base_model\.model\.)?text_model|^lora_te|^text_encoder_2"
)


@dataclass(frozen=True)
class Lora:
    """A file that was found whole. `state`: what stat told of it then."""

    path: Path
    sha256: str
    state: tuple[int, ...]


class Loras:
    """Those that jobs may name; a name whose file is no good keeps the reason."""

    def __init__(self, files: Mapping[str, Path], model: Iterable[Tensor]) -> None:
        shapes = [t.shape for t in model if len(t.shape) > 1 and not _NOT_RENDERING.match(t.name)]
        widths: dict[int, int] = {}  # inputs of a layer -> the most outputs of such a layer
        for shape in shapes:
            widths[shape[1]] = max(shape[0], widths.get(shape[1], 0))
        self._known: dict[str, Lora | str] = {}
        for name, path in files.items():
            self._known[name] = _looked_at(path, widths)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the file of each good one, by name."""
        return {name: one.sha256 for name, one in self._known.items() if isinstance(one, Lora)}

    def refusal(self, wanted: Iterable[tuple[str, float]]) -> FarmError | None:
        """Why these cannot be used, by the first that cannot."""
        for name, _ in wanted:
            known = self._known.get(name, "this worker does not have it")
            if isinstance(known, str):
                return InvalidParameter(f"LoRA {name}: {known}")
        return None

    def chosen(self, wanted: Iterable[tuple[str, float]]) -> dict[Path, float]:
        """Files and weights; a weight of 0 is as none.

        Raises EngineCrashed when a file is not the one whose hash was told: the next process of
        the engine looks anew.
        """
        found: dict[Path, float] = {}
        for name, weight in wanted:
            one = self._known[name]
            assert isinstance(one, Lora)
            if not weight:
                continue
            if _state(one.path) != one.state:
                raise EngineCrashed(f"LoRA {name}: its file was changed; the engine starts anew")
            found[one.path] = found.get(one.path, 0.0) + weight
        return {path: weight for path, weight in found.items() if weight}

    def note(self, taken: Mapping[str, int], used: Iterable[Path]) -> None:
        """After a render: `taken` has the tensors that the model took of each file."""
        for name, one in self._known.items():
            if isinstance(one, Lora) and one.path in used and not taken.get(str(one.path)):
                self._known[name] = "none of its tensors fits this model; it is for another one"


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _looked_at(path: Path, widths: Mapping[int, int]) -> Lora | str:
    """The LoRA in a file, or what is wrong with it."""
    path = path.resolve()
    try:
        state = _state(path)
        tensors = checked_tensors(path)
        return _misfit(tensors, widths) or Lora(path, sha256_of(path), state)
    except (ModelNotLoaded, OSError) as error:
        return str(error)


def _misfit(tensors: Iterable[Tensor], widths: Mapping[int, int]) -> str | None:
    """What native code would not survive, of shapes that do not go together."""
    named = {tensor.name: tensor for tensor in tensors}
    downs = {name: found for name in named if (found := _DOWN.search(name))}
    if not downs and not any(name.endswith(_OTHER_KINDS) for name in named):
        return "this file is no LoRA, its tensors have other names"
    for name, found in downs.items():
        ending = found.group()
        (kind,) = (kind for kind in _UPS if kind in ending)
        up = named.get(name.removesuffix(ending) + ending.replace(kind, _UPS[kind]))
        if up is None:
            return f"{name[:80]} has no counterpart"
        down = named[name]
        if min(len(down.shape), len(up.shape)) < 2 or down.shape[0] != up.shape[1]:
            return f"{name[:80]}: its shape {down.shape} and its counterpart's {up.shape} differ"
        inputs, outputs = down.shape[1], up.shape[0]
        if not _NOT_RENDERING.match(name) and outputs > widths.get(inputs, 0):
            return (
                f"{name[:80]} is for a layer of {inputs} inputs and {outputs} outputs, "
                "which this model does not have; it is for another one"
            )
    return None
