"""Encodes, hashes and stores pictures in threads while the engine renders the next ones."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from farm import logs
from farm.blobs import BlobStore
from farm.errors import EnvironmentFault, FarmError, RenderFailed, StorageUnavailable
from farm.pictures import CONTENT_TYPES, Origin, encode, object_key, sha256
from farm.spec import Fingerprints
from farm.store.jobs import Claim, Picture
from workers.recorder import Recorder

log = logging.getLogger(__name__)
THREADS = 4
MOST_WAITING = 256  # pictures in memory; beyond that the engine waits
MOST_BYTES = 128 * 2**20  # of their pixels
TOGETHER = 16  # pictures that a thread takes at once, when many wait
PATIENCE_S = 60.0  # how long a finished picture is held while the blob store is away


class _Finished(NamedTuple):
    claim: Claim
    pixels: Any
    render_s: float


class Keeper:
    """Takes finished pixels; each ends as a record: a picture, or a failure."""

    def __init__(self, blobs: BlobStore, origin: Origin, recorder: Recorder) -> None:
        self._blobs, self._origin, self._recorder = blobs, origin, recorder
        self._fingerprints = Fingerprints(origin.engine, origin.weights_sha256, origin.loras)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="keeper")
        self._changed = threading.Condition()
        self._waiting: deque[_Finished] = deque()
        self._busy = 0  # threads at work
        self._held, self._held_bytes = 0, 0  # waiting or under way
        self._closing = threading.Event()
        self.trouble, self.stored_bytes = "", 0

    def keep(self, claim: Claim, pixels: Any, render_s: float) -> None:
        """Store `pixels` (uint8, height x width x 3) as the job's picture.

        Returns at once, unless too many pictures wait for the blob store already.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(pixels.nbytes))
            self._waiting.append(_Finished(claim, pixels, render_s))
            self._held += 1
            self._held_bytes += pixels.nbytes
            if self._busy == THREADS:
                return
            self._busy += 1
        self._pool.submit(self._work)

    def _has_room(self, size: int) -> bool:
        fits = self._held < MOST_WAITING and self._held_bytes + size <= MOST_BYTES
        return fits or not self._held

    def _work(self) -> None:
        """One thread's: whatever waits, until nothing does."""
        while group := self._take():
            stored = []
            for one in group:
                if picture := self._try(one):
                    stored.append((one.claim, picture))
            self._recorder.pictures(stored)
            with self._changed:
                self.stored_bytes += sum(picture.size_bytes for _, picture in stored)
                self._held -= len(group)
                self._held_bytes -= sum(one.pixels.nbytes for one in group)
                self._changed.notify_all()

    def _take(self) -> list[_Finished]:
        """An even share of what waits, so that no other thread is idle meanwhile."""
        with self._changed:
            if not self._waiting:
                self._busy -= 1
            share = min(TOGETHER, -(-len(self._waiting) // THREADS))
            return [self._waiting.popleft() for _ in range(share)]

    def _try(self, one: _Finished) -> Picture | None:
        """The stored picture; None: its failure is recorded."""
        try:
            return self._stored(*one)
        except FarmError as error:
            self._recorder.failure(one.claim, error)
        except Exception as error:
            log.exception("a picture could not be made a file", extra=logs.about(one.claim))
            what = f"the picture could not be stored: {type(error).__name__}: {error}"
            self._recorder.failure(one.claim, RenderFailed(what))
        return None

    def _stored(self, claim: Claim, pixels: Any, render_s: float) -> Picture:
        spec, origin = claim.spec, self._origin
        data = encode(pixels.tobytes(), spec, origin)
        key = object_key(claim.ref, claim.claim_no, claim.session_id, spec.format)
        self._put(key, data, CONTENT_TYPES[spec.format])
        return Picture(key, sha256(data), len(data), render_s, self._fingerprints.of(spec))

    def _put(self, key: str, data: bytes, content_type: str) -> None:
        until, pause = time.monotonic() + PATIENCE_S, 0.2
        while True:
            if self._closing.is_set() and self.trouble:
                raise StorageUnavailable(self.trouble)
            try:
                self._blobs.put(key, data, content_type)
                if self.trouble:
                    log.info("the blob store is back")
                self.trouble = ""
                return
            except EnvironmentFault as error:
                if not self.trouble:
                    log.warning("%s; holding pictures until it is back", error.message)
                self.trouble = error.message
                if self._closing.is_set() or time.monotonic() > until:
                    raise
            self._closing.wait(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 5.0)

    def drop(self, claim: Claim, picture: Picture) -> None:
        """Delete, in a thread, the object of a claim that was lost; nothing refers to it."""
        with suppress(RuntimeError):  # closed already: the object is left over, and harmless
            self._pool.submit(self._drop, claim, picture)

    def _drop(self, claim: Claim, picture: Picture) -> None:
        log.info("a job was given to another; its picture is dropped", extra=logs.about(claim))
        try:
            self._blobs.delete([picture.object_key])
        except EnvironmentFault as error:
            log.warning("%s is left over: %s", picture.object_key, error.message)

    def hurry(self) -> None:
        """Wait no longer for a store that is away."""
        self._closing.set()

    def close(self) -> None:
        """Finish what is under way; a store that is away is not waited for."""
        self.hurry()
        self._pool.shutdown(wait=True)
