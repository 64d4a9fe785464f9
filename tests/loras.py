"""LoRA files for the tiny models of tests.models, in the layout of peft that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny

PARTS = ("unet", "transformer", "text_encoder")
LAYERS = ("attn.to_q", "attn1.to_q", "attn2.to_v", "attention.to_q", "self_attn.v_proj")
RANK = 2


def lora(family: str, file: Path, parts: tuple[str, ...] = PARTS, seed: int = 0) -> Path:
    """A random LoRA of some attention layers of a tiny model's parts."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for part in parts:
        for key, weight in _weights(tiny(family) / part).items():
            layer = key.removesuffix(".weight")
            if layer.endswith(LAYERS) and layer != key:
                wide, tall = weight.shape
                down = torch.randn(RANK, tall, generator=random)
                up = torch.randn(wide, RANK, generator=random) / 4
                tensors[f"{part}.{layer}.lora_A.weight"] = down
                tensors[f"{part}.{layer}.lora_B.weight"] = up
    save_file(tensors, file, {"format": "pt"})
    return file


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a part; none where the model has no such part, or it is no neighbour's."""
    files = [f for f in folder.glob("*.safetensors") if (folder / "config.json").exists()]
    config = json.loads((folder / "config.json").read_text()) if files else {}
    if folder.name == "text_encoder" and config.get("model_type") != "clip_text_model":
        return {}
    return {key: value for file in files for key, value in load_file(file).items()}
