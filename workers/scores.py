"""Scores by CLIP, for whoever has its weights: plug-ins for [[gates.scores]] of a recipe.

    [[gates.scores]]
    name = "clip"
    plugin = "workers.scores:ClipScore"
    min = 22
    options = { path = "/models/clip-vit-large-patch14", device = "cuda" }

    [[gates.scores]]
    name = "aesthetic"
    plugin = "workers.scores:Aesthetic"
    min = 5
    options = { head = "/models/aesthetic.safetensors", path = "/models/clip-vit-large-patch14" }

`path` is a directory as transformers saves it (config.json, model.safetensors, the tokenizer and
the processor); nothing is downloaded, no pickle is read. Needs renderfarm[diffusers].
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file

from farm.errors import ModelNotLoaded

if TYPE_CHECKING:
    from PIL.Image import Image


class ClipScore:
    """How well a picture fits its prompt, 0 to 100: the cosine of their CLIP embeddings x 100, and
    0 for those below.

    As torchmetrics has it; the paper (https://arxiv.org/abs/2104.08718) has x 2.5, and "A photo
    depicts" before the text, which can be given as `prefix`. What is said beyond the model's 77
    tokens is not seen.
    """

    def __init__(self, path: str, device: str = "cpu", prefix: str = "") -> None:
        self._clip, self._prefix = _Clip(path, device), prefix

    def score(self, image: Image, prompt: str) -> float:
        cosine = self._clip.picture(image) @ self._clip.text(self._prefix + prompt)
        return max(100 * cosine.item(), 0.0)


class Aesthetic:
    """How much people may like a picture, about 1 to 10, whatever its prompt.

    `head`: linear layers on the picture's CLIP embedding, in safetensors, named in their order. So
    are LAION's sa_0_4_vit_l_14_linear and sac+logos+ava1-l14-linearMSE, both on ViT-L/14, once
    converted: save_file(torch.load("x.pth", weights_only=True), "x.safetensors"). A head with
    activations between its layers (reluMSE) looks the same and would score wrongly.
    """

    def __init__(self, head: str, path: str, device: str = "cpu") -> None:
        self._clip = _Clip(path, device)
        self._layers = _linear_layers(Path(head), self._clip.width, device)

    def score(self, image: Image, prompt: str) -> float:
        value = self._clip.picture(image)
        for weight, bias in self._layers:
            value = weight @ value + bias
        return float(value.item())


class _Clip:
    """Embeddings of length 1. Raises ModelNotLoaded for a directory that holds no whole model."""

    def __init__(self, path: str, device: str) -> None:
        if not (Path(path) / "config.json").is_file():
            raise ModelNotLoaded(f"there is no CLIP model in {path}: no config.json")
        how = {"local_files_only": True}
        try:
            model, found = transformers.CLIPModel.from_pretrained(
                path, **how, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self._processor = transformers.CLIPProcessor.from_pretrained(path, **how)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelNotLoaded(f"the CLIP model in {path}: {str(error)[:300]}") from error
        if missing := sorted(found["missing_keys"]):
            raise ModelNotLoaded(
                f"the CLIP model in {path} lacks {missing[0]} and {len(missing) - 1} more tensors"
            )
        self._model, self._device = model.to(device).eval(), device
        self.width = int(model.config.projection_dim)

    @torch.inference_mode()
    def picture(self, image: Image) -> torch.Tensor:
        """(width,)"""
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
        found = self._model.vision_model(pixel_values=pixels.to(self._device))
        return _unit(self._model.visual_projection(found.pooler_output)[0])

    @torch.inference_mode()
    def text(self, prompt: str) -> torch.Tensor:
        """(width,)"""
        most = self._model.config.text_config.max_position_embeddings
        tokens = self._processor.tokenizer(
            [prompt], truncation=True, max_length=most, return_tensors="pt"
        )
        found = self._model.text_model(**tokens.to(self._device))
        return _unit(self._model.text_projection(found.pooler_output)[0])


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


def _linear_layers(path: Path, width: int, device: str) -> list[tuple[Any, Any]]:
    """(weight, bias) of each, from `width` to one number. Raises ModelNotLoaded."""
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path, device).items()}
    except Exception as error:  # of safetensors, a class of its own
        raise ModelNotLoaded(f"the head {path} is no safetensors file: {error}") from None
    names = sorted((n for n in tensors if n.endswith("weight")), key=_numbers)
    layers = [(tensors[n], tensors.get(n.removesuffix("weight") + "bias")) for n in names]
    for weight, bias in layers:
        if weight.ndim != 2 or weight.shape[1] != width or bias is None:
            raise ModelNotLoaded(f"the head {path} is no chain of linear layers for this CLIP")
        width = weight.shape[0]
    if width != 1 or 2 * len(layers) != len(tensors):
        raise ModelNotLoaded(f"the head {path} does not end in one number")
    return layers


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]
