"""The card as the Hub and people read it, and the Croissant metadata as mlcroissant does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError

from farm.datasets import markup
from farm.datasets.card import CardSection, ModelAbout, card
from farm.datasets.croissant import CONTEXT, citation, croissant
from tests.dataset_kit import ABOUT, PROMPTS, dataset, load, pixels, prompt, sample

HOSTILE = "--- `x` [a](b) <script> # | \"q\": 'it' {{y}} *b* \\ & $z$ 🟥"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def head(text: str) -> Any:
    _, told, _ = text.split("---\n", 2)
    return yaml.safe_load(told)


def shown(text: str) -> str:
    """The text that a reader sees, by a parser of Markdown; marks are not among it."""
    parts = [child for token in MARKDOWN.parse(text) for child in token.children or ()]
    assert {part.type for part in parts} <= {"text", "softbreak", "text_special"}
    return "".join("\n" if part.type == "softbreak" else part.content for part in parts)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=60))
def test_any_text_stays_what_it_is(text: str) -> None:
    assert yaml.safe_load(markup.yaml({"a": [text, {"b": text}]})) == {"a": [text, {"b": text}]}
    line = markup.one_line(text)
    assert shown(line) == " ".join(text.split())
    assert {token.type for token in MARKDOWN.parse(line)} <= {
        "paragraph_open", "inline", "paragraph_close"
    }  # fmt: skip


@pytest.mark.parametrize("text", [*PROMPTS, HOSTILE, "1. a", "- a", "====", "a\n===", "+ b", "> c"])
def test_marks_of_blocks_are_text_too(text: str) -> None:
    told = shown(markup.plain(text))
    assert told.split() == text.split()
    fence = markup.block(f"{text}\n````\n{text}", "toml").split("\n")[0]
    assert fence == "`````toml"


def test_the_head_is_what_the_hub_wants() -> None:
    section = CardSection(licence="Apache-2.0", title=HOSTILE, language=("en",), tags=("a-b",))
    told = head(card(replace(ABOUT, section=section, rows=23_456)))
    assert told["license"] == "apache-2.0"
    assert told["pretty_name"] == HOSTILE
    assert told["task_categories"] == ["text-to-image"]
    assert told["size_categories"] == ["10K<n<100K"]
    assert told["tags"] == ["synthetic", "ai-generated", "renderfarm", "a-b"]
    assert told["configs"] == [
        {
            "config_name": "parquet",
            "data_files": [{"split": "train", "path": "parquet/*.parquet"}],
            "default": True,
        }
    ]
    own = CardSection(licence="House-Licence-1", licence_url="https://example.org/licence")
    told = head(card(replace(ABOUT, section=own, rows=999)))
    assert told["license"] == "other"
    assert told["license_name"] == "house-licence-1"
    assert told["license_link"] == "https://example.org/licence"
    assert told["size_categories"] == ["n<1K"]


def test_the_terms_of_each_model_are_told_and_nothing_breaks_the_card() -> None:
    models = (
        ModelAbout(
            "sdxl", "openrail++", "https://example.org/l", terms=f"no harm\n\n# {HOSTILE}",
            attribution="by Someone", engines=("diffusers",),
        ),
        ModelAbout("felt", "mit"),
    )  # fmt: skip
    section = CardSection(licence="mit", title=HOSTILE, description=f"one\n\n# two\n{HOSTILE}")
    recipe = 'name = "x"\n```\n# not a heading\n'
    about = replace(ABOUT, models=models, section=section, recipe=recipe, signed=True)
    text = card(about)
    assert text == card(about)
    tokens = MARKDOWN.parse(text.split("---\n", 2)[2])
    titles = [after.content for one, after in pairwise(tokens) if one.type == "heading_open"]
    assert titles[1:] == [
        "What is in it", "How to load it", "What a row tells", "How it was made", "The AI mark",
        "Licence", "The recipe",
    ]  # fmt: skip
    assert not [token for token in tokens if token.type == "html_block"]
    assert recipe in [token.content for token in tokens if token.type == "fence"]
    seen = "\n".join(
        child.content for token in tokens for child in token.children or () if child.content
    )
    for word in ("openrail++", "https://example.org/l", "no harm", "by Someone", "felt", "C2PA"):
        assert word in seen
    assert seen.count("<script>") == 3, "as text"
    assert "All pictures of this dataset are machine-made" in seen


@pytest.mark.parametrize(
    "bad",
    [
        {"licence": "a b"},
        {"licence": ""},
        {"title": "two\nlines"},
        {"title": "\x1b[31m"},
        {"homepage": "javascript:alert(1)"},
        {"licence_url": "https://a.b/<x>"},
        {"tags": ("a: b\n",)},
        {"language": ("english!",)},
        {"colour": "red"},
    ],
)
def test_a_section_refuses_what_does_not_fit(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CardSection(**{"licence": "mit", **bad})


def test_a_citation_is_made_where_there_is_none() -> None:
    section = CardSection(licence="mit", title="A {set}", authors=("A", "B"))
    assert citation(replace(ABOUT, section=section)) == (
        "@misc{shapes-nightly,\n  title = {A (set)},\n  author = {A and B},\n  year = {2026},\n}"
    )


@pytest.mark.parametrize("form", ["webdataset", "imagefolder"])
def test_a_directory_of_one_format_loads(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are missing in the first rows have a type by the card."""
    samples = [sample(row) for row in range(16)]
    samples = [replace(one, columns={"score": 0.5} if one.row > 8 else {}) for one in samples]
    place = tmp_path / "own"
    place.mkdir()
    dataset(place, replace(ABOUT, formats=(form,), rows=16), samples)
    found = load(tmp_path, monkeypatch, str(place))
    rows = [one["json"] if form == "webdataset" else one for one in found]
    scores = {one["row"]: one["score"] for one in rows}
    assert scores == {row: 0.5 if row > 8 else None for row in range(16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("datasets") / ABOUT.name
    found.mkdir()
    dataset(found)
    return found


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the readers look for their caches when they are imported."""
    names = ("HOME", "HF_HOME", "CROISSANT_CACHE")
    caches = {name: str(tmp_path / "caches" / name.lower()) for name in names}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **caches, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_what_the_card_says_of_loading_works(folder: Path, tmp_path: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    assert all('folder = "path/to/shapes-nightly"' in block for block in blocks)
    code = "\n".join(blocks).replace('"path/to/shapes-nightly"', repr(str(folder)))
    counted = code.replace("rows = load_dataset(", "rows = counted(")
    first = (
        "def counted(*a, **k):\n"
        "    rows = load_dataset(*a, **k)\n"
        "    print('rows', rows.num_rows)\n"
        "    return rows\n"
    )
    told = run(f"{first}{counted}\nprint('table', table.num_rows)", tmp_path).stdout
    assert told.count("rows 24") == 3
    assert told.count("(16, 16) ") == 24, "the members of the tars"
    assert "table 24" in told
    assert told.count("PIL.PngImagePlugin") == 24, "by the Croissant metadata"


def test_mlcroissant_finds_no_fault_and_reads_the_rows(folder: Path, tmp_path: Path) -> None:
    code = f"""
import hashlib, json
import mlcroissant
dataset = mlcroissant.Dataset({str(folder / "croissant.json")!r})
issues = dataset.metadata.ctx.issues
found = {{"faults": [*issues.errors, *issues.warnings]}}
for name in ("parquet", "imagefolder", "webdataset", "webdataset-prompts"):
    found[name] = {{}}
    for row in dataset.records(name):
        image, words = row.get(name + "/image"), row.get(name + "/prompt") or row.get(
            "webdataset-prompts/prompt")
        found[name][int(row[name + "/row"])] = (
            image and hashlib.sha256(image.tobytes()).hexdigest(), words and words.decode())
print(json.dumps(found))
"""
    done = run(code, tmp_path)
    assert "WARNING" not in done.stderr
    found = json.loads(done.stdout)
    assert found.pop("faults") == []
    image = {row: hashlib.sha256(pixels(row).tobytes()).hexdigest() for row in range(24)}
    both = {str(row): [image[row], prompt(row)] for row in range(24)}
    assert found["parquet"] == found["imagefolder"] == both
    assert found["webdataset"] == {row: [picture, None] for row, (picture, _) in both.items()}
    assert found["webdataset-prompts"] == {row: [None, text] for row, (_, text) in both.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib", "ignore:ConjunctiveGraph")
@pytest.mark.parametrize(
    ("licence", "url", "told"),
    [
        ("cc0-1.0", "", "https://spdx.org/licenses/CC0-1.0.html"),
        ("APACHE-2.0", "", "https://spdx.org/licenses/Apache-2.0.html"),
        ("odbl", "", "https://spdx.org/licenses/ODbL-1.0.html"),
        ("cc0-1.0", "https://example.org/cc0", "https://example.org/cc0"),
        ("house", "https://example.org/house", "https://example.org/house"),
        ("openrail++", "", {"@type": "sc:CreativeWork", "name": "openrail++"}),
    ],
)
def test_a_licence_is_linked_where_its_page_is(licence: str, url: str, told: Any) -> None:
    import mlcroissant

    section = CardSection(licence=licence, licence_url=url)
    made = croissant(replace(ABOUT, section=section), [])
    assert made["license"] == told
    read = mlcroissant.Dataset(jsonld=made)
    assert not read.metadata.ctx.issues.errors
    assert read.metadata.to_json()["license"] == told


def test_the_metadata_tells_licence_marks_and_files(folder: Path) -> None:
    told = json.loads((folder / "croissant.json").read_text("utf-8"))
    assert told["license"] == "https://spdx.org/licenses/CC-BY-4.0.html"
    assert "machine-made, by AI models: shapes (apache-2.0)" in told["rai:dataCollection"]
    files = {one["@id"]: one for one in told["distribution"] if one["@type"] == "cr:FileObject"}
    assert len(files) == 9, "three shards of each; pictures by themselves are told as a set"
    for key, one in files.items():
        data = (folder / key).read_bytes()
        assert one["sha256"] == hashlib.sha256(data).hexdigest()
        assert one["contentSize"] == f"{len(data)} B"
    assert croissant(replace(ABOUT, formats=()), [])["@context"] == CONTEXT
