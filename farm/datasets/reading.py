"""The part of a card that tells how to load the dataset; the tests run what it says."""

from __future__ import annotations

from farm.datasets.about import About
from farm.datasets.formats import first
from farm.datasets.markup import block
from farm.pictures import EXTENSIONS


def reading(about: About) -> str:
    """A block of Python for each format, for a copy of the dataset in a directory."""
    chief = first(about.formats)
    folder = f'folder = "path/to/{about.name}"\n'
    parts = [
        "With `datasets`; `train` is the one split:\n",
        block(f"from datasets import load_dataset\n\n{folder}{_datasets(about, chief)}", "python"),
    ]
    if "webdataset" in about.formats:
        parts += ["As a stream, with `webdataset`:\n", block(folder + _webdataset(about), "python")]
    if "parquet" in about.formats:
        parts += ["The table without its pictures, with `pyarrow`:\n"]
        parts += [block(folder + _PYARROW, "python")]
    if "parquet" in about.formats:
        parts += ["By its Croissant metadata, with `mlcroissant`:\n"]
        parts += [block(folder + _CROISSANT, "python")]
    return "\n".join(parts)


def _datasets(about: About, chief: str) -> str:
    lines = [f'rows = load_dataset(folder, split="train")  # {chief}']
    for form in about.formats:
        if form != chief:
            lines.append(f'rows = load_dataset(folder, data_dir="{form}", split="train")')
    return "\n".join(lines) + "\n"


def _webdataset(about: About) -> str:
    kinds = ";".join(EXTENSIONS[form] for form in about.forms)
    return f"""
import glob

import webdataset

tars = sorted(glob.glob(f"{{folder}}/webdataset/*.tar"))
rows = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
for picture, told in rows.to_tuple("{kinds}", "json"):
    print(picture.size, told["prompt"])
""".lstrip()


_PYARROW = """
import pyarrow.dataset

table = pyarrow.dataset.dataset(f"{folder}/parquet").to_table(columns=["row", "prompt", "seed"])
""".lstrip()

_CROISSANT = """
import mlcroissant

dataset = mlcroissant.Dataset(f"{folder}/croissant.json")
for row in dataset.records("parquet"):
    print(row["parquet/image"], row["parquet/prompt"])
""".lstrip()
