"""Where pictures live: one Protocol, a local directory (`local.py`) and S3 (`s3.py`).

Importing this package loads neither; `open_blobs` loads the one that the URL asks for.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote

from farm.errors import BlobNotFound, InvalidConfig, StorageUnavailable

MAX_KEY = 512
MAX_SEGMENT = 255
MAX_EXPIRES_S = 7 * 24 * 3600
PIECE = 2**20  # bytes of an object that are in memory at once when it is streamed
FILES_AT_ONCE = 4  # that a store puts side by side
README = "README.md"  # the card of a dataset, whose name is not ours to choose

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._=-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")  # files of no name on Windows
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")


@dataclass(frozen=True)
class BlobStat:
    """One stored object: key, size in bytes, and when it was written, by the store's clock."""

    key: str
    size: int
    modified: float = field(default=0.0, compare=False)  # seconds since 1970


class BlobStore(Protocol):
    """Whole objects under strict keys (see `check_key`); safe to share between threads.

    Every method raises ValueError for a bad key and StorageUnavailable when the store cannot be
    reached, refuses, or is full.
    """

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data` whole or not at all; an older object under the key is replaced."""

    def put_files(self, files: Iterable[tuple[str, Path, str]]) -> None:
        """As `put`, from files of any size: key, path and content type of each.

        They are read piece by piece and stay where they are; those in `aside` may be moved. What
        fails may leave some stored. Raises OSError where a file cannot be read.
        """

    def aside(self) -> AbstractContextManager[Path]:
        """A new directory for files that are to be put, gone at the end with what is left in it."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises BlobNotFound."""

    def chunks(self, key: str, size: int = PIECE) -> Iterator[bytes]:
        """The object in pieces of `size` bytes, the last one shorter; none of an empty object.

        The first piece asked for raises BlobNotFound; each may raise StorageUnavailable, and then
        what came before is no whole object.
        """

    def stat(self, key: str) -> BlobStat | None:
        """Key and size, or None where there is no such object."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine. Every key is checked before any is deleted."""

    def list(self, prefix: str = "") -> Iterator[BlobStat]:
        """The objects whose key starts with `prefix`, sorted by key, read as they are asked for."""

    def url(self, key: str, expires_s: int = 3600) -> str:
        """A link to read the object: presigned for `expires_s` seconds on S3, file:// locally.

        Does not look whether the object exists. Raises ValueError unless 1 <= expires_s <= 7 days.
        """

    def check(self) -> None:
        """Write, read back and delete a small probe.

        Raises StorageUnavailable with a sentence that says what to do.
        """

    def close(self) -> None:
        """Release connections; the store must not be used afterwards."""


@dataclass(frozen=True)
class S3Options:
    """How to reach an S3 server; timeouts in seconds, `ca_bundle` a path to a PEM file.

    Without keys, boto3 looks in its own places (environment, profile, instance role).
    Raises InvalidConfig for half a pair of keys, an endpoint URL that is none or holds keys, or a
    CA bundle that is not there.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    path_style: bool = True
    checksums: Literal["when_required", "when_supported"] = "when_required"
    connect_timeout_s: float = 5
    read_timeout_s: float = 30
    max_connections: int = 32
    ca_bundle: str | None = None

    def __post_init__(self) -> None:
        if bool(self.access_key) != bool(self.secret_key):
            raise InvalidConfig("S3 needs both an access key and a secret key, or neither of them")
        endpoint = self.endpoint_url
        if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
            raise InvalidConfig("the S3 endpoint URL must start with http:// or https://")
        if endpoint is not None and "@" in endpoint:
            raise InvalidConfig("the S3 endpoint URL must hold no keys; set them apart from it")
        if self.ca_bundle is not None and not Path(self.ca_bundle).is_file():
            raise InvalidConfig(f"there is no CA bundle {self.ca_bundle}")


def check_key(key: str) -> str:
    """Return `key` if it is one that every store can hold, else raise ValueError.

    Segments of `a-z 0-9 . _ = -` that start with a letter or digit, joined by `/`: at most 512
    characters in all and 255 a segment, no trailing dot, no device name of Windows. The last one
    may be `README.md`.
    """
    if not isinstance(key, str) or not key or len(key) > MAX_KEY:
        raise ValueError(f"a blob key has 1 to {MAX_KEY} characters: {str(key)[:80]!r}")
    segments = key.split("/")
    for segment in segments[:-1] if segments[-1] == README else segments:
        if not _SEGMENT.fullmatch(segment) or segment.endswith("."):
            raise ValueError(f"bad blob key {key[:80]!r}: the segment {segment[:80]!r}")
        if len(segment) > MAX_SEGMENT or _DEVICE.fullmatch(segment):
            raise ValueError(f"bad blob key {key[:80]!r}: no file may be named {segment[:80]!r}")
    return key


def is_key(key: str) -> bool:
    """Whether `check_key` lets it pass."""
    try:
        check_key(key)
    except ValueError:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """Return `prefix` if a valid key can start with it, else raise ValueError; "" is every key."""
    if prefix and not is_key(prefix + "x"):
        check_key(prefix)
    return prefix


def check_expiry(expires_s: int) -> int:
    """Return `expires_s` (seconds) if S3 can sign a link for so long, else raise ValueError."""
    if not 1 <= expires_s <= MAX_EXPIRES_S:
        raise ValueError(f"a link lives from 1 to {MAX_EXPIRES_S} seconds, not {expires_s}")
    return expires_s


def probe(store: BlobStore, place: str) -> None:
    """What `check` does: put, get and delete one small object. Raises StorageUnavailable."""
    key = f"farm-probe/{uuid.uuid4().hex}"
    data = key.encode()
    store.put(key, data, "text/plain")
    try:
        found = store.get(key)
    except BlobNotFound as exc:
        raise StorageUnavailable(
            f"{place} took an object and lost it at once: is it one store, or several behind "
            f"one address?"
        ) from exc
    finally:
        store.delete([key])
    if found != data:
        raise StorageUnavailable(f"{place} gave back other bytes than were written: do not use it")


def open_blobs(url: str, *, s3: S3Options | None = None) -> BlobStore:
    """The store behind `file:///abs/dir`, a plain directory path, or `s3://bucket[/prefix]`.

    Touches neither disk nor network: call `check()` for that. Raises InvalidConfig for a URL that
    it cannot read.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "s3":
        from farm.blobs.s3 import S3Blobs

        bucket, prefix = _bucket_and_prefix(rest)
        return S3Blobs(bucket, prefix, s3 or S3Options())
    if separator and scheme != "file":
        raise InvalidConfig(f"blob stores are file:///dir or s3://bucket, not {scheme[:20]}://")
    from farm.blobs.local import LocalBlobs

    return LocalBlobs(_directory(url))


def _directory(url: str) -> Path:
    if not url.startswith("file://"):
        path = Path(url).expanduser()
        if not url or "\0" in url:
            raise InvalidConfig("the blob directory's path is empty or holds a NUL")
        return path.absolute()
    path = Path(unquote(url.removeprefix("file://").removeprefix("localhost")))
    if not path.is_absolute() or "\0" in str(path):
        raise InvalidConfig("a file:// blob URL needs an absolute path: file:///srv/pictures")
    return path


def _bucket_and_prefix(rest: str) -> tuple[str, str]:
    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidConfig("an S3 blob URL is s3://bucket or s3://bucket/prefix, without keys")
    prefix = prefix.strip("/")
    try:
        return bucket, check_key(prefix) if prefix else ""
    except ValueError as exc:
        raise InvalidConfig(f"the prefix of the S3 blob URL: {exc}") from None
