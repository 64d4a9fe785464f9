"""What an error of S3 means: one sentence that says what to do, and never a secret."""

from __future__ import annotations

from dataclasses import dataclass

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from farm.blobs import S3Options
from farm.errors import BlobNotFound, FarmError, StorageRefused, StorageUnavailable

_CODES = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the blob URL",
    "SignatureDoesNotMatch": "wrong credentials: the secret key does not belong to the access key",
    "InvalidAccessKeyId": "wrong credentials: the server does not know this access key",
    "ExpiredToken": "the credentials have expired: renew them",
    "AccessDenied": "the credentials give no right to do this: grant it, or correct the keys",
    "RequestTimeTooSkewed": "the clocks of this machine and the server differ: set them right",
    "PermanentRedirect": "the bucket is in another region: set FARM_S3_REGION or the endpoint",
    "AuthorizationHeaderMalformed": "the region is not the server's: set FARM_S3_REGION",
    "XMinioStorageFull": "the server's disk is full: free some space there",
    "InsufficientStorage": "the server's disk is full: free some space there",
    "QuotaExceeded": "the quota is used up: delete objects or raise it",
    "SlowDown": "the server asks for fewer requests: try again later",
}
_STATUSES = {
    301: _CODES["PermanentRedirect"],
    401: _CODES["AccessDenied"],
    403: _CODES["AccessDenied"],
    404: _CODES["NoSuchBucket"],
    413: _CODES["QuotaExceeded"],
    429: _CODES["SlowDown"],
    503: "the server is busy or starting: try again later",
    507: _CODES["InsufficientStorage"],
}
_KINDS: tuple[tuple[tuple[type[BotoCoreError], ...], str], ...] = (
    (
        (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError),
        "no credentials: set FARM_S3_ACCESS_KEY and FARM_S3_SECRET_KEY",
    ),
    (
        (boto.SSLError,),
        "the server's TLS certificate is not trusted: set AWS_CA_BUNDLE, or correct the endpoint",
    ),
    (
        (boto.ReadTimeoutError,),
        "the server did not answer in time: is it overloaded or hung?",
    ),
    (
        (boto.ConnectTimeoutError, boto.EndpointConnectionError, boto.ProxyConnectionError),
        "cannot connect: is the server running, and is the endpoint right?",
    ),
    (
        (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError),
        "the connection broke: is the server running?",
    ),
    ((boto.NoRegionError,), "no region: set FARM_S3_REGION"),
)
_REFUSED = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.SSLError,
    boto.NoRegionError,
)
_REFUSED_CODES = ("ExpiredToken", "AuthorizationHeaderMalformed")  # HTTP 400, as much that passes
_REFUSED_STATUSES = (301, 401, 403, 404)


@dataclass(frozen=True)
class Place:
    """Names the bucket and the endpoint in sentences, and knows what must not stand in them."""

    bucket: str
    options: S3Options

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.options.endpoint_url or 'Amazon S3'}"


def status_of(exc: ClientError) -> int:
    """The HTTP status of the reply, 0 where there is none."""
    return exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def fault(action: str, place: Place, exc: BotoCoreError | ClientError) -> FarmError:
    """The farm's error for one of botocore: BlobNotFound, or StorageUnavailable for all others.

    StorageRefused where the server, or this machine's own settings, say no to this process.
    """
    if not isinstance(exc, ClientError):
        meaning = next((text for kinds, text in _KINDS if isinstance(exc, kinds)), None)
        kind = StorageRefused if isinstance(exc, _REFUSED) else StorageUnavailable
        return kind(f"cannot {action} in {place}: {meaning or type(exc).__name__}")
    code = str(exc.response.get("Error", {}).get("Code", ""))
    if code == "NoSuchKey":
        return BlobNotFound(f"there is no such object: cannot {action} in {place}")
    status = status_of(exc)
    meaning = _CODES.get(code) or _STATUSES.get(status) or _words(exc, place.options)
    refused = status in _REFUSED_STATUSES and code != "QuotaExceeded"
    kind = StorageRefused if refused or code in _REFUSED_CODES else StorageUnavailable
    return kind(f"cannot {action} in {place}: {meaning} ({code}, HTTP {status})")


def _words(exc: ClientError, options: S3Options) -> str:
    """The server's own words, without the keys should it have repeated them."""
    words = str(exc.response.get("Error", {}).get("Message") or "the server refused")
    for key in (options.secret_key, options.access_key):
        if key:
            words = words.replace(key, "***")
    return words[:200]
