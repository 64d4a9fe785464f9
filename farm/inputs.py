"""Input pictures: what a row names becomes a checked object of the blob store.

A row names a file, `blob:KEY`, or `job:BATCH/INDEX` for a picture that the farm rendered. The bytes
are stored as inputs/SHA256.png (jpg, webp): equal pictures are one object, and whoever reads it can
tell whether it was changed.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from PIL import Image, UnidentifiedImageError

from farm.blobs import BlobStore, check_key
from farm.errors import BlobDamaged, BlobNotFound, Invalid, InvalidParameter
from farm.picture_bounds import refuse_endless, refuse_scans
from farm.spec import INPUT_FORMATS, INPUT_PATTERN, MAX_INPUT_PIXELS

MAX_BYTES = 64 * 2**20
THREADS = 8
FRESH_S = 1800  # an input picture is not pruned for longer than this after it was written
# MPO: a JPEG with further pictures behind it, as many phones write; the first is the picture
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
_CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


def picture_key(data: bytes) -> str:
    """The key under which a picture's file is stored, once it was decoded whole.

    Raises InvalidParameter unless it is one still PNG, JPEG or WebP picture within the limits.
    """
    if len(data) > MAX_BYTES:
        raise InvalidParameter(f"it is larger than {MAX_BYTES >> 20} MiB")
    try:
        extension = _decoded(data)
    except InvalidParameter:
        raise
    except Exception as error:  # whatever a decoder says of bytes that strangers made
        what = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InvalidParameter(f"it cannot be read as PNG, JPEG or WebP: {what}") from None
    return f"inputs/{hashlib.sha256(data).hexdigest()}.{extension}"


def _decoded(data: bytes) -> str:
    refuse_endless(data)
    file = io.BytesIO(data)
    try:
        picture = Image.open(file, formats=INPUT_FORMATS)
    except UnidentifiedImageError:
        raise InvalidParameter("it is no PNG, JPEG or WebP picture") from None
    with picture:
        if picture.width * picture.height > MAX_INPUT_PIXELS:
            most = f"{MAX_INPUT_PIXELS // 10**6} million"
            raise InvalidParameter(
                f"it has {picture.width}x{picture.height} pixels, more than {most}"
            )
        if picture.format in ("JPEG", "MPO"):
            refuse_scans(data, picture.width * picture.height)
        if picture.format != "MPO" and getattr(picture, "is_animated", False):
            raise InvalidParameter("it is animated; give one still picture")
        picture.load()
        return _EXTENSIONS[picture.format or ""]


def read_file(path: Path) -> bytes:
    """A regular file's bytes. Raises InvalidParameter for what is none, and for a large one."""
    try:
        with open(path, "rb", opener=_open) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidParameter("it is no regular file")
            if not found.st_size:
                raise InvalidParameter("the file is empty")
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidParameter(error.strerror or str(error)) from None
    except ValueError:
        raise InvalidParameter("no file can have that name") from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a FIFO waits for a writer


def absolute(given: str, base: Path) -> str:
    """What a row may say of a picture, with a relative path made absolute from `base`."""
    return given if _is_name(given) else str(base / given)


def _is_name(given: str) -> bool:
    """Whether it is anything else than a path."""
    known = given.startswith(("blob:", "job:")) or re.fullmatch(INPUT_PATTERN, given)
    return bool(known or _URL.match(given))


class InputPictures:
    """The input pictures of one submit: each distinct one is read, checked and stored once.

    `blobs` opens the blob store. `rendered` gives the file of a job's picture by the job's name.
    `base`: the directory of relative paths; None: the rows came from elsewhere, and may name no
    local file and no object of the store but input pictures.
    Uploads go on in threads; `settle` waits until all that was taken is stored. Without `upload`
    they are only looked at.
    """

    def __init__(
        self,
        blobs: Callable[[], BlobStore],
        rendered: Callable[[str], bytes],
        base: Path | None,
        *,
        upload: bool = True,
    ) -> None:
        self._blobs, self._rendered, self._base = blobs, rendered, base
        self._upload = upload
        self._taken: dict[str, str | InvalidParameter] = {}
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="inputs")
        self._uploads: deque[Future[None]] = deque()

    def take(self, given: str) -> str:
        """The key of the picture that a row names.

        Raises InvalidParameter, which says what is wrong with it, and StorageUnavailable.
        """
        if given not in self._taken:
            try:
                self._taken[given] = self._keep(self._read(given))
            except InvalidParameter as error:
                self._taken[given] = error
        found = self._taken[given]
        if isinstance(found, InvalidParameter):
            raise InvalidParameter(found.message)
        return found

    def settle(self) -> None:
        """Wait for the uploads. Raises StorageUnavailable when one failed."""
        while self._uploads:
            self._uploads.popleft().result()

    def _read(self, given: str) -> bytes:
        if _URL.match(given):
            raise InvalidParameter("a URL is not fetched: download it first, then name the file")
        scheme, _, name = given.partition(":")
        try:
            if scheme == "job":
                return self._rendered(name)
            if scheme == "blob":
                return self._stored(name)
            if re.fullmatch(INPUT_PATTERN, given):  # as a recorded job has it
                return self._stored(given)
        except (BlobNotFound, BlobDamaged, Invalid) as error:
            raise InvalidParameter(error.message) from None
        if self._base is None:
            raise InvalidParameter("files of this machine cannot be named here: upload it first")
        return read_file(self._base / given)

    def _stored(self, key: str) -> bytes:
        if self._base is None and not re.fullmatch(INPUT_PATTERN, key):
            raise InvalidParameter("only an uploaded picture can be named here: blob:inputs/...")
        try:
            found = self._blobs().stat(check_key(key))
        except ValueError as error:
            raise InvalidParameter(str(error)) from None
        if found is None:
            raise InvalidParameter("the blob store has no such object")
        if found.size > MAX_BYTES:
            raise InvalidParameter(f"it is larger than {MAX_BYTES >> 20} MiB")
        return self._blobs().get(key)

    def _keep(self, data: bytes) -> str:
        key = picture_key(data)
        if not self._upload:
            return key
        while len(self._uploads) >= THREADS:  # bounds the memory
            self._uploads.popleft().result()
        self._uploads.append(self._pool.submit(store, self._blobs(), key, data))
        return key

    def __enter__(self) -> InputPictures:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def store(blobs: BlobStore, key: str, data: bytes) -> None:
    """Put a picture's file under its key, unless it is there. Raises StorageUnavailable.

    One that is there is written anew after a while, so that pruning sees that it is wanted.
    """
    found = blobs.stat(key)
    whole = found is not None and found.size == len(data)  # else it was cut, and is mended
    if not (found and whole and time.time() - found.modified < FRESH_S):
        blobs.put(key, data, _CONTENT_TYPES[key.rpartition(".")[2]])
