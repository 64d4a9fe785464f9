"""Bytes by libcurl: resumed from where they stopped, at a limited rate, hashed while written.

Redirects are followed here and not by libcurl, so that each hop is checked and the token goes to
the hub alone. libcurl: https://curl.se/libcurl/c/curl_easy_setopt.html
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

from farm.errors import EnvironmentFault, FarmError, HubUnavailable, InvalidConfig, UntrustedModel
from farm.models.guard import Hosts, authorities, is_public, origin, proxy_for, refused, shown
from farm.models.part import Flow, Part

MAX_HOPS = 5
MAX_JSON = 64 * 2**20  # bytes
SILENCE_S, CONNECT_S = 60, 20
_CHUNK = 512 * 2**10  # bytes libcurl hands over at once, at most
_PROGRESS = 64 * 2**10  # bytes after which a cut connection does not count as a failure


class Cut(Exception):
    """The connection failed in a way that passes."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s, self.gained = wait_s, 0


class _Answer:
    """Status and headers of one hop; `failure`: what a callback raised."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.failure: Exception | None = None
        self.refused = False
        self.sockets: list[socket.socket] = []

    def header(self, line: bytes) -> None:
        text = line.decode("latin-1").strip()
        if text.startswith("HTTP/"):
            code = text.split(" ")[1:2]
            self.status, self.headers = int(code[0]) if code and code[0].isdigit() else 0, {}
        elif ":" in text:
            name, _, value = text.partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def number(self, name: str) -> int | None:
        value = self.headers.get(name, "")
        return int(value) if value.isdecimal() and len(value) < 18 else None


Take = Callable[[_Answer, bytes], None]


def curl_module() -> Any:
    """pycurl. Raises InvalidConfig with what to install where it is missing."""
    try:
        import pycurl
    except ImportError:
        raise InvalidConfig(
            "fetching models needs pycurl: pip install 'renderfarm[models]'"
        ) from None
    return pycurl


class Client:
    """Asks hubs and mirrors. `token` is sent to the origin of `hub_url` and to no one else."""

    def __init__(
        self, hosts: Hosts, flow: Flow, *, hub_url: str, token: str = "", retries: int = 5
    ) -> None:
        self._hosts, self.flow, self._retries = hosts, flow, retries
        self._token, self._hub = token, origin(hub_url)
        self._curl = curl_module()

    def json(self, url: str) -> Any:
        """The JSON that a URL gives. Raises HubUnavailable or UntrustedModel."""
        body = bytearray()

        def take(answer: _Answer, data: bytes) -> None:
            body.extend(data)
            if len(body) > MAX_JSON:
                raise UntrustedModel(f"{shown(url)}: an answer of more than {MAX_JSON:,} bytes")

        def ask() -> None:
            body.clear()
            self._request(url, [], take)

        self._persist(url, ask)
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise HubUnavailable(f"{shown(url)}: the answer is no JSON") from None

    def size(self, url: str) -> int | None:
        """The length of a URL's content in bytes, where the server tells it (not all do)."""
        try:
            answer = self._request(url, [], lambda answer, data: None, head=True)
        except (Cut, HubUnavailable):
            return None
        return answer.number("content-length") or None

    def download(self, url: str, part: Part, size: int | None) -> None:
        """Complete the part from the byte it has; `size`: what it must come to, if known."""

        def ask() -> None:
            before = part.length
            try:
                self._resume(url, part, size)
            except Cut as cut:
                cut.gained = part.length - before
                raise

        self._persist(url, ask)

    def _persist(self, url: str, ask: Callable[[], None]) -> None:
        """Ask again after failures that pass, `retries` times without progress, ever slower."""
        failures = 0
        while True:
            try:
                ask()
                return
            except Cut as cut:
                failures = 1 if cut.gained >= _PROGRESS else failures + 1
                if failures > self._retries:
                    raise HubUnavailable(
                        f"{shown(url)}: {cut}; what came so far is kept, try again"
                    ) from None
                pause = min(max(cut.wait_s, 0.5 * 2 ** (failures - 1)), 60.0)
                if self.flow.stop.wait(pause):
                    raise EnvironmentFault("stopped") from None

    def _resume(self, url: str, part: Part, size: int | None) -> None:
        if size is not None and part.length > size:
            part.restart()
        if size is not None and part.length == size:
            return
        headers = [f"Range: bytes={part.length}-"] if part.length else []
        if headers and part.etag:
            headers.append(f"If-Range: {part.etag}")
        fresh = [True]  # until the first byte comes

        def take(answer: _Answer, data: bytes) -> None:
            if fresh:
                fresh.clear()
                _begin(url, answer, part, size)
            if size is not None and part.length + len(data) > size:
                raise UntrustedModel(f"{shown(url)}: more bytes than the {size:,} that were told")
            self.flow.take(len(data))
            part.write(data)

        answer = self._request(url, headers, take)
        if answer.status == 416:
            part.restart()
            raise Cut("the server has not the bytes that were asked for")
        if size is not None and part.length < size:
            raise Cut(f"it ended after {part.length:,} of {size:,} bytes")

    def _request(self, url: str, headers: list[str], take: Take, *, head: bool = False) -> _Answer:
        """One GET or HEAD with its redirects; the last answer, 2xx or 416."""
        self._hosts.check(url)
        for _ in range(MAX_HOPS):
            answer = self._hop(url, headers, take, head)
            place = answer.headers.get("location")
            if answer.status not in (301, 302, 303, 307, 308) or not place:
                _check_status(url, answer)
                return answer
            after = urljoin(url, place)
            self._hosts.check(after, before=url)
            url = after
        raise UntrustedModel(f"{shown(url)}: more than {MAX_HOPS} redirects")

    def _hop(self, url: str, headers: list[str], take: Take, head: bool) -> _Answer:
        answer = _Answer()
        curl = self._curl.Curl()
        try:
            self._prepare(curl, url, headers, head)
            curl.setopt(curl.HEADERFUNCTION, answer.header)
            curl.setopt(curl.WRITEFUNCTION, lambda data: _taken(answer, data, take))
            curl.setopt(curl.OPENSOCKETFUNCTION, self._opener(url, answer))
            curl.perform()
        except self._curl.error as error:
            self._failed(url, answer, error)
        finally:
            curl.close()
            for opened in answer.sockets:
                opened.close()
        return answer

    def _prepare(self, curl: Any, url: str, headers: list[str], head: bool) -> None:
        if self._token and origin(url) == self._hub:
            headers = [*headers, f"Authorization: Bearer {self._token}"]
        rate = self.flow.rate
        file, folder = authorities()
        for name, value in {
            "URL": url.encode(),
            "HTTPHEADER": [*headers, "Accept: */*"],
            "USERAGENT": "renderfarm",
            "NOBODY": int(head),
            "NOSIGNAL": 1,
            "PROXY": proxy_for(url),
            "CONNECTTIMEOUT": CONNECT_S,
            "LOW_SPEED_LIMIT": 1,
            "LOW_SPEED_TIME": SILENCE_S,
            "BUFFERSIZE": _CHUNK if rate is None else int(min(_CHUNK, max(1024, rate / 16))),
            "NOPROGRESS": 0,
            "XFERINFOFUNCTION": lambda *_: int(self.flow.stop.is_set()),
            "CAINFO": file,
            "CAPATH": folder,
        }.items():
            if value is not None:
                curl.setopt(getattr(curl, name), value)

    def _opener(self, url: str, answer: _Answer) -> Callable[[int, Any], Any]:
        """Opens sockets for libcurl, none to a private address unless a person configured it."""
        free = self._hosts.configured(url) or bool(proxy_for(url))

        def opened(purpose: int, address: Any) -> Any:
            family, kind, protocol, place = address
            if not free and not is_public(str(place[0])):
                answer.refused = True
                return self._curl.SOCKET_BAD
            answer.sockets.append(socket.socket(family, kind, protocol))  # libcurl has a copy
            return answer.sockets[-1]

        return opened

    def _failed(self, url: str, answer: _Answer, error: Any) -> None:
        """What a failure of libcurl means; returns when only an unread body was cut off."""
        number, text = error.args
        if self.flow.stop.is_set():
            raise EnvironmentFault("stopped") from None
        if answer.failure is not None:
            raise answer.failure from None
        if answer.refused:
            raise refused(url) from None
        if number == self._curl.E_WRITE_ERROR and answer.status >= 300:
            return
        final = ("URL_MALFORMAT", "UNSUPPORTED_PROTOCOL", "PEER_FAILED_VERIFICATION")
        if number in [getattr(self._curl, f"E_{name}") for name in final]:
            raise HubUnavailable(f"{shown(url)}: {text}") from None
        raise Cut(str(text))


def _taken(answer: _Answer, data: bytes, take: Take) -> int:
    """libcurl's write callback: all is taken, or with -1 the transfer ends."""
    try:
        if answer.status in (200, 206):
            take(answer, data)
            return len(data)
        return -1 if answer.status >= 300 else len(data)
    except (FarmError, Cut, OSError) as error:
        answer.failure = error
        return -1


def _begin(url: str, answer: _Answer, part: Part, size: int | None) -> None:
    """Before the first byte is written: is this the rest of what is here, or the whole again."""
    if answer.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("content-range", ""))
        fits = span and int(span[1]) == part.length
        if span and fits and (size is None or span[2] in ("*", str(size))):
            return
        part.restart()
        raise Cut("the server sent other bytes than the rest that was asked for")
    if part.length:
        part.restart()
    told = answer.number("content-length")
    if size is not None and told is not None and told != size:
        raise UntrustedModel(f"{shown(url)}: {told:,} bytes, where {size:,} were told")
    part.keep_etag(answer.headers.get("etag", ""))


def _check_status(url: str, answer: _Answer) -> None:
    """Raises Cut for what passes, HubUnavailable for what does not."""
    status = answer.status
    if status in (200, 206, 416):
        return
    if status in (401, 403):
        raise HubUnavailable(
            f"{shown(url)}: refused ({status}); a gated or private model needs HF_TOKEN of an "
            "account that accepted its licence"
        )
    if status in (404, 410):
        raise HubUnavailable(f"{shown(url)}: not there ({status}); check the name and the revision")
    if status in (408, 425, 429) or status >= 500:
        raise Cut(f"the server answered {status}", float(answer.number("retry-after") or 0))
    raise HubUnavailable(f"{shown(url)}: the server answered {status}")
