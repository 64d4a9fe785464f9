"""Who is told of a run's end: a real server hears the webhook, a real process the command."""

from __future__ import annotations

import base64
import json
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from farm import notify as room
from farm.notify import NotifySection, notify

SECRET = "whsec_" + base64.b64encode(b"a secret of twenty-four bytes").decode()
SUMMARY = {"name": "nightly", "batch": "0f9k2m4x7q3w5t8b", "ok": True, "counts": {"accepted": 3}}


class Hook(ThreadingHTTPServer):
    """Answers with `answers` one after the other, the last of them for ever; `heard`: all posts."""

    daemon_threads = True

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers) or [204]
        self.heard: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/told"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.heard.append((self.path, dict(self.headers), body))
        answers = self.server.answers
        self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(2**40))  # which nobody waits for
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(hook: Hook) -> Iterator[Hook]:
    thread = threading.Thread(target=hook.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hook
    finally:
        hook.shutdown()
        thread.join()
        hook.server_close()


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    monkeypatch.setattr(room, "PAUSES_S", (0.01, 0.01))


def section(**fields: Any) -> NotifySection:
    return NotifySection.model_validate(fields)


def test_a_webhook_is_signed_so_that_the_librarys_own_verifier_takes_it() -> None:
    with served(Hook()) as hook:
        assert notify(section(webhook=f"{hook.url}?a=b", secret_env="HOOK_SECRET"), SUMMARY) == []
    [(path, headers, body)] = hook.heard
    assert path == "/told?a=b"
    assert headers["Content-Type"] == "application/json"
    assert Webhook(SECRET).verify(body, headers) == SUMMARY
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"nightly", b"weekly"), headers)


def test_what_fails_for_a_while_is_sent_again_under_the_same_id() -> None:
    with served(Hook(500, 503, 200)) as hook:
        assert notify(section(webhook=hook.url, secret_env="HOOK_SECRET"), SUMMARY) == []
    assert len(hook.heard) == 3
    assert len({headers["webhook-id"] for _, headers, _ in hook.heard}) == 1
    for _, headers, body in hook.heard:
        Webhook(SECRET).verify(body, headers)


@pytest.mark.parametrize(
    ("status", "times", "told"),
    [
        (500, 3, "answers 500"), (404, 1, "answers 404"), (429, 3, "answers 429"),
        (302, 1, "redirects are not followed"), (307, 1, "redirects are not followed"),
    ],
)  # fmt: skip
def test_what_is_sent_again_and_what_not(status: int, times: int, told: str) -> None:
    with served(Hook(status)) as hook:
        [trouble] = notify(section(webhook=hook.url), SUMMARY)
    assert told in trouble
    assert [path for path, _, _ in hook.heard] == ["/told"] * times


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        told = notify(section(webhook=f"http://{place}/"), SUMMARY)
    assert told == [f"http://{place} does not answer: Connection refused"]


def test_a_host_that_answers_byte_after_byte_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "POST_S", 0.2)
    monkeypatch.setattr(room, "PAUSES_S", ())

    def drip(server: socket.socket) -> None:
        peer, _ = server.accept()
        with peer, suppress(OSError):
            while True:
                peer.sendall(b"x")
                time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        [trouble] = notify(section(webhook=url), SUMMARY)
        thread.join()
    assert "does not answer" in trouble


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "[::ffff:169.254.169.254]", "[fd00:ec2::254]", "[fe80::1]",
        "100.100.100.200", "[64:ff9b::a9fe:a9fe]", "2852039166", "0xa9fea9fe", "0.0.0.0",
        "[2002:a9fe:a9fe::1]", "[::]", "168.63.129.16", "[::ffff:168.63.129.16]",
        "[64:ff9b::168.63.129.16]", "[::169.254.169.254]", "[64:ff9b:1::a9fe:a9fe]",
        "[64:ff9b:1:a9fe:a9:fe00::]", "[64:ff9b:1:a9:fe:a9fe::]", "[64:ff9b:1:0:a9:fea9:fe00:0]",
    ],
)  # fmt: skip
def test_where_clouds_tell_a_machines_credentials_no_webhook_goes(address: str) -> None:
    [told] = notify(section(webhook=f"http://{address}/latest/meta-data"), SUMMARY)
    assert "where no webhook may go" in told


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1",
     "64:ff9b:1:a00:0:100::", "2002:a00:1::1", "fd12::1"],
)  # fmt: skip
def test_a_host_of_ones_own_may_be_told(address: str) -> None:
    assert not room._is_refused(address)


def test_a_name_that_leads_there_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]
    monkeypatch.setattr(room.socket, "getaddrinfo", lambda *_, **__: there)
    [told] = notify(section(webhook="http://hooks.example.org/"), SUMMARY)
    assert told == "hooks.example.org leads to 169.254.169.254, where no webhook may go"


@pytest.mark.parametrize("answer", [204, 500, 302])
def test_no_secret_is_told(answer: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(Hook(answer)) as hook:
        url = hook.url.replace("http://", "http://ann:pa%73s@") + "/T0K3N?key=K3Y"
        told = notify(section(webhook=url, secret_env="HOOK_SECRET"), SUMMARY)
    who = base64.b64encode(b"ann:pass").decode()
    assert hook.heard[0][1]["Authorization"] == f"Basic {who}"
    said = caplog.text + "".join(told)
    assert not any(word in said for word in ("pa%73s", "pass", "T0K3N", "K3Y", who, SECRET[6:]))


@pytest.mark.parametrize("held", ["", "whsec_", "whsec_!", "whsec_a"])
def test_without_a_secret_nothing_is_sent(held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", held)
    with served(Hook()) as hook:
        told = notify(section(webhook=hook.url, secret_env="HOOK_SECRET"), SUMMARY)
    assert told == ["HOOK_SECRET holds no whsec_ secret; the webhook is not sent"]
    assert hook.heard == []


def _certificate(folder: Path) -> Path:
    """A self-signed one for 127.0.0.1, with its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    begins = datetime.now(UTC) - timedelta(days=1)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    whole = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, begins, begins + timedelta(9))
        .add_extension(names, False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "hook.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + whole.public_bytes(serialization.Encoding.PEM))
    return path


def test_over_tls_the_certificate_must_be_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = _certificate(tmp_path)
    hook = Hook()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    hook.socket = context.wrap_socket(hook.socket, server_side=True)
    monkeypatch.setattr(hook, "handle_error", lambda *_: None)  # who hangs up is no news
    url = hook.url.replace("http", "https")
    with served(hook):
        [told] = notify(section(webhook=url), SUMMARY)
        assert told == f"https://127.0.0.1:{hook.server_port}: self-signed certificate"
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert notify(section(webhook=url), SUMMARY) == []
    assert len(hook.heard) == 1


# ---- a command


def _command(code: str, *args: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *args)


def test_a_command_gets_the_summary_and_its_words_as_they_are(tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    told = tmp_path / "$(told) *"
    assert notify(section(command=_command(code, str(told))), SUMMARY) == []
    assert json.loads(told.read_text()) == SUMMARY


def test_the_end_of_what_a_command_says_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    code = "import sys; print('x' * 100_000, 'the end'); sys.exit(3)"
    [told] = notify(section(command=_command(code)), SUMMARY)
    assert "ended with exit code 3" in told
    assert told.endswith("the end")
    assert "the end" in caplog.text
    assert len(caplog.text) < 3_000


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(room, "COMMAND_S", 0.5)
    code = "import subprocess; subprocess.run(['sleep', '60'])"
    [told] = notify(section(command=_command(code)), SUMMARY)
    assert "took more than" in told


def test_a_command_that_is_none() -> None:
    [told] = notify(section(command=("/nowhere/told",)), SUMMARY)
    assert told == "/nowhere/told does not start: No such file or directory"


# ---- what a person writes


def test_one_that_fails_does_not_stop_the_other_one() -> None:
    with served(Hook(404)) as hook:
        told = notify(section(webhook=hook.url, command=_command("raise SystemExit(1)")), SUMMARY)
    assert len(told) == 2


@pytest.mark.parametrize(
    ("on", "summary", "times"),
    [("always", SUMMARY, 1), ("failure", SUMMARY, 0), ("failure", {"ok": False}, 1),
     ("failure", {"error": {"code": "ERR_X"}}, 1)],
)  # fmt: skip
def test_when_it_is_told(on: str, summary: dict[str, Any], times: int) -> None:
    with served(Hook()) as hook:
        assert notify(section(webhook=hook.url, on=on), summary) == []
    assert len(hook.heard) == times


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"webhook": "ftp://h/"}, "expected an http or https URL"),
        ({"webhook": "https://"}, "expected an http or https URL"),
        ({"webhook": "https://h:99999/"}, "expected an http or https URL"),
        ({"webhook": "https://h/\r\nX: y"}, "expected an http or https URL"),
        ({"webhook": "https://u:hidden@h/ "}, "expected an http or https URL"),
        ({"webhook": "https://h/", "secret_env": "whsec_hidden"}, "name a variable"),
        ({"webhook": "https://h/", "secret_env": "a b"}, "secret_env"),
        ({"secret_env": "A"}, "goes with webhook"),
        ({"command": []}, "command"),
        ({"command": "rm -rf"}, "command"),
        ({"command": ["a\0b"]}, "NUL"),
        ({"on": "never"}, "on"),
        ({"url": "x"}, "url"),
    ],
)  # fmt: skip
def test_what_a_section_cannot_be(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told) as raised:
        section(**fields)
    assert "hidden" not in str(raised.value)
