"""Who may do what over HTTP: tokens, scopes, owners, and a server without tokens."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from farm.cli import main
from farm.errors import InvalidConfig
from farm.http.run import bind, is_open
from farm.store import tokens
from tests.farm_kit import until
from tests.http_kit import HttpKit, serving


@pytest.fixture
def kit(tmp_path: Path, redis_url: str, database_url: str) -> Iterator[HttpKit]:
    with serving(tmp_path, redis_url, database_url=database_url, guarded=True) as kit:
        yield kit


class As:
    """Asks with a token, and tells the status."""

    def __init__(self, kit: HttpKit, token: str | None) -> None:
        self.kit, self.headers = kit, {"Authorization": f"Bearer {token}"} if token else {}

    def get(self, path: str) -> int:
        return self.kit.http.get(path, headers=self.headers).status_code

    def post(self, path: str) -> int:
        return self.kit.http.post(path, headers=self.headers).status_code

    def submit(self, **about: object) -> int:
        body = {"prompts": ["a"], **about}
        return self.kit.http.post("/v1/batches", json=body, headers=self.headers).status_code


def test_without_a_good_token_nothing_is_told(kit: HttpKit) -> None:
    good = kit.token("read")
    expired = kit.token("admin", valid_s=-1)
    revoked = kit.token("admin")
    with kit.farm.db.write() as connection:
        tokens.revoke(connection, revoked.split("_")[1])
    wrong = good[:-1] + ("a" if good[-1] != "a" else "b")
    other_id = f"farm_{expired.split('_')[1]}_{good.split('_', 2)[2]}"
    for bad in (None, "x", "farm__", wrong, expired, revoked, other_id, "farm_é_ü"[:5]):
        for path in ("/v1/batches", "/v1/models", "/v1/workers", "/metrics"):
            assert As(kit, bad).get(path) == 401
        assert As(kit, bad).submit() == 401
    answer = kit.http.get("/v1/batches")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == "ERR_ACCESS_DENIED"
    basic = kit.http.get("/v1/batches", headers={"Authorization": f"Basic {good}"})
    assert basic.status_code == 401
    assert As(kit, good).get("/v1/batches") == 200
    assert kit.http.get("/healthz").status_code == kit.http.get("/readyz").status_code == 200


def test_scopes(kit: HttpKit) -> None:
    reader, submitter = As(kit, kit.token("read")), As(kit, kit.token("submit"))
    admin = As(kit, kit.token("admin"))
    assert (reader.submit(), submitter.submit(), admin.submit()) == (403, 201, 201)
    assert (reader.get("/metrics"), submitter.get("/v1/batches")) == (200, 403)
    batch = kit.farm.batches()[0].id
    for action in ("pause", "resume", "redrive", "cancel"):
        path = f"/v1/batches/{batch}/{action}"
        assert (reader.post(path), submitter.post(path), admin.post(path)) == (403, 403, 200)


def test_an_owner_sees_and_changes_its_own_alone(kit: HttpKit) -> None:
    ada = As(kit, kit.token("read", "submit", owner="ada"))
    bob = As(kit, kit.token("read", "submit", owner="bob"))
    assert (ada.submit(), ada.submit(owner="ada"), ada.submit(owner="bob")) == (201, 201, 403)
    assert bob.submit() == 201
    theirs, *mine = kit.farm.batches()
    assert (theirs.owner, {batch.owner for batch in mine}) == ("bob", {"ada"})
    listed = kit.http.get("/v1/batches", headers=ada.headers).json()["batches"]
    assert [batch["id"] for batch in listed] == [batch.id for batch in mine]
    looks = ("", "/jobs", "/results", "/events")
    for path in [f"/v1/batches/{theirs.id}{end}" for end in looks] + [
        f"/v1/jobs/{theirs.id}/0", f"/v1/jobs/{theirs.id}/0/picture",
    ]:  # fmt: skip
        assert ada.get(path) == 404
    for action in ("pause", "resume", "redrive", "cancel"):
        assert ada.post(f"/v1/batches/{theirs.id}/{action}") == 404
        assert ada.post(f"/v1/batches/{mine[0].id}/{action}") == 200
    assert ada.post(f"/v1/jobs/{theirs.id}/0/cancel") == 404
    assert ada.get("/v1/batches?owner=bob") == 403
    assert ada.get("/v1/workers") == ada.get("/metrics") == 403
    assert kit.farm.status(theirs.id).counts["queued"] == 1


def test_an_idempotency_key_is_its_owners(kit: HttpKit) -> None:
    made = set()
    for owner in ("ada", "bob"):
        headers = {"Idempotency-Key": "k"} | As(kit, kit.token("submit", owner=owner)).headers
        answer = kit.http.post("/v1/batches", json={"prompts": ["a"]}, headers=headers)
        made.add(answer.json()["id"])
    assert len(made) == 2


def test_no_secret_is_stored_or_logged(kit: HttpKit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = kit.token("read")
    secret = token.split("_", 2)[2]
    assert As(kit, token).get("/v1/batches") == 200
    assert As(kit, token + "x").get("/v1/batches") == 401
    assert secret not in caplog.text
    with kit.farm.db.read() as connection:
        rows = connection.execute(tokens.tokens.select()).all()
    assert secret not in str(rows)
    assert len(secret) == 43  # 256 bits


def test_the_last_use_is_noted(kit: HttpKit) -> None:
    token = kit.token("read")
    assert As(kit, token).get("/v1/batches") == 200

    def is_noted() -> bool:
        with kit.farm.db.read() as connection:
            [used] = [t for t in tokens.known(connection) if t.id == token.split("_")[1]]
        return used.last_used_at is not None

    until(is_noted, 30)  # after the answer, so as not to hold it up


def test_without_tokens_only_this_machine_is_served(tmp_path: Path, redis_url: str) -> None:
    with serving(tmp_path, redis_url) as kit:
        assert kit.http.get("/v1/batches").status_code == 200
        page = {"Origin": "https://evil.example"}
        assert kit.http.get("/v1/batches", headers=page).status_code == 403
        rebound = {"Host": "evil.example:8000"}
        assert kit.http.get("/v1/batches", headers=rebound).status_code == 403
        headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
        sent = kit.http.post("/v1/batches", content=b"a\n", headers=headers)
        assert sent.status_code == 403
        own = {"Origin": "http://localhost:3000"}
        assert kit.http.get("/v1/batches", headers=own).status_code == 200
        assert is_open(kit.farm, "127.0.0.1")
        assert is_open(kit.farm, "::1")
        for host in ("0.0.0.0", "::", "farm.internal"):
            with pytest.raises(InvalidConfig, match="farm token create"):
                is_open(kit.farm, host)
        kit.token("read")
        assert not is_open(kit.farm, "127.0.0.1")
        assert not is_open(kit.farm, "0.0.0.0")


def test_a_port_that_is_taken_is_told() -> None:
    with bind("127.0.0.1", 0) as place:
        place.listen()
        assert place.proto == socket.IPPROTO_TCP, "else each answer waits 40 ms (Nagle)"
        with pytest.raises(InvalidConfig, match="cannot listen"):
            bind("127.0.0.1", place.getsockname()[1])


def test_the_token_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FARM_HOME", str(tmp_path))
    assert main(["token", "create", "laptop", "--scope", "submit", "--days", "3", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["token"].startswith(f"farm_{made['id']}_")
    assert main(["token", "list", "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)
    assert (listed["name"], listed["scopes"]) == ("laptop", ["submit"])
    assert listed["expires_at"] - listed["created_at"] == pytest.approx(3 * 86_400, abs=1)
    assert main(["token", "list"]) == 0
    assert made["token"] not in capsys.readouterr().out
    assert main(["token", "revoke", made["id"]]) == 0
    assert main(["token", "revoke", made["id"]]) == 2
    assert "no token" in capsys.readouterr().err
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "farm token create" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "\ud800", "none.invalid"], ids=ascii)
def test_a_host_that_is_none_is_told(host: str) -> None:
    with pytest.raises(InvalidConfig):
        bind(host, 0)
