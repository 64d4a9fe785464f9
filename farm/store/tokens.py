"""API tokens: 256 random bits that a client holds; here stands their SHA-256.

A token is written `farm_ID_SECRET`, so that it is found by its primary key and recognised by
scanners of leaked secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, or_, select, update

from farm.errors import NotFound
from farm.store.tables import now, tokens

SCOPES = ("read", "submit", "admin")
_USED_EVERY_S = 60  # `last_used_at` need not be finer


@dataclass(frozen=True)
class ApiToken:
    """What is known of a token. Times in seconds since 1970; `owner` empty: every owner's."""

    id: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _token(row: Row[Any]) -> ApiToken:
    plain = {name: getattr(row, name) for name in ApiToken.__dataclass_fields__}
    return ApiToken(**plain | {"scopes": tuple(row.scopes.split())})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def create(
    connection: Connection,
    name: str,
    scopes: tuple[str, ...],
    *,
    owner: str = "",
    valid_s: float | None = None,
) -> tuple[str, str]:
    """A new token that is valid for `valid_s` seconds: its id, and the text to hand out once."""
    token_id = secrets.token_hex(6)
    text = f"farm_{token_id}_{secrets.token_urlsafe(32)}"
    connection.execute(
        tokens.insert().values(
            id=token_id,
            name=name,
            owner=owner,
            scopes=" ".join(scope for scope in SCOPES if scope in scopes),
            sha256=_digest(text),
            created_at=now(),
            expires_at=None if valid_s is None else now() + valid_s,
        )
    )
    return token_id, text


_VALID = and_(
    tokens.c.revoked_at.is_(None),
    or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > now()),
)


def check(connection: Connection, text: str) -> ApiToken | None:
    """The valid token that `text` is, if it is one; compared in constant time."""
    parts = text.split("_", 2)
    if len(parts) != 3 or parts[0] != "farm" or not parts[1].isalnum() or len(parts[1]) > 16:
        return None
    row = connection.execute(select(tokens).where(_VALID, tokens.c.id == parts[1])).first()
    if row is None or not hmac.compare_digest(row.sha256, _digest(text)):
        return None
    return _token(row)


def is_any(connection: Connection) -> bool:
    """Whether there is a valid token."""
    return connection.execute(select(tokens.c.id).where(_VALID).limit(1)).first() is not None


def mark_used(connection: Connection, token_id: str) -> None:
    """Note that the token was used, at most once a minute."""
    long_ago = or_(tokens.c.last_used_at.is_(None), tokens.c.last_used_at < now() - _USED_EVERY_S)
    connection.execute(
        update(tokens).where(tokens.c.id == token_id, long_ago).values(last_used_at=now())
    )


def revoke(connection: Connection, token_id: str) -> None:
    """The token opens nothing from now on. Raises NotFound."""
    found = connection.execute(
        update(tokens)
        .where(tokens.c.id == token_id, tokens.c.revoked_at.is_(None))
        .values(revoked_at=now())
    )
    if not found.rowcount:
        raise NotFound(f"no token {token_id[:40]!r} that could be revoked; see `farm token list`")


def known(connection: Connection) -> list[ApiToken]:
    """Every token, also expired and revoked ones, the newest first."""
    rows = connection.execute(select(tokens).order_by(tokens.c.created_at.desc(), tokens.c.id))
    return [_token(row) for row in rows]
