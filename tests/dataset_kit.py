"""Small samples with hard prompts, whole datasets of them, and the field's readers kept offline."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm.datasets.about import About, CardSection, ModelAbout
from farm.datasets.card import card
from farm.datasets.croissant import FileAbout, croissant
from farm.datasets.formats import FORMATS, Written, open_writer
from farm.datasets.sample import Sample

SIDE = 16
COLUMNS: dict[str, type] = {"style": str, "score": float, "liked": bool, "take": int}
PROMPTS = (
    "赤い円 on a Ñandú 🟥",
    "two\nlines,\ttabbed",
    "she said \"hi\" \\ 'so' | # a `b` <c> {d}, [e](f)",
    "x " * 4_000,
    "---\nlicense: mit\n---",
)
ABOUT = About(
    name="shapes-nightly",
    section=CardSection(licence="CC-BY-4.0", authors=("A. Painter",), tags=("shapes",)),
    models=(ModelAbout("shapes", "apache-2.0", engines=("diffusers",)),),
    formats=FORMATS,
    columns=COLUMNS,
    rows=24,
    counts={"accepted": 24, "rejected": 0},
    shards=3,
    sizes={f"{SIDE}x{SIDE}": 24},
    recipe='name = "shapes-nightly"\n',
    published="2026-11-30",
)


def pixels(row: int) -> NDArray[np.uint8]:
    return np.random.default_rng(row).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def prompt(row: int) -> str:
    return PROMPTS[row % len(PROMPTS)]


def sample(row: int, form: str = "png", **params: Any) -> Sample:
    """WebP is lossless here, so only JPEG differs from `pixels`."""
    out = io.BytesIO()
    how = {"lossless": True} if form == "webp" else {}
    Image.fromarray(pixels(row)).save(out, form, **how)
    told = {
        "model": "shapes", "prompt": prompt(row), "seed": 2**62 + row, "width": SIDE,
        "height": SIDE, "steps": 4, "guidance_scale": 4, "format": form, **params,
    }  # fmt: skip
    own = {"style": f"s{row}", "score": row / 4, "liked": row % 2 == 0, "take": row}
    data = out.getvalue()
    return Sample(row, data, form, hashlib.sha256(data).hexdigest(), told, own)


def shard(folder: Path, name: str, samples: Iterable[Sample], *forms: str) -> list[Written]:
    """A shard in these formats, or in all, in one pass."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(open_writer(form, name, folder, COLUMNS))
            for form in forms or FORMATS
        ]
        for one in samples:
            for writer in writers:
                writer.add(one)
        return [file for writer in writers for file in writer.close()]


def dataset(folder: Path, about: About = ABOUT, samples: Iterable[Sample] = ()) -> None:
    """A whole one, in shards of eight rows, with all that lies beside them."""
    given = list(samples) or [sample(row) for row in range(about.rows)]
    files = []
    for number in range(0, len(given), 8):
        name = f"train-{number // 8:05d}"
        files += shard(folder, name, given[number : number + 8], *about.formats)
    found = {
        form: [file.size for file in files if file.key.startswith(form)] for form in about.formats
    }
    about = replace(about, files={form: (len(all_), sum(all_)) for form, all_ in found.items()})
    told = croissant(about, [FileAbout(file.key, file.sha256, file.size) for file in files])
    (folder / "README.md").write_text(card(about), "utf-8")
    (folder / "croissant.json").write_text(json.dumps(told), "utf-8")
    (folder / "manifest.json").write_text(json.dumps({"files": [file.key for file in files]}))
    (folder / "recipe.toml").write_text(about.recipe)
    (folder / "stats").mkdir()
    (folder / "stats/00000.json").write_text(json.dumps({"rows": 8}))


def members(tars: Sequence[Path]) -> list[dict[str, Any]]:
    """What the library `webdataset` gives, decoded; it leaves files to the garbage collector."""
    import webdataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
        rows = list(found.decode("pil"))
        del found
        gc.collect()
    return rows


def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset(..., split="train")`, without a network, caching below tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    cache = tmp_path / "cache" / hashlib.sha256(repr((args, kwargs)).encode()).hexdigest()[:8]
    return datasets.load_dataset(*args, **kwargs, split="train", cache_dir=str(cache))
