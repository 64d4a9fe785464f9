"""The part of a card that tells how to load the dataset; the tests run what it says."""

from __future__ import annotations

from farm.datasets.about import About
from farm.datasets.formats import first
from farm.datasets.markup import block
from farm.pictures import EXTENSIONS


def reading(about: About) -> str:
    """A block of Python for each reader, for a copy of the dataset in a directory."""
    chief = first(about.formats)
    told = {"With `datasets`; `train` is the one split:": _datasets(about, chief)}
    if "webdataset" in about.formats:
        told["As a stream, with `webdataset`:"] = _webdataset(about)
    if "parquet" in about.formats:
        told["The table without its pictures, with `pyarrow`:"] = _PYARROW
        told["By its Croissant metadata, with `mlcroissant`:"] = _CROISSANT
    parts = []
    for words, lines in told.items():
        python = lines.strip().replace("FOLDER", f'folder = "path/to/{about.name}"')
        parts += [f"{words}\n", block(python, "python")]
    return "\n".join(parts)


def _datasets(about: About, chief: str) -> str:
    lines = ["from datasets import load_dataset\n\nFOLDER"]
    lines.append(f'rows = load_dataset(folder, split="train")  # {chief}')
    for form in about.formats:
        if form != chief:
            lines.append(f'rows = load_dataset(folder, data_dir="{form}", split="train")')
    if "imagefolder" in about.formats:
        lines[-1] += '\nrows = rows.sort("row")  # shards of an image folder come in any order'
    return "\n".join(lines)


def _webdataset(about: About) -> str:
    kinds = ";".join(EXTENSIONS[form] for form in about.forms)
    return f"""
import glob

import webdataset

FOLDER
tars = sorted(glob.glob(f"{{folder}}/webdataset/*.tar"))
rows = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
for picture, told in rows.to_tuple("{kinds}", "json"):
    print(picture.size, told["prompt"])
"""


_PYARROW = """
import pyarrow.dataset

FOLDER
table = pyarrow.dataset.dataset(f"{folder}/parquet").to_table(columns=["row", "prompt", "seed"])
"""

_CROISSANT = """
import mlcroissant

FOLDER
dataset = mlcroissant.Dataset(f"{folder}/croissant.json")
for row in dataset.records("parquet"):
    print(row["parquet/image"], row["parquet/prompt"])
"""
