"""LoRA files for the tiny models of tests.models, in the layout of peft that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
LAYERS = (
    "attn.to_q",
    "attn1.to_q",
    "attn2.to_v",
    "attention.to_q",
    "self_attn.v_proj",
    "self_attn.out_proj",
)
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
    """The tensors of a part; none where the model has no such part, or its texts are not CLIP's."""
    files = [f for f in folder.glob("*.safetensors") if (folder / "config.json").exists()]
    config = json.loads((folder / "config.json").read_text()) if files else {}
    if folder.name.startswith("text_encoder") and config.get("model_type") != "clip_text_model":
        return {}
    return {key: value for file in files for key, value in load_file(file).items()}


def in_kohyas_layout(source: Path, file: Path, alpha: float) -> Path:
    """The same LoRA of sd15 as kohya's trainer writes it, which most published files are.

    `alpha`: the changes are multiplied by alpha / RANK.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, value in load_file(source).items():
        layer, _, side = key.removesuffix(".weight").partition(".lora_")
        layer = layer.replace("text_encoder.", "te.text_model.").replace(".", "_")
        tensors[f"lora_{layer}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        tensors[f"lora_{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file, {"format": "pt"})
    return file
