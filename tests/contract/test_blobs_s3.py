"""What only S3 can do wrong: credentials, links, outages, servers that lack a call."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from botocore.exceptions import ClientError

from farm.blobs import BlobStore, open_blobs
from farm.blobs.s3 import S3Blobs
from farm.blobs.s3_faults import Place, fault
from farm.errors import StorageRefused, StorageUnavailable
from tests.servers import S3Server, free_port, poll

OUTAGE_S = 10.0  # how soon a refused connection must be reported, retries included


@pytest.fixture
def store(s3_server: S3Server, s3_bucket: str) -> Iterator[S3Blobs]:
    opened = open_blobs(f"s3://{s3_bucket}", s3=s3_server.options())
    assert isinstance(opened, S3Blobs)
    yield opened
    opened.close()


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=10) as reply:
            return int(reply.status)
    except HTTPError as exc:
        with exc:
            return exc.code


def check_fails(server: S3Server, url: str, **changes: Any) -> str:
    """The sentence of a `check` that must fail; nothing of it may hold the secret."""
    options = server.options(**changes)
    store = open_blobs(url, s3=options)
    with pytest.raises(StorageUnavailable) as caught:
        store.check()
    store.close()
    told = "".join(traceback.format_exception(caught.value)) + repr(options) + repr(store)
    assert options.secret_key not in told
    assert server.secret_key not in told
    return caught.value.message


def test_presigned_link_works_and_cannot_be_changed(store: S3Blobs) -> None:
    store.put("a/b=1.png", b"picture", "image/png")
    url = store.url("a/b=1.png")
    with urlopen(url, timeout=10) as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "image/png"
        assert reply.read() == b"picture"
    signature = url.rpartition("X-Amz-Signature=")[2]
    assert len(signature) == 64
    assert status(url.replace(signature, signature[::-1])) == 403
    assert status(url.replace("b%3D1", "b%3D2").replace("b=1", "b=2")) == 403
    assert status(url.partition("?")[0]) in (400, 403)  # no signature at all


def test_presigned_link_expires(store: S3Blobs) -> None:
    store.put("a", b"picture", "image/png")
    url = store.url("a", expires_s=1)
    poll(lambda: status(url) == 403, "the expiry of a link", 15)


def test_stores_of_one_bucket_do_not_see_each_other(s3_server: S3Server, s3_bucket: str) -> None:
    options = s3_server.options()
    one, two, all_ = (
        open_blobs(f"s3://{s3_bucket}/{prefix}", s3=options) for prefix in ("p/one/", "p/one1", "")
    )
    one.put("a", b"1", "text/plain")
    two.put("a", b"2", "text/plain")
    assert one.get("a") == b"1"
    assert [found.key for found in one.list()] == ["a"]
    assert [found.key for found in all_.list()] == ["p/one/a", "p/one1/a"]
    one.delete(["a"])
    assert two.get("a") == b"2"
    for opened in (one, two, all_):
        opened.close()


def test_foreign_objects_are_not_listed(store: S3Blobs) -> None:
    store._client.put_object(Bucket=store.bucket, Key="Mine Own/../x", Body=b"x")
    store.put("a", b"x", "text/plain")
    assert [found.key for found in store.list()] == ["a"]


def test_checksums_may_be_asked_for(s3_server: S3Server, s3_bucket: str) -> None:
    options = s3_server.options(checksums="when_supported")
    store = open_blobs(f"s3://{s3_bucket}", s3=options)
    store.check()
    store.close()


@pytest.mark.parametrize("code", ["NotImplemented", "MissingContentMD5"])
def test_servers_without_multi_delete(
    store: S3Blobs, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    calls: list[object] = []

    def refuse(**request: object) -> None:
        calls.append(request)
        http = 501 if code == "NotImplemented" else 400
        reply = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": http}}
        raise ClientError(reply, "DeleteObjects")  # type: ignore[arg-type]

    monkeypatch.setattr(store._client, "delete_objects", refuse)
    for _ in range(2):
        for key in ("a", "b"):
            store.put(key, b"x", "text/plain")
        store.delete(["a", "b", "nope"])
        assert list(store.list()) == []
    assert len(calls) == 1


def test_a_partial_multi_delete_is_told(store: S3Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [{"Key": "a", "Code": "AccessDenied"}, {"Key": "b", "Code": "NoSuchKey"}]
    monkeypatch.setattr(store._client, "delete_objects", lambda **request: {"Errors": errors})
    with pytest.raises(StorageUnavailable, match=r"kept 1 of 2.*AccessDenied for a"):
        store.delete(["a", "b"])


def test_check_with_a_wrong_secret(s3_server: S3Server, s3_bucket: str) -> None:
    told = check_fails(s3_server, f"s3://{s3_bucket}", secret_key="another-secret-0123")
    assert "wrong credentials: the secret key" in told
    assert s3_bucket in told
    assert s3_server.endpoint_url in told


def test_check_with_an_unknown_access_key(s3_server: S3Server, s3_bucket: str) -> None:
    told = check_fails(s3_server, f"s3://{s3_bucket}", access_key="test:stranger")
    assert "wrong credentials" in told


def test_a_connection_that_ends_before_the_object(s3_server: S3Server) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            link, _ = server.accept()
            with link:
                link.recv(65536)
                link.sendall(head + b"01234567")

        threading.Thread(target=answer, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        store = open_blobs("s3://bucket", s3=s3_server.options(endpoint_url=endpoint))
        pieces = store.chunks("a", 4)
        assert [next(pieces), next(pieces)] == [b"0123", b"4567"]
        with pytest.raises(StorageUnavailable, match="the connection broke"):
            next(pieces)
        store.close()


def test_a_file_in_parts_is_stored_whole_or_not_at_all(
    s3_server: S3Server, store: S3Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(20 * 2**20))
    store.put("a", b"old", "text/plain")
    upload_part = store._client.upload_part

    def refuse(**request: Any) -> Any:
        if request["PartNumber"] < 3:
            return upload_part(**request)
        reply: Any = {
            "Error": {"Code": "XMinioStorageFull"},
            "ResponseMetadata": {"HTTPStatusCode": 507},
        }
        raise ClientError(reply, "UploadPart")

    monkeypatch.setattr(store._client, "upload_part", refuse)
    with pytest.raises(StorageUnavailable, match="the server's disk is full") as caught:
        store.put_files([("a", tmp_path / "file", "text/plain")])
    assert s3_server.secret_key not in "".join(traceback.format_exception(caught.value))
    assert store.get("a") == b"old"
    left = store._client.list_multipart_uploads(Bucket=store.bucket)
    assert not left.get("Uploads")


def test_check_on_a_missing_bucket(s3_server: S3Server) -> None:
    told = check_fails(s3_server, "s3://no-such-bucket/prefix")
    assert "no-such-bucket" in told
    assert "create it" in told


def test_check_on_a_dead_endpoint(s3_server: S3Server) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    told = check_fails(s3_server, "s3://bucket", endpoint_url=endpoint)
    assert time.monotonic() - begin < OUTAGE_S
    assert "cannot connect" in told
    assert endpoint in told


def test_check_on_a_hung_server(s3_server: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        endpoint = f"http://127.0.0.1:{hung.getsockname()[1]}"
        told = check_fails(
            s3_server, "s3://bucket", endpoint_url=endpoint, connect_timeout_s=1, read_timeout_s=0.2
        )
    assert "did not answer in time" in told


def test_without_credentials(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = s3_server.options(access_key=None, secret_key=None)
    store = open_blobs(f"s3://{s3_bucket}", s3=options)
    with pytest.raises(StorageUnavailable, match="set FARM_S3_ACCESS_KEY and FARM_S3_SECRET_KEY"):
        store.check()
    with pytest.raises(StorageUnavailable, match="set FARM_S3_ACCESS_KEY and FARM_S3_SECRET_KEY"):
        store.url("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    found_elsewhere = open_blobs(f"s3://{s3_bucket}", s3=options)
    found_elsewhere.check()
    store.close()
    found_elsewhere.close()


def test_every_call_on_a_missing_bucket(s3_server: S3Server) -> None:
    store: BlobStore = open_blobs("s3://no-such-bucket", s3=s3_server.options())
    for action in (
        lambda: store.put("a", b"x", "text/plain"),
        lambda: store.put_files([("a", Path(__file__), "text/plain")]),
        lambda: store.get("a"),
        lambda: next(store.chunks("a")),
        lambda: store.stat("a"),
        lambda: list(store.list()),
    ):
        with pytest.raises(StorageUnavailable, match="the bucket does not exist"):
            action()
    store.close()


@pytest.mark.parametrize(
    ("status", "code", "refused"),
    [
        (403, "AccessDenied", True),
        (403, "RequestTimeTooSkewed", True),
        (404, "NoSuchBucket", True),
        (400, "ExpiredToken", True),
        (301, "PermanentRedirect", True),
        (403, "QuotaExceeded", False),
        (400, "RequestTimeout", False),
        (429, "SlowDown", False),
        (500, "InternalError", False),
        (503, "ServiceUnavailable", False),
        (507, "InsufficientStorage", False),
    ],
)
def test_a_refusal_is_told_from_an_outage(
    s3_server: S3Server, status: int, code: str, refused: bool
) -> None:
    reply: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = fault("write a", Place("b", s3_server.options()), ClientError(reply, "PutObject"))
    assert isinstance(error, StorageUnavailable)
    assert isinstance(error, StorageRefused) is refused


def test_an_outage_ends(s3_server: S3Server, store: S3Blobs) -> None:
    store.put("a", b"before", "text/plain")
    s3_server.stop()
    try:
        begin = time.monotonic()
        with pytest.raises(StorageUnavailable, match="cannot connect"):
            store.put("a", b"during", "text/plain")
        assert time.monotonic() - begin < OUTAGE_S
    finally:
        s3_server.start()
    assert store.get("a") == b"before"
    store.put("a", b"after", "text/plain")
    assert store.get("a") == b"after"
