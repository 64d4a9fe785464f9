"""Which hosts may be asked for a model, and by what way.

Hosts that a person configured may be private. Where a hub's answer leads to may not: a redirect
to 169.254.169.254 or to a service on this machine is refused. The address itself is looked at
when the connection is opened, so a name that resolves to a private address does not get by.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from farm.errors import UntrustedModel

_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address stands in the last 32 bits
_GLOBAL = ip_network("2000::/3")  # all that IANA has given out of IPv6 (RFC 4291, section 2.4)
_EXAMPLES = ip_network("3fff::/20")  # RFC 9637; Python 3.11 does not know them


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an http or https URL. Raises UntrustedModel for another one."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        port, host = 0, ""
    if not host or not port or any(not "!" <= char <= "~" or char == "\\" for char in url):
        raise UntrustedModel(f"{shown(url)}: only http and https are asked for models")
    return parts.scheme, host, port


def shown(url: str) -> str:
    """A URL for messages: no user, no password, no query (signed URLs hold secrets there)."""
    scheme, _, rest = url.partition("://")
    where = rest.partition("?")[0].partition("#")[0]
    host, slash, path = where.partition("/")
    text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"[:300]
    return text.encode("ascii", "backslashreplace").decode()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, whatever it is wrapped in."""
    try:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is None and (found not in _GLOBAL or found in _EXAMPLES):
            return False  # also IPv4 in the forms of old, and what was site-local
        found = inner or found
    return found.is_global and not found.is_multicast


class Hosts:
    """The hosts that a person configured: by URL, or as `host` or `host:port`."""

    def __init__(self, urls: Iterable[str], hosts: Iterable[str] = ()) -> None:
        self._pairs = {origin(url)[1:] for url in urls}
        self._names = {host.lower() for host in hosts}

    def configured(self, url: str) -> bool:
        _, host, port = origin(url)
        return (host, port) in self._pairs or bool({host, f"{host}:{port}"} & self._names)

    def check(self, url: str, before: str | None = None) -> None:
        """Raises UntrustedModel when `url`, to which `before` redirected, may not be asked."""
        scheme, host, _ = origin(url)
        if before and origin(before)[0] == "https" and scheme != "https":
            raise UntrustedModel(f"{shown(before)} redirects from https to {shown(url)}: refused")
        if before and "@" in urlsplit(url).netloc:
            raise UntrustedModel(f"{shown(before)} redirects with a user name: refused")
        if self.configured(url):
            return
        literal = host.replace(".", "").isdigit() or ":" in host
        if host == "localhost" or host.endswith(".localhost") or (literal and not is_public(host)):
            raise refused(url)


def refused(url: str) -> UntrustedModel:
    """What to say of a URL that leads to a private address."""
    return UntrustedModel(
        f"{shown(url)} leads to a private address: refused; a host of your own can be allowed "
        "by FARM_HUB_HOSTS"
    )


def proxy_for(url: str) -> str:
    """The proxy that the environment names for a URL, or nothing."""
    scheme, host, port = origin(url)
    proxies = getproxies()
    if proxy_bypass(f"{host}:{port}"):
        return ""
    return proxies.get(scheme) or proxies.get("all") or ""


def authorities() -> tuple[str | None, str | None]:
    """File and directory of certificate authorities: the system's, else those of certifi."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None and find_spec("certifi"):
        import certifi

        return certifi.where(), None
    return paths.cafile, paths.capath
