"""Tiny random models that the real stable-diffusion.cpp loads: 19 MB, 64x64 in 0.3 s.

The layout is that of FLUX.2-klein, the one whose sizes the library reads off the tensors. Fixed
are heads 128 wide, 32 query and 8 key heads of the text encoder, its 151,936 tokens, and 128
latent channels. Nothing is learnt: the weights are noise from a fixed seed, the pictures abstract.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, NDArray[np.float16]]
HIDDEN, TEXT, FEED, CHANNELS, LATENT = 128, 32, 64, 32, 32
DIT, LLM, VAE = "model.diffusion_model.", "text_encoders.llm.", "first_stage_model."


def transformer(depth: int = 1, single: int = 1) -> Shapes:
    hidden = HIDDEN
    found: Shapes = {
        "img_in": (hidden, 128),
        "txt_in": (hidden, TEXT),
        "time_in.in_layer": (hidden, 256),
        "time_in.out_layer": (hidden, hidden),
        "double_stream_modulation_img.lin": (6 * hidden, hidden),
        "double_stream_modulation_txt.lin": (6 * hidden, hidden),
        "single_stream_modulation.lin": (3 * hidden, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "final_layer.linear": (128, hidden),
    }
    norms: Shapes = {}
    for block in (f"double_blocks.{i}.{side}_" for i in range(depth) for side in ("img", "txt")):
        found[f"{block}attn.qkv"] = (3 * hidden, hidden)
        found[f"{block}attn.proj"] = (hidden, hidden)
        found[f"{block}mlp.0"] = (6 * hidden, hidden)
        found[f"{block}mlp.2"] = (hidden, 3 * hidden)
        norms |= {f"{block}attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    for block in (f"single_blocks.{i}." for i in range(single)):
        found[f"{block}linear1"] = (9 * hidden, hidden)
        found[f"{block}linear2"] = (hidden, 4 * hidden)
        norms |= {f"{block}norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    return {f"{name}.weight": shape for name, shape in found.items()} | norms


def text_encoder(layers: int = 1) -> Shapes:
    found: Shapes = {"model.embed_tokens": (151_936, TEXT), "model.norm": (TEXT,)}
    for layer in (f"model.layers.{i}." for i in range(layers)):
        found |= {
            f"{layer}self_attn.q_proj": (32 * 128, TEXT),
            f"{layer}self_attn.k_proj": (8 * 128, TEXT),
            f"{layer}self_attn.v_proj": (8 * 128, TEXT),
            f"{layer}self_attn.o_proj": (TEXT, 32 * 128),
            f"{layer}self_attn.q_norm": (128,),
            f"{layer}self_attn.k_norm": (128,),
            f"{layer}mlp.gate_proj": (FEED, TEXT),
            f"{layer}mlp.up_proj": (FEED, TEXT),
            f"{layer}mlp.down_proj": (TEXT, FEED),
            f"{layer}input_layernorm": (TEXT,),
            f"{layer}post_attention_layernorm": (TEXT,),
        }
    return {f"{name}.weight": shape for name, shape in found.items()}


def vae_decoder() -> Shapes:
    found: Shapes = {}

    def conv(name: str, n_in: int, n_out: int, side: int = 3) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in, side, side), (n_out,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    def residual(name: str, n_in: int, n_out: int) -> None:
        norm(f"{name}.norm1", n_in)
        conv(f"{name}.conv1", n_in, n_out)
        norm(f"{name}.norm2", n_out)
        conv(f"{name}.conv2", n_out, n_out)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    width = 4 * CHANNELS
    conv("decoder.conv_in", LATENT, width)
    for part in ("block_1", "block_2"):
        residual(f"decoder.mid.{part}", width, width)
    norm("decoder.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"decoder.mid.attn_1.{part}", width, width, 1)
    for level, times in ((3, 4), (2, 4), (1, 2), (0, 1)):
        for block in range(3):
            residual(f"decoder.up.{level}.block.{block}", width, CHANNELS * times)
            width = CHANNELS * times
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    conv("post_quant_conv", LATENT, LATENT, 1)
    return found


def vae_encoder() -> Shapes:
    """The library has its width fixed: 34 million parameters, 69 MB."""
    found: Shapes = {}

    def conv(name: str, n_in: int, n_out: int, side: int = 3) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in, side, side), (n_out,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    def residual(name: str, n_in: int, n_out: int) -> None:
        norm(f"{name}.norm1", n_in)
        conv(f"{name}.conv1", n_in, n_out)
        norm(f"{name}.norm2", n_out)
        conv(f"{name}.conv2", n_out, n_out)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    width = 128
    conv("encoder.conv_in", 3, width)
    for level, times in enumerate((1, 2, 4, 4)):
        for block in range(2):
            residual(f"encoder.down.{level}.block.{block}", width, 128 * times)
            width = 128 * times
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    for part in ("block_1", "block_2"):
        residual(f"encoder.mid.{part}", width, width)
    norm("encoder.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"encoder.mid.attn_1.{part}", width, width, 1)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * LATENT)
    conv("quant_conv", 2 * LATENT, 2 * LATENT, 1)
    return found


def lora_shapes(hidden: int = HIDDEN, rank: int = 4) -> Shapes:
    """Of a LoRA for the transformer, or for one of another width."""
    found: Shapes = {}
    for layer, n_in, n_out in (
        ("double_blocks.0.img_attn.qkv", hidden, 3 * hidden),
        ("double_blocks.0.img_mlp.0", hidden, 6 * hidden),
        ("single_blocks.0.linear1", hidden, 9 * hidden),
        ("single_blocks.0.linear2", 4 * hidden, hidden),
    ):
        found[f"diffusion_model.{layer}.lora_A.weight"] = (rank, n_in)
        found[f"diffusion_model.{layer}.lora_B.weight"] = (n_out, rank)
    return found


def tensors(shapes: Shapes, seed: int = 0) -> Tensors:
    """Noise of a sane scale; norms are ones and biases zeros."""
    made: Tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            made[name] = np.full(shape, value, np.float16)
            continue
        scale = 1.0 if "embed" in name else 1.0 / math.sqrt(math.prod(shape[1:]))
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())])
        made[name] = (noise.standard_normal(shape, np.float32) * scale).astype(np.float16)
    return made


def write(file: Path, named: Mapping[str, NDArray[np.float16]]) -> Path:
    """A safetensors file."""
    header, at = {}, 0
    for name, values in named.items():
        end = at + values.nbytes
        header[name] = {"dtype": "F16", "shape": list(values.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    data = [values.tobytes() for values in named.values()]
    file.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))
    return file


def prefixed(prefix: str, named: Tensors) -> Tensors:
    return {prefix + name: values for name, values in named.items()}


@functools.cache
def parts(seed: int = 0) -> dict[str, Tensors]:
    """The options' names of the parts of a model, and their tensors."""
    shapes = {"diffusion_model": transformer(), "llm": text_encoder(), "vae": vae_decoder()}
    return {part: tensors(shape, seed) for part, shape in shapes.items()}


def whole(seed: int = 0) -> Tensors:
    prefixes = {"diffusion_model": DIT, "llm": LLM, "vae": VAE}
    return {
        name: values
        for part, named in parts(seed).items()
        for name, values in prefixed(prefixes[part], named).items()
    }


@functools.cache
def klein(seed: int = 0) -> Path:
    """A whole model in one safetensors file; to be read, not changed."""
    return write(_home() / f"klein-{seed}.safetensors", whole(seed))


@functools.cache
def klein_with_encoder() -> Path:
    """The same model, whose VAE reads pictures too: 87 MB."""
    encoder = prefixed(VAE, tensors(vae_encoder()))
    return write(_home() / "klein-with-encoder.safetensors", whole() | encoder)


@functools.cache
def lora(seed: int = 0) -> Path:
    """A LoRA for the model, in one safetensors file; to be read, not changed."""
    return write(_home() / f"lora-{seed}.safetensors", tensors(lora_shapes(), seed))


@functools.cache
def klein_parts() -> Path:
    """The directory of the same model in three files, named as the options are."""
    folder = _home() / "parts"
    folder.mkdir()
    for part, named in parts().items():
        write(folder / f"{part}.safetensors", named)
    return folder


@functools.cache
def klein_gguf(wtype: str = "q8_0") -> Path:
    """The same model, quantised by the library into a GGUF."""
    file = _home() / f"klein-{wtype}.gguf"
    code = (
        "import sys, stable_diffusion_cpp as sd; source, target, kind = sys.argv[1:]; "
        "types = sd.stable_diffusion.GGML_TYPE_MAP; "
        "done = sd.convert(source.encode(), b'', target.encode(), int(types[kind]), b'', True); "
        "sys.exit(not done)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(klein()), str(file), wtype],
        check=True, timeout=60, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return file


@functools.cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="tiny-sdcpp-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home
