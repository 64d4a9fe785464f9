"""The checks of a row's texts at submit: a chain of links, each small, in this order.

1. normalise: to NFC (https://www.unicode.org/reports/tr15/), so that equal texts are equal bytes.
2. refuse_controls: no character that no model reads.
3. Blocklist: no term that the farm's operator blocked.

The ranges of numbers are checked by JobSpec, then by the model (ModelEntry.refusals); a rendered
picture is checked by the engine (ERR_BLOCKED) and its child (ERR_BAD_IMAGE).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from farm.errors import InvalidConfig, InvalidPrompt, RowError
from farm.spec import EXPECTED, MAX_PROMPT_CHARS, refuse_controls

TEXTS = ("prompt", "negative_prompt")  # guidance near 0 renders the negative prompt: both count
Link = Callable[[str], str]
"""A text, perhaps changed. Raises ValueError, which says what is wrong with it."""


def normalise(text: str) -> str:
    """The text in NFC."""
    return unicodedata.normalize("NFC", text)


class Blocklist:
    """Refuses texts that hold a blocked term as whole words, in whatever case or width.

    Both are compared in a form like NFKC_Casefold (https://www.unicode.org/reports/tr31/): no
    invisible characters, `_` as a space, any run of white space as one. A term that begins or ends
    in a script written without spaces counts there also within a longer word.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self.terms = sorted({folded(term) for term in terms} - {""})

    @classmethod
    def read(cls, path: Path) -> Blocklist:
        """From a UTF-8 text file: a term a line, lines that begin with # are comments.

        Raises InvalidConfig when it cannot be read or holds no term.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InvalidConfig(f"blocklist {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InvalidConfig(f"blocklist {path}: byte {error.start + 1} is no UTF-8") from None
        found = cls(line for line in lines if not line.lstrip().startswith("#"))
        if not found.terms:
            raise InvalidConfig(f"blocklist {path}: there is no term in it")
        return found

    def __call__(self, text: str) -> str:
        whole = folded(text)
        if any(_stands_in(term, whole) for term in self.terms):
            raise ValueError("a term that this farm blocks")  # which one is not told
        return text


def folded(text: str) -> str:
    """The form of a text that blocked terms are looked for in."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
        text = unicodedata.normalize("NFKC", "".join(c for c in text if not _invisible(c)))
    return re.sub(r"[\s_]+", " ", text.casefold()).strip()


def _invisible(char: str) -> bool:
    variation_selector = "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef"
    return variation_selector or unicodedata.category(char) == "Cf"


def _stands_in(term: str, text: str) -> bool:
    at = text.find(term)
    while at >= 0:
        if not (_within_word(text, at) or _within_word(text, at + len(term))):
            return True
        at = text.find(term, at + 1)
    return False


def _within_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and _joins(text[at - 1]) and _joins(text[at])


# beginnings of characters' names; Korean has spaces, but its endings are glued to the word
_UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "BOPOMOFO", "HIRAGANA", "KATAKANA", "HANGUL", "YI SYLLABLE"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


def _joins(char: str) -> bool:
    """Whether a character makes one word with its neighbour: a letter, mark or digit."""
    if char.isascii():
        return char.isalnum()
    return unicodedata.category(char)[0] in "LMN" and not unicodedata.name(char, "").startswith(
        _UNSPACED
    )


def chain(blocklist: Blocklist | None = None) -> tuple[Link, ...]:
    """The links in their order."""
    return (normalise, refuse_controls, *([blocklist] if blocklist else []))


def check_texts(
    line: int, fields: MutableMapping[str, Any], links: Sequence[Link]
) -> list[RowError]:
    """Pass a row's texts through the chain, in place; what was refused, by field."""
    wrong = []
    for name in TEXTS:
        text = fields.get(name)
        if not isinstance(text, str) or len(text) > MAX_PROMPT_CHARS:
            continue  # JobSpec refuses it
        try:
            for link in links:
                text = link(text)
        except ValueError as error:
            wrong.append(RowError(line, name, str(error), EXPECTED[name], InvalidPrompt.code))
        fields[name] = text
    return wrong
