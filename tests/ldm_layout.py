"""A tiny sd15 pipeline as one file, in the tensor names of the original Stable Diffusion code.

The inverse of diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint and its like, for
UNets and VAEs of any number of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_single_file(folder: Path, file: Path) -> Path:
    """The weights of the sd15 pipeline in `folder` as one safetensors file; returns `file`."""
    parts: list[tuple[str, str, Callable[[str, Tensors], str]]] = [
        ("unet/diffusion_pytorch_model", "model.diffusion_model.", _unet_name),
        ("vae/diffusion_pytorch_model", "first_stage_model.", _vae_name),
        ("text_encoder/model", "cond_stage_model.transformer.", _clip_name),
    ]
    whole: Tensors = {}
    for name, prefix, renamed in parts:
        tensors = load_file(folder / f"{name}.safetensors")
        for key, tensor in tensors.items():
            whole[prefix + renamed(key, tensors)] = tensor.contiguous()
    save_file(whole, file)
    return file


def vae_file(folder: Path, file: Path) -> Path:
    """The VAE of the pipeline in `folder` alone, as such files are passed around."""
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({_vae_name(key, tensors): t.contiguous() for key, t in tensors.items()}, file)
    return file


def _clip_name(key: str, _: Tensors) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


def _replaced(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{new}.", text)
    return text


def _unet_name(key: str, tensors: Tensors) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    layers = 1 + max(int(n) for n in _found(r"down_blocks\.0\.resnets\.(\d+)", tensors))
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        kind, number, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}." + (_replaced(rest, RESNET) if kind == "resnets" else rest)
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert found, key
    way, block, kind, number, rest = found.groups()
    side, each = ("input", layers + 1) if way == "down" else ("output", layers + 1)
    first = int(block) * each + (way == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        attends = bool(_found(rf"(up_blocks\.{block}\.attentions)", tensors))
        return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
    inner = "1" if kind == "attentions" else "0"
    rest = _replaced(rest, RESNET) if kind == "resnets" else rest
    return f"{side}_blocks.{first + int(number)}.{inner}.{rest}"


def _vae_name(key: str, tensors: Tensors) -> str:
    key = key.replace("conv_norm_out.", "norm_out.")
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        return f"{head}mid.attn_1.{_replaced(rest, VAE_ATTENTION)}"
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("conv_shortcut", "nin_shortcut")
    blocks = 1 + max(int(n) for n in _found(r"decoder\.up_blocks\.(\d+)", tensors))
    for way, kind in (("down", "downsample"), ("up", "upsample")):
        found = re.match(rf"(\w+)\.{way}_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
        if found:
            half, block, part, number, rest = found.groups()
            at = int(block) if way == "down" else blocks - 1 - int(block)
            inner = f"block.{number}" if part == "resnets" else kind
            return f"{half}.{way}.{at}.{inner}.{rest}"
    return key


def _found(pattern: str, tensors: Tensors) -> Sequence[str]:
    return [found[1] for key in tensors if (found := re.search(pattern, key))]
