from __future__ import annotations

import json
from pathlib import Path

import pytest

from farm.config import SOCKET_PATH_LIMIT, load_settings, redact
from farm.errors import InvalidConfig
from farm.service import s3_options

SECRETS = {
    "FARM_DATABASE_URL": "postgresql+psycopg://me:s3cret-db@host/farm?sslpassword=s3cret-q",
    "FARM_BROKER_URL": "redis://:s3cret-redis@host:6379/0",
    "FARM_S3_ACCESS_KEY": "s3cret-access",
    "FARM_S3_SECRET_KEY": "s3cret-key",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in os.environ:
        if name.startswith("FARM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def test_flags_over_environment_over_file_over_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_settings().bundle_max == 1024
    (tmp_path / "farm.toml").write_text("bundle_max = 10\ntick_s = 3.0\nmax_failures = 7\n")
    monkeypatch.setenv("FARM_BUNDLE_MAX", "11")
    monkeypatch.setenv("FARM_TICK_S", "2")
    settings = load_settings(bundle_max=12, tick_s=None)
    assert (settings.bundle_max, settings.tick_s, settings.max_failures) == (12, 2.0, 7)


def test_nothing_set_means_one_directory(tmp_path: Path) -> None:
    settings = load_settings()
    home = tmp_path / "data" / "farm"
    assert settings.database == f"sqlite:///{home}/farm.db"
    assert settings.broker == f"redis+socket://{home}/broker.sock"
    assert settings.blobs == f"file://{home}/blobs"


def test_a_socket_s_path_is_short_enough(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    settings = load_settings(home=deep)
    assert len(str(settings.broker_socket)) < SOCKET_PATH_LIMIT
    assert settings.broker_socket != load_settings(home=tmp_path / ("y" * 100)).broker_socket


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bundle_max = 'many'", r"^bundle_max \(FARM_BUNDLE_MAX\): must be a whole number$"),
        ("colour = 1", r"^farm\.toml: no such setting: colour$"),
        ("hub_hosts = 'a'", r"^hub_hosts \(FARM_HUB_HOSTS\): must be a list$"),
        ("spool_max = 'much'", r"^spool_max \(FARM_SPOOL_MAX\): 'much' is no size"),
        ("= nonsense", r"^farm\.toml: "),
        ("a = '\udcff'", r"^farm\.toml: it is not UTF-8 text$"),
    ],
)
def test_wrong_settings_are_named(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "farm.toml").write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidConfig, match=named):
        load_settings()


def test_a_list_in_the_environment_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_HUB_HOSTS", "a.example,b.example")
    with pytest.raises(InvalidConfig, match=r"^FARM_HUB_HOSTS must be a JSON list, such as \["):
        load_settings()


def test_no_secret_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    text = (
        json.dumps(settings.shown()) + repr(settings) + str(settings) + repr(s3_options(settings))
    )
    assert "s3cret" not in text
    assert "me:**********@host/farm" in text
    assert settings.broker == SECRETS["FARM_BROKER_URL"]
    monkeypatch.setenv("FARM_TICK_S", "s3cret-by-mistake")
    with pytest.raises(InvalidConfig) as caught:
        load_settings()
    assert "s3cret" not in caught.value.message


def test_redact() -> None:
    assert redact("redis://:pw@h:6379/0") == "redis://:**********@h:6379/0"
    assert redact("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert redact("redis+socket:///tmp/s") == "redis+socket:///tmp/s"
    assert redact("sqlite:////a@b/c.db?x=pw") == "sqlite:////a@b/c.db?**********"
    assert redact("postgresql://ada@h/db") == "postgresql://ada@h/db"


@pytest.mark.parametrize(
    "url",
    ["rser:pw@h/0", "pw@h", "redis//u:pw@h", "redis://u:a/pw@h", "redis://u:a#pw@h", "redis://u:a@pw@h",
     "redis:///u:pw@h", "http://[u:pw@h", "re dis://u:pw@h"],
)  # fmt: skip
def test_a_password_is_hidden_in_a_url_that_is_none(url: str) -> None:
    assert "pw" not in redact(url)
    assert "@h" in redact(url)


@pytest.mark.parametrize(
    "url",
    ["postgresql://u@h/db?host=/tmp&password=pw@pw", "postgresql://h:5432/db?password=pw@pw",
     "postgresql://h/db?password=pw@pw", "redis://:pw@h/0?x=http://y@z", "redis://u:a?pw@h",
     "u:pw?x@h"],
)  # fmt: skip
def test_a_password_is_hidden_where_an_at_sign_stands_behind_a_question_mark(url: str) -> None:
    assert "pw" not in redact(url)


def test_a_home_that_cannot_be_has_no_catalogue() -> None:
    assert load_settings(home=Path("x" * 5_000)).catalog_path is None
