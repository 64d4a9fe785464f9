from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.catalog import load_catalog
from farm.checks import Blocklist, chain, check_texts, folded
from farm.errors import InvalidConfig, RowError
from farm.prompts import Defaults, make_jobs, prompt_rows
from farm.spec import MAX_PROMPT_CHARS, JobSpec, NewJob

BLOCKED = Blocklist(["gore", "Two  Words", "流血", "ナイフ", "피", "straße", "c++", "कम", "🔪"])

TEXTS = (
    "un círculo rojo, ¿y un niño?", "白色背景上的红色圆圈，《画》", "白い背景に赤い円。ガギグ",
    "흰 배경에 빨간 원", "دائرة حمراء على خلفية بيضاء", "👩‍🚀 🔴 on ⬜️, 🏳️‍🌈", "👨‍👩‍👧‍👦 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "a\nb\tc",
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "gore", "a GORE scene", "a ｇｏｒｅ scene", "a go\u200bre scene", "gore, and more",
        "big_gore_art", "画gore画", "two\n words", "TWO_WORDS", "一个流血的人", "そのナイフで",
        "피가 묻은", "in der STRASSE", "in der strasse", "written in c++", "कम है", "a 🔪️!",
        "go\u0301 gore", "forgore gore",
    ],
)  # fmt: skip
def test_blocked_terms_are_found(text: str) -> None:
    with pytest.raises(ValueError, match="blocks"):
        BLOCKED(text)


@pytest.mark.parametrize(
    "text", ["gorey", "begorer", "a gorés", "two", "twowords", "कमल", "血流", "straßen", "", "🗡️"]
)
def test_other_words_are_not(text: str) -> None:
    assert BLOCKED(text) == text


@given(st.text(max_size=40))
def test_a_term_is_found_in_itself_and_between_spaces(term: str) -> None:
    if folded(term):
        blocked = Blocklist([term])
        for text in (term, f"a {term} b", term.swapcase() if term.isascii() else term):
            with pytest.raises(ValueError, match="blocks"):
                blocked(text)


def test_the_file_of_terms(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    file.write_bytes("\ufeff# a comment\r\n  Gore \n\n\tTwo words\n # another\n".encode())
    assert Blocklist.read(file).terms == ["gore", "two words"]


@pytest.mark.parametrize("data", [b"", b"# only a comment\n", b"\xff\xfe", None])
def test_a_file_that_blocks_nothing_is_a_wrong_setting(tmp_path: Path, data: bytes | None) -> None:
    file = tmp_path / "terms.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InvalidConfig, match=r"terms\.txt"):
        Blocklist.read(file)


def specs(*rows: dict[str, object]) -> list[JobSpec | RowError]:
    defaults = Defaults({"model": "shapes"}, checks=chain(BLOCKED))
    found = make_jobs(prompt_rows(rows), defaults, load_catalog())
    return [item.spec if isinstance(item, NewJob) else item for item in found]


def test_a_row_is_refused_by_line_and_field_and_the_term_is_not_told() -> None:
    found = specs(
        {"prompt": "fine"},
        {"prompt": "some Gore", "negative_prompt": "流血", "width": 13},
        {"prompt": "a\0gore"},
        {"prompt": "gore " * MAX_PROMPT_CHARS},
    )
    wrong = [item for item in found if isinstance(item, RowError)]
    assert [(e.line, e.field, e.code) for e in wrong] == [
        (2, "prompt", "ERR_INVALID_PROMPT"),
        (2, "negative_prompt", "ERR_INVALID_PROMPT"),
        (2, "width", "ERR_INVALID_PARAMETER"),
        (3, "prompt", "ERR_INVALID_PROMPT"),
        (4, "prompt", "ERR_INVALID_PROMPT"),
    ]
    assert "gore" not in "".join(str(e).lower() for e in wrong[:4])


def test_texts_are_normalised_and_composed_ones_unchanged() -> None:
    for text in TEXTS:
        (spec,) = specs({"prompt": text, "negative_prompt": text})
        assert isinstance(spec, JobSpec)
        assert spec.prompt == spec.negative_prompt == text
        (again,) = specs({"prompt": unicodedata.normalize("NFD", text)})
        assert isinstance(again, JobSpec)
        assert again.prompt == text


def test_the_links_come_in_their_order() -> None:
    fields = {"prompt": "e\u0301\x07 gore"}
    (error,) = check_texts(7, fields, chain(BLOCKED))
    assert (error.line, error.got) == (7, "control character U+0007")
    assert fields["prompt"].startswith("é"), "normalised before"
