"""Who may do what: bearer tokens with scopes, or nobody but this machine without them.

read    look at batches, jobs, pictures, models
submit  queue batches and store input pictures; change batches of the token's owner
admin   both, and change every batch that the token sees

A token with an owner sees that owner's batches alone, and no workers and no metrics.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import BackgroundTasks, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from farm.errors import AccessDenied, DatabaseUnavailable, NotFound
from farm.http.limits import address_of
from farm.http.problems import Refusal
from farm.http.state import Here, State
from farm.store import tokens

_BEARER = HTTPBearer(auto_error=False, description="A token that `farm token create` printed.")
_MARK_EVERY_S = 60


@dataclass(frozen=True)
class Access:
    """Who asks. `owner` None: whose batches it is does not matter. `client`: what limits go by."""

    scopes: frozenset[str]
    owner: str | None = None
    client: str = ""

    def see(self, owner: str, batch_id: str) -> None:
        """Raises NotFound for another owner's batch, as if there were none."""
        if self.owner is not None and owner != self.owner:
            raise NotFound(f"no batch {batch_id!r}; `farm status` lists them")

    def owner_of_new(self, asked: str) -> str:
        """Whose a new batch is. Raises Refusal when that would be another's."""
        if self.owner is not None and asked not in ("", self.owner):
            raise Refusal(403, AccessDenied.code, f"the token submits for {self.owner!r} alone")
        return asked if self.owner is None else self.owner


def authenticate(
    request: Request,
    here: Here,
    background: BackgroundTasks,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
) -> Access:
    """Whoever sent the request. Raises Refusal (401, 403, 429)."""
    address = address_of(request)
    if here.asks_no_token():
        _refuse_strange_pages(request)
        here.pace.take(address)
        return Access(frozenset(tokens.SCOPES), client=address)
    if given is None:
        here.pace.take(address)
        raise _unauthenticated("this farm wants a token: Authorization: Bearer farm_...")
    with here.farm.db.read() as connection:
        token = tokens.check(connection, given.credentials)
    here.pace.take(token.id if token else address)
    if token is None:
        raise _unauthenticated("the token is unknown, expired or revoked")
    if time.time() - (token.last_used_at or 0) > _MARK_EVERY_S:
        background.add_task(_mark_used, here, token.id)
    return Access(frozenset(token.scopes), token.owner or None, token.id)


def paced(request: Request, here: Here) -> None:
    """For what strangers may ask. Raises Refusal (429)."""
    here.pace.take(address_of(request))


def _unauthenticated(why: str) -> Refusal:
    return Refusal(401, AccessDenied.code, why, {"WWW-Authenticate": "Bearer"})


def _mark_used(here: State, token_id: str) -> None:
    with contextlib.suppress(DatabaseUnavailable), here.farm.db.write() as connection:
        tokens.mark_used(connection, token_id)


def _refuse_strange_pages(request: Request) -> None:
    """Without tokens, a web page in this machine's browser must not be able to use the farm.

    Its requests carry its own Origin; after a DNS rebinding, its own name as Host.
    """
    names = [_host_of(f"//{request.headers.get('host', '')}")]
    if origin := request.headers.get("origin"):
        names.append(_host_of(origin))
    if not all(name and is_loopback(name) for name in names):
        raise Refusal(403, AccessDenied.code, "without tokens only this machine is served")


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # half an IPv6 address
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Who = Annotated[Access, Depends(authenticate)]


def _needs(scope: str) -> Callable[[Access], Access]:
    def check(who: Who) -> Access:
        if not who.scopes & {scope, "admin"}:
            raise Refusal(403, AccessDenied.code, f"the token has not the scope {scope}")
        return who

    return check


Reader = Annotated[Access, Depends(_needs("read"))]
Submitter = Annotated[Access, Depends(_needs("submit"))]


def _whole_farm(who: Reader) -> Access:
    if who.owner is not None:
        raise Refusal(403, AccessDenied.code, f"the token sees batches of {who.owner!r} alone")
    return who


def _changes(who: Submitter) -> Access:
    if who.owner is None and "admin" not in who.scopes:
        raise Refusal(403, AccessDenied.code, "the token has no owner and not the scope admin")
    return who


WholeFarm = Annotated[Access, Depends(_whole_farm)]
Changer = Annotated[Access, Depends(_changes)]
