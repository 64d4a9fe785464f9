"""What models.toml may say of a model for stable-diffusion.cpp, checked before native code sees it.

    [models.klein.engines.sdcpp]
    path = "klein-q8_0.gguf"                 # one file with all parts, or a directory, and then
    [models.klein.engines.sdcpp.options]
    diffusion_model = "flux-2-klein-4b.gguf"  # the parts: beside `path`, or inside it
    llm = "qwen3-4b.gguf"
    vae = "flux2-vae.safetensors"
    wtype = "default"

The library aborts the process on some values that its own lists name (wtype q8_1, i8, f64), so
all that may be said stands here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import InvalidConfig
from farm.weight_files import WTYPES, sha256_of
from workers.engine import EngineConfig

RNGS = {"cuda": "cuda", "std_default": "default"}  # ours -> the library's
PARTS = ("diffusion_model", "vae", "taesd", "clip_l", "clip_g", "t5xxl", "llm")
CHOICES: dict[str, tuple[object, ...]] = {
    "wtype": WTYPES,
    "rng": tuple(RNGS),
    "flash_attn": (False, True),
}
KNOWN = (*PARTS, *CHOICES, "vae_tiling")
OWN_TILES = "0x0"
"""Tiles of the library's own choice."""
LEAST_TILE, MOST_TILE = 16, 512
"""Sides of a VAE tile, in latent pixels (one is 8 or 16 of the picture)."""
SMALL_TILES = f"{LEAST_TILE}x{LEAST_TILE}"


@dataclass(frozen=True)
class SdcppOptions:
    """`files`: the library's name of a part -> its file. `tile`: "WxH" latent pixels, or none.

    `settings`: what else a picture's pixels depend on and is not as by default.
    """

    files: dict[str, Path]
    threads: int
    wtype: str
    rng: str
    flash_attn: bool
    tile: str | None
    settings: dict[str, str]

    def library(self, *, encoder: bool) -> dict[str, Any]:
        """Arguments of stable_diffusion_cpp.StableDiffusion. `encoder`: the VAE has one."""
        return {
            **{f"{part}_path": str(file) for part, file in self.files.items()},
            "n_threads": self.threads,
            "wtype": self.wtype,
            "rng_type": RNGS[self.rng],
            "sampler_rng_type": RNGS[self.rng],
            "flash_attn": self.flash_attn,
            "vae_decode_only": not encoder,
            "lora_apply_mode": "at_runtime",
            "verbose": True,  # else it redirects the process' output, and hides its last words
        }

    def weights_sha256(self) -> str:
        """The file's SHA-256; with several files or settings, that of the lines "SHA256  PART".

        Settings count as lines "VALUE  NAME": other weights' types give other pictures.
        """
        with ThreadPoolExecutor(2) as pool:
            hashes = dict(zip(self.files, pool.map(sha256_of, self.files.values()), strict=True))
        if list(hashes) == ["model"] and not self.settings:
            return hashes["model"]
        lines = [f"{value}  {name}\n" for name, value in (hashes | self.settings).items()]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def options_of(config: EngineConfig) -> SdcppOptions:
    """Raises InvalidConfig, which names the option and what it may be."""
    weights, options = config.weights, config.weights.options
    if weights.repo or weights.url:
        raise _wrong(config, f"reads local files; first: farm models fetch {config.model}")
    for name in ("variant", "dtype"):
        if getattr(weights, name):
            raise _wrong(config, f"has no {name}; options.wtype names the type of the weights")
    if unknown := sorted(set(options) - set(KNOWN)):
        raise _wrong(config, f"has no option {', '.join(unknown)}, it has: {', '.join(KNOWN)}")
    chosen = {name: _choice(config, name) for name in CHOICES}
    tile = _tile(config, options.get("vae_tiling", False))
    told = {**chosen, "vae_tiling": tile}
    defaults = {"wtype": "default", "rng": "cuda", "flash_attn": False, "vae_tiling": None}
    return SdcppOptions(
        files=_files(config, options),
        threads=config.threads or usable_processors(),
        wtype=str(chosen["wtype"]),
        rng=str(chosen["rng"]),
        flash_attn=bool(chosen["flash_attn"]),
        tile=tile,
        settings={name: str(told[name]) for name in defaults if told[name] != defaults[name]},
    )


def usable_processors() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _wrong(config: EngineConfig, what: str) -> InvalidConfig:
    return InvalidConfig(f"model {config.model}: engine sdcpp {what}")


def _choice(config: EngineConfig, name: str) -> object:
    may = CHOICES[name]
    value = config.weights.options.get(name, may[0])
    if isinstance(value, str):
        value = value.strip().lower()
    if type(value) is not type(may[0]) or value not in may:
        known = ", ".join(map(str, may))
        raise _wrong(config, f"option {name}: one of {known}; not {str(value)[:60]!r}")
    return value


def _tile(config: EngineConfig, value: object) -> str | None:
    if value is False:
        return None
    if value is True:
        return OWN_TILES
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", value) if isinstance(value, str) else None
    if not found or not all(LEAST_TILE <= int(side) <= MOST_TILE for side in found.groups()):
        raise _wrong(
            config,
            f'option vae_tiling: true, false or a size such as "32x32", sides from {LEAST_TILE} '
            f"to {MOST_TILE} latent pixels; not {str(value)[:60]!r}",
        )
    return found.group()


def _files(config: EngineConfig, options: Mapping[str, Any]) -> dict[str, Path]:
    """The library's names of the parts and their files, not yet looked at."""
    path = config.weights.path
    if not path:
        raise _wrong(config, "needs path: a checkpoint, or the directory of its parts")
    split = path.is_dir()
    if split and "diffusion_model" not in options:
        raise _wrong(config, f"path: {path} is a directory; name its options.diffusion_model too")
    if not split and "diffusion_model" in options:
        raise _wrong(config, f"with options.diffusion_model needs a directory as path, not {path}")
    files = {} if split else {"model": path}
    folder = path if split else path.parent
    for part in PARTS:
        if part in options:
            name = options[part]
            if not isinstance(name, str) or not name.strip() or "\0" in name:
                raise _wrong(config, f"option {part}: the name of a file; not {str(name)[:60]!r}")
            files[part] = folder / name
    return files
