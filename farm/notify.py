"""Tells the world that a run is over: a signed webhook, a command, or both.

    [notify]
    webhook = "https://hooks.example.org/farm"
    secret_env = "FARM_HOOK_SECRET"     # names the variable that holds whsec_...
    command = ["/usr/local/bin/told"]   # gets the summary as JSON on standard input
    on = "failure"                      # or "always"

The webhook follows Standard Webhooks (https://www.standardwebhooks.com): headers webhook-id,
webhook-timestamp, webhook-signature. The host may be a private one, for a person named it; the
addresses where clouds answer with a machine's own credentials are never asked. Redirects are not
followed and no proxy is used. A webhook's URL may be a secret, so only its host is ever told.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

log = logging.getLogger(__name__)
PAUSES_S = (1.0, 4.0, 16.0)  # before the same is sent again
CONNECT_S = 10.0
POST_S = 30.0  # of one request, once connected
COMMAND_S = 120.0
_TAIL = 2000  # characters of a command's output
_MAY_PASS = (408, 425, 429)
_NEVER = tuple(
    ip_network(net)
    for net in (
        "169.254.0.0/16", "fe80::/10",  # link-local, and metadata of most clouds
        "fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32", "192.0.0.192/32",
        "168.63.129.16/32",
        "0.0.0.0/32", "::/128", "224.0.0.0/4", "ff00::/8", "255.255.255.255/32",
    )
)  # fmt: skip
_HOLD_IPV4 = (ip_network("64:ff9b::/96"), ip_network("::/96"))
_NAT64_LOCAL = ip_network("64:ff9b:1::/48")


def _http_url(url: str) -> str:
    """The message must not hold the URL: it may be a secret."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or any(char <= " " or char in '\\"' for char in url):
        raise ValueError("expected an http or https URL, such as https://hooks.example.org/farm")
    return url


def _no_secret(name: str) -> str:
    if name.startswith("whsec_"):
        raise ValueError("name a variable of the environment; the secret itself is no part of it")
    return name


class NotifySection(BaseModel):
    """Who is told of a run's end, and when.

    `on` failure: when a row failed, none was accepted, or the run itself failed. A command is no
    shell's: a list of words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    webhook: Annotated[str, Field(max_length=2048), AfterValidator(_http_url)] | None = None
    secret_env: (
        Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,127}$"), AfterValidator(_no_secret)] | None
    ) = None
    command: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] | None = None
    on: Literal["always", "failure"] = "always"

    @model_validator(mode="after")
    def _whole(self) -> NotifySection:
        if self.secret_env and not self.webhook:
            raise ValueError("secret_env goes with webhook")
        if any("\0" in word for word in self.command or ()):
            raise ValueError("command: no word may hold a NUL")
        return self


class _NotTold(Exception):
    """Why somebody could not be told. `again`: it may go better later."""

    def __init__(self, why: str, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


def notify(section: NotifySection, summary: Mapping[str, Any]) -> list[str]:
    """Tell what `section` names of a run's summary; what failed, a sentence each. Never raises.

    A run whose `ok` is not true has failed. Takes some minutes at worst.
    """
    if section.on == "failure" and summary.get("ok") is True:
        return []
    troubles = []
    body = json.dumps(dict(summary), default=str)
    tells: list[Callable[[], None]] = []
    if section.webhook:
        hook, secret_env = urlsplit(section.webhook), section.secret_env
        tells.append(lambda: _patiently(hook, secret_env, body))
    if section.command:
        command = section.command
        tells.append(lambda: _run(command, body))
    for tell in tells:
        try:
            tell()
        except Exception as error:
            odd = "" if isinstance(error, _NotTold) else f"{type(error).__name__} in notifying"
            troubles.append(odd or str(error))  # the text of another one may hold the URL
    return troubles


# ---- webhook


def _patiently(hook: SplitResult, secret_env: str | None, body: str) -> None:
    pauses = iter(PAUSES_S)
    while True:
        try:
            return _post(hook, _headers(secret_env, body), body)
        except _NotTold as error:
            if not error.again or (pause_s := next(pauses, None)) is None:
                raise
        time.sleep(pause_s)


def _headers(secret_env: str | None, body: str) -> dict[str, str]:
    """The id is the content's, so whoever is told the same twice can see that."""
    message = f"msg_{hashlib.sha256(body.encode()).hexdigest()[:32]}"
    moment = datetime.now(UTC)
    headers = {"webhook-id": message, "webhook-timestamp": str(int(moment.timestamp()))}
    if secret_env is None:
        return headers
    if not find_spec("standardwebhooks"):
        raise _NotTold("signing a webhook needs: pip install 'renderfarm[dataset]'")
    from standardwebhooks.webhooks import Webhook

    secret = os.environ.get(secret_env, "")
    try:
        signature = Webhook(secret).sign(message, moment, body)
    except Exception:
        raise _NotTold(f"{secret_env} holds no whsec_ secret; the webhook is not sent") from None
    return headers | {"webhook-signature": signature}


def _post(hook: SplitResult, headers: dict[str, str], body: str) -> None:
    """Raises _NotTold unless the answer is a success; of the answer only the status is read."""
    host, port = hook.hostname or "", hook.port or {"http": 80, "https": 443}[hook.scheme]
    shown = f"{hook.scheme}://{host}:{port}"
    path = (hook.path or "/") + (f"?{hook.query}" if hook.query else "")
    headers = {"Content-Type": "application/json", "User-Agent": "renderfarm"} | headers
    if hook.username is not None:
        who = f"{unquote(hook.username)}:{unquote(hook.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(who.encode()).decode()}"
    secure = hook.scheme == "https"
    try:
        with _connect(host, port, secure) as sock:
            ends = threading.Timer(POST_S, _end, [sock])
            ends.start()
            try:
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                connection = (HTTPSConnection if secure else HTTPConnection)(host, port)
                connection.sock = sock
                connection.request("POST", path, body.encode(), headers)
                with connection.getresponse() as answer:
                    status = answer.status
            finally:
                ends.cancel()
    except ssl.SSLCertVerificationError as error:
        raise _NotTold(f"{shown}: {error.verify_message}") from None
    except (OSError, HTTPException) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise _NotTold(f"{shown} does not answer: {why}", again=True) from None
    if 300 <= status < 400:
        raise _NotTold(f"{shown} answers {status}: redirects are not followed; name where it leads")
    if not 200 <= status < 300:
        raise _NotTold(f"{shown} answers {status}", again=status >= 500 or status in _MAY_PASS)


def _end(sock: socket.socket) -> None:
    """Whoever reads it sees its end; an SSLSocket's own shutdown would drop its keys under him."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _connect(host: str, port: int, secure: bool) -> socket.socket:
    """To an address that was looked at: what the name says later is of no account."""
    fault: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        if _is_refused(str(address[0])):
            raise _NotTold(f"{host} leads to {address[0]}, where no webhook may go")
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(CONNECT_S)
        try:
            sock.connect(address)
            return _secured(sock, host) if secure else sock
        except OSError as error:
            sock.close()
            fault = error
    raise fault or OSError("no address")


def _secured(sock: socket.socket, host: str) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


def _is_refused(address: str) -> bool:
    """Whether an IP address is one where a cloud's metadata, or nobody in particular, answers."""
    found = ip_address(address.partition("%")[0])
    inner = _inner(found) if isinstance(found, IPv6Address) else []
    return any(one in net for one in (found, *inner) for net in _NEVER)


def _inner(found: IPv6Address) -> list[IPv4Address]:
    """The IPv4 addresses that it may lead to."""
    told, number = [found.ipv4_mapped, found.sixtofour], int(found)
    if any(found in net for net in _HOLD_IPV4):
        told.append(IPv4Address(number & 0xFFFFFFFF))
    if found in _NAT64_LOCAL:  # prefixes in it have 48, 56, 64 or 96 bits: RFC 6052, 2.2
        high, low = number >> 64, number & (1 << 64) - 1
        split = (high << 16 | low >> 40 & 0xFFFF, high << 24 | low >> 32 & 0xFFFFFF, low >> 24, low)
        told += [IPv4Address(one & 0xFFFFFFFF) for one in split if one & 0xFFFFFFFF]
    return [one for one in told if one]


# ---- command


def _run(command: tuple[str, ...], body: str) -> None:
    """Raises _NotTold unless it ends well in time."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(body.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise _NotTold(f"{command[0]} does not start: {error.strerror}") from None
        try:
            code: int | None = process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        said.seek(max(0, said.seek(0, os.SEEK_END) - _TAIL))
        tail = said.read().decode(errors="replace").strip()
    if tail:
        log.info("%s says: %s", command[0], tail)
    if code is None:
        raise _NotTold(f"{command[0]} took more than {COMMAND_S:.0f} s and was ended")
    if code:
        raise _NotTold(f"{command[0]} ended with exit code {code}: {tail[-300:]}")
