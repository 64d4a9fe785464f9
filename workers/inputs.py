"""The input pictures of claimed jobs: fetched, checked against their keys, the latest kept."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from farm.blobs import BlobStore
from farm.errors import (
    BlobNotFound,
    EnvironmentFault,
    FarmError,
    InvalidParameter,
    RenderFailed,
)
from farm.pictures import sha256
from farm.store.jobs import Claim

log = logging.getLogger(__name__)
THREADS = 8
MOST_BYTES = 256 * 2**20  # of a bundle, and kept
TROUBLE_S = 30.0  # how long a fault of the store is told; its jobs come back sooner


@dataclass(frozen=True)
class Fetched:
    """`ready`: claims with all their pictures in `files` (by key). `refused`: why one is not.

    `later`: claims whose pictures are too many to hold beside those of the others.
    """

    ready: list[Claim] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    refused: list[tuple[Claim, FarmError]] = field(default_factory=list)
    later: list[Claim] = field(default_factory=list)


class Inputs:
    """Reads input pictures from the blob store. Safe from any thread."""

    def __init__(self, blobs: BlobStore, most_bytes: int = MOST_BYTES) -> None:
        self._blobs, self._most_bytes = blobs, most_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()  # the least lately used first
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="inputs")
        self._fault: tuple[float, str] = (
            0.0,
            "",
        )  # the last of the store, and until when it counts

    @property
    def trouble(self) -> str:
        """Why jobs with input pictures wait, else nothing."""
        until, what = self._fault
        return what if time.monotonic() < until else ""

    def fetch(self, claims: Sequence[Claim]) -> Fetched:
        """The pictures of a bundle.

        A job is refused with InvalidParameter when its picture is gone or changed, and with an
        EnvironmentFault, which costs it nothing, when the blob store is away.
        """
        fetched = Fetched()
        faults: dict[str, FarmError] = {}
        keys = list(dict.fromkeys(key for claim in claims for key in _keys(claim)))
        held = 0
        for at in range(0, len(keys), THREADS):
            if held >= self._most_bytes:
                break
            group = keys[at : at + THREADS]
            for key, found in zip(group, self._pool.map(self._get, group), strict=True):
                if isinstance(found, FarmError):
                    faults[key] = found
                else:
                    fetched.files[key] = found
                    held += len(found)
            away = next((f for f in faults.values() if isinstance(f, EnvironmentFault)), None)
            if away:  # each of the others would wait as long
                self._note(away.message)
                faults |= dict.fromkeys(keys[at + THREADS :], away)
                break
        for claim in claims:
            _sort(claim, fetched, faults)
        return fetched

    def _note(self, what: str) -> None:
        if what != self.trouble:
            log.warning("%s; jobs with input pictures go back until it is there", what)
        self._fault = (time.monotonic() + TROUBLE_S, what)

    def _get(self, key: str) -> bytes | FarmError:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            data = self._blobs.get(key)
        except BlobNotFound:
            return InvalidParameter(f"its input picture {key} is gone; {_MEND}")
        except EnvironmentFault as error:
            return error
        except Exception as error:  # a claim must not be lost with its fetch
            log.exception("%s", key)
            return RenderFailed(f"its input picture {key} could not be read: {error}")
        if sha256(data) != key.removeprefix("inputs/").partition(".")[0]:
            return InvalidParameter(f"its input picture {key} was changed; delete it, {_MEND}")
        self._keep(key, data)
        self._fault = (0.0, "")
        return data

    def _keep(self, key: str, data: bytes) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._kept_bytes += len(data)
            while self._kept_bytes > self._most_bytes:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])

    def close(self) -> None:
        """Fetch no more; what is under way is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


_MEND = "submit the same picture again, then retry the job"


def _keys(claim: Claim) -> list[str]:
    return [key for key in (claim.spec.init_image, claim.spec.mask_image) if key]


def _sort(claim: Claim, fetched: Fetched, faults: dict[str, FarmError]) -> None:
    fault = next((faults[key] for key in _keys(claim) if key in faults), None)
    if fault:
        fetched.refused.append((claim, fault))
    elif all(key in fetched.files for key in _keys(claim)):
        fetched.ready.append(claim)
    else:
        fetched.later.append(claim)
