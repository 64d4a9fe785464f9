"""The search for secrets in the repository finds what it should, and does not tell it."""

from __future__ import annotations

import secrets
import string
from pathlib import Path

import pytest

from farm.store import schema, tokens
from farm.store.db import Database
from tests import leaked


def drawn(n: int, of: str = string.ascii_letters) -> str:
    return "".join(secrets.choice(of) for _ in range(n))


def a_token(tmp_path: Path) -> str:
    db = Database(f"sqlite:///{tmp_path / 'farm.db'}")
    schema.upgrade(db)
    with db.write() as connection:
        text = tokens.create(connection, "t", ("read",))[1]
    db.close()
    return text


def test_each_kind_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaked, "ROOT", tmp_path)
    upper = string.ascii_uppercase + string.digits
    texts = [
        a_token(tmp_path), f"hf_{drawn(34)}", f"AKIA{drawn(16, upper)}", f"ghp_{drawn(36)}",
        f"sk-{drawn(48)}", "-----BEGIN " + "PRIVATE KEY-----",
    ]  # fmt: skip
    file = tmp_path / "a.py"
    for text in texts:
        file.write_text(f"x = 1\ny = '{text}'\n", encoding="utf-8")
        [told] = leaked.leaks([file])
        assert told.startswith("a.py:2: a")
        assert text not in told
    file.write_text("farm_0123456789ab_short hf_x AKIA sk-x farm_secret\n", encoding="utf-8")
    assert leaked.leaks([file]) == []


def test_there_is_none_here() -> None:
    files = leaked.tracked()
    assert len(files) > 100
    assert leaked.leaks(files) == []
