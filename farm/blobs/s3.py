"""Blobs in a bucket of any S3 server: plain puts, gets, lists and deletes, nothing more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from farm.blobs import (
    FILES_AT_ONCE,
    PIECE,
    BlobStat,
    S3Options,
    check_expiry,
    check_key,
    check_prefix,
    is_key,
    probe,
)
from farm.blobs.aside import aside
from farm.blobs.s3_faults import Place, fault, status_of
from farm.errors import BlobNotFound, InvalidConfig, StorageUnavailable

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_ATTEMPTS = 3  # the first try and two more; botocore waits up to some seconds between
_MULTI_DELETE = 1000  # S3's own limit
_NO_MULTI_DELETE = (400, 405, 411, 501)
_PART = 8 * 2**20  # bytes of a part; boto3 takes larger ones where 10,000 are too few
_PARTS_AT_ONCE = 4


class S3Blobs:
    """The BlobStore of one bucket, under `prefix/` where one is given; one client for all threads.

    A dead server is noticed after at most three connect or read timeouts and short waits between.
    """

    def __init__(self, bucket: str, prefix: str, options: S3Options) -> None:
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._place = Place(bucket, options)
        self._multi_delete = True
        with self._faults("open it"):
            self._client = _client(options)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        name = self._name(key)
        with self._faults(f"write {key}"):
            self._client.put_object(
                Bucket=self.bucket, Key=name, Body=data, ContentType=content_type
            )

    def put_files(self, files: Iterable[tuple[str, Path, str]]) -> None:
        files = list(files)
        for key, _, _ in files:
            check_key(key)
        with ThreadPoolExecutor(FILES_AT_ONCE, "put") as pool:
            list(pool.map(lambda file: self._put_file(*file), files))

    def _put_file(self, key: str, path: Path, content_type: str) -> None:
        name = self._name(key)
        with self._faults(f"write {key}"):
            self._client.upload_file(
                Filename=str(path),
                Bucket=self.bucket,
                Key=name,
                ExtraArgs={"ContentType": content_type},
                Config=TransferConfig(
                    multipart_threshold=_PART,
                    multipart_chunksize=_PART,
                    max_concurrency=_PARTS_AT_ONCE,
                    preferred_transfer_client="classic",
                ),
            )

    @contextmanager
    def aside(self) -> Iterator[Path]:
        with aside(Path(tempfile.gettempdir()), "farm-aside-") as folder:
            yield folder

    def get(self, key: str) -> bytes:
        name = self._name(key)
        with self._faults(f"read {key}"):
            return self._client.get_object(Bucket=self.bucket, Key=name)["Body"].read()

    def chunks(self, key: str, size: int = PIECE) -> Iterator[bytes]:
        return self._chunks(key, self._name(key), size)

    def _chunks(self, key: str, name: str, size: int) -> Iterator[bytes]:
        with self._faults(f"read {key}"):
            body = self._client.get_object(Bucket=self.bucket, Key=name)["Body"]
            with closing(body):
                yield from body.iter_chunks(size)

    def stat(self, key: str) -> BlobStat | None:
        name = self._name(key)
        with self._faults(f"look up {key}"):
            try:
                head = self._client.head_object(Bucket=self.bucket, Key=name)
                return BlobStat(key, head["ContentLength"], head["LastModified"].timestamp())
            except ClientError as exc:
                if status_of(exc) != 404:
                    raise
        return self._stat_by_get(key, name)

    def delete(self, keys: Iterable[str]) -> None:
        names = [self._name(key) for key in keys]
        for start in range(0, len(names), _MULTI_DELETE):
            self._delete_some(names[start : start + _MULTI_DELETE])

    def list(self, prefix: str = "") -> Iterator[BlobStat]:
        check_prefix(prefix)
        return self._pages(prefix)

    def url(self, key: str, expires_s: int = 3600) -> str:
        name = self._name(key)
        with self._faults(f"sign a link to {key}"):
            return self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self.bucket, "Key": name},
                ExpiresIn=check_expiry(expires_s),
            )

    def check(self) -> None:
        probe(self, str(self._place))

    def close(self) -> None:
        self._client.close()

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _stat_by_get(self, key: str, name: str) -> BlobStat | None:
        """A HEAD without an object looks like one without a bucket; the body of a GET tells."""
        try:
            with self._faults(f"look up {key}"):
                found = self._client.get_object(Bucket=self.bucket, Key=name)
                found["Body"].close()
                written = found["LastModified"].timestamp()
                return BlobStat(key, found["ContentLength"], written)
        except BlobNotFound:
            return None

    def _delete_some(self, names: Sequence[str]) -> None:
        if len(names) > 1 and self._multi_delete and self._delete_at_once(names):
            return
        for name in names:
            with self._faults(f"delete {name}"):
                try:
                    self._client.delete_object(Bucket=self.bucket, Key=name)
                except ClientError as exc:
                    if exc.response["Error"].get("Code") not in ("NoSuchKey", "404"):
                        raise

    def _delete_at_once(self, names: Sequence[str]) -> bool:
        """False where the server knows no multi-delete; it is not asked again."""
        with self._faults(f"delete {len(names)} objects"):
            try:
                reply = self._client.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": name} for name in names], "Quiet": True},
                )
            except ClientError as exc:
                if status_of(exc) not in _NO_MULTI_DELETE:
                    raise
                self._multi_delete = False
                return False
        left = [error for error in reply.get("Errors", []) if error.get("Code") != "NoSuchKey"]
        if left:
            raise StorageUnavailable(
                f"{self._place} kept {len(left)} of {len(names)} objects that were to be deleted "
                f"({left[0].get('Code')} for {left[0].get('Key')})"
            )
        return True

    def _pages(self, prefix: str) -> Iterator[BlobStat]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self._prefix + prefix
        )
        with self._faults("list objects"):
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self._prefix)
                    if is_key(key):  # others may keep files of their own in the bucket
                        yield BlobStat(key, item["Size"], item["LastModified"].timestamp())

    @contextmanager
    def _faults(self, action: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError) as exc:
            raise fault(action, self._place, exc) from exc
        except S3UploadFailedError as exc:  # what boto3's upload_file makes of a ClientError
            if not isinstance(cause := exc.__context__, ClientError):
                raise
            raise fault(action, self._place, cause) from cause


def _client(options: S3Options) -> S3Client:
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path" if options.path_style else "virtual"},
        request_checksum_calculation=options.checksums,
        response_checksum_validation=options.checksums,
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.max_connections,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    # A session of its own: boto3's default one may not be shared between threads.
    session = boto3.session.Session(
        aws_access_key_id=options.access_key, aws_secret_access_key=options.secret_key
    )
    region = options.region or session.region_name
    if region is None and options.endpoint_url:
        region = "us-east-1"  # a signature needs one; most servers take any
    try:
        client: S3Client = session.client(
            "s3",
            endpoint_url=options.endpoint_url,
            region_name=region,
            verify=options.ca_bundle,
            config=config,
        )
    except ValueError as exc:
        raise InvalidConfig(f"S3 settings: {exc}") from None
    return client
