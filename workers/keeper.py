"""Encodes, hashes and stores pictures in threads while the engine renders the next ones.

While the blob store is away, or hangs, finished pictures go to the spool on this machine's disk and
their claims are kept. One after the other is tried until the store is back, then all are stored.
Only the end of the worker gives them back; their pictures stay in the spool for whoever claims the
jobs next.

With a signer a picture is signed last, and hashed after that; the spool holds what was signed. That
is no part of the fingerprint: a picture that is linked or found in the spool keeps the mark that it
was made with.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from farm.blobs import BlobStore
from farm.errors import (
    EnvironmentFault,
    FarmError,
    JobCancelled,
    RenderFailed,
    StorageRefused,
    StorageUnavailable,
)
from farm.pictures import CONTENT_TYPES, Origin, encode, object_key, sha256
from farm.provenance import Signer
from farm.spec import Fingerprints
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from workers import outage
from workers.outage import Finished, Hand, Outage
from workers.recorder import Recorder
from workers.spool import Spool, SpoolFull

log = logging.getLogger(__name__)
THREADS = 4
MOST_WAITING = 256  # pictures in memory; beyond that the engine waits
MOST_BYTES = 128 * 2**20  # of their pixels
TOGETHER = 16  # pictures that a thread takes at once, when many wait


class Keeper:
    """Takes finished pixels; each ends as a record: a picture, or a failure."""

    def __init__(
        self,
        blobs: BlobStore,
        origin: Origin,
        recorder: Recorder,
        spool: Spool,
        upload_timeout_s: float = 300.0,
        signer: Signer | None = None,
    ) -> None:
        self._blobs, self._origin, self._recorder = blobs, origin, recorder
        self._spool, self._upload_timeout_s, self._signer = spool, upload_timeout_s, signer
        self._fingerprints = Fingerprints(origin.engine, origin.weights_sha256, origin.loras)
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)  # for the threads: there is something to do
        self._changed = threading.Condition(self._lock)  # for the others: something was done
        self._waiting: deque[Finished] = deque()
        self._held: deque[Finished] = deque()  # in the spool, until the store is back
        self._unwanted: deque[str] = deque()  # objects to delete
        self._in_memory, self._memory_bytes = 0, 0
        self._outage = Outage()
        self._hurry, self._closing = threading.Event(), threading.Event()
        self.stored_bytes = 0
        self._hands = [Hand() for _ in range(THREADS)]
        for n, hand in enumerate(self._hands):
            name = f"keeper-{n}"
            threading.Thread(target=self._work, args=(hand,), name=name, daemon=True).start()

    # ---- from outside

    @property
    def trouble(self) -> str:
        """Why finished pictures are held just now, else nothing."""
        return self.claims_none or (str(self._outage) if self._holds() else "")

    @property
    def claims_none(self) -> str:
        """Why no more should be claimed, while others may be able to store; else nothing."""
        if self._outage.refused and self._holds():  # by what is held it is seen when it ends
            return f"{self._outage}; no more is claimed until it takes a picture"
        return (self._signer.trouble if self._signer else "") or self._hangs()

    def _holds(self) -> bool:
        looks = any(hand.looks for hand in self._hands)  # what it tries is held no longer
        return bool(self._held or self._in_memory or looks)

    def _hangs(self) -> str:
        """That an upload takes longer than it may; else nothing.

        It cannot be ended from here, and its picture is not given up.
        """
        now = time.monotonic()
        took = max((now - since for h in self._hands if (since := h.putting_since)), default=0.0)
        if took <= self._upload_timeout_s:
            return ""
        return (
            f"an upload has taken {took:.0f} s, and upload_timeout_s allows "
            f"{self._upload_timeout_s:g}; no more is claimed until it ends"
        )

    @property
    def spooled(self) -> int:
        """How many finished pictures are held on the disk until the store is back."""
        return len(self._held)

    def keep(self, claim: Claim, pixels: Any, render_s: float) -> None:
        """Store `pixels` (uint8, height x width x 3) as the job's picture.

        Returns at once, unless too many pictures are in memory already; if that is because the
        store hangs, the picture goes to the spool from here.
        """
        one = Finished(claim, pixels, render_s)
        while not self._accept(one):
            if self._is_stuck():
                self._notice(f"the blob store has not answered for {outage.STUCK_S:g} s")
                if self._end(one, Hand(), waits=False):
                    return
                with self._lock:
                    self._changed.wait_for(lambda: self._has_room(pixels.nbytes), 1.0)

    def _accept(self, one: Finished) -> bool:
        """Put it with those that wait; False: there was no room within a second."""
        size = one.pixels.nbytes
        with self._lock:
            self._changed.wait_for(lambda: self._has_room(size) or self._is_stuck(), 1.0)
            if not self._has_room(size):
                return False
            one.room = size
            self._in_memory += 1
            self._memory_bytes += size
            self._waiting.append(one)
            self._ready.notify()
            return True

    def _has_room(self, size: int) -> bool:
        fits = self._in_memory < MOST_WAITING and self._memory_bytes + size <= MOST_BYTES
        return fits or not self._in_memory or self._hurry.is_set()

    def adopt(self, bundle: list[Claim]) -> list[Claim]:
        """Those of the bundle that are left to render: pictures of the others lie in the spool."""
        names = self._spool.loose()
        found = []
        for claim in bundle if names else []:
            with suppress(KeyError):  # the engine will say that it does not know the LoRA
                name = self._name(claim)
                if name in names and (entry := self._spool.take(name)):
                    found.append(Finished(claim, entry=entry))
        if not found:
            return bundle
        log.info("%d pictures in the spool were rendered for these jobs before", len(found))
        self._recorder.started([one.claim for one in found])
        with self._lock:
            self._waiting.extend(found)
            self._ready.notify_all()
        taken = {one.claim.ref for one in found}
        return [claim for claim in bundle if claim.ref not in taken]

    def cancel(self, refs: set[JobRef]) -> None:
        """Drop what is held of these jobs."""
        for one in self._pick(refs):
            self._fail(one, JobCancelled())

    def abandon(self, why: str) -> None:
        """Let go of what is held: its jobs are others', or are claimed here again."""
        for one in self._pick(None):
            self._loosen(one)
            self._recorder.back(one.claim, why)

    def _pick(self, refs: set[JobRef] | None) -> list[Finished]:
        """Take out of what is held: these jobs', or all."""
        with self._lock:
            picked = [one for one in self._held if refs is None or one.claim.ref in refs]
            for one in picked:
                self._held.remove(one)
        return picked

    def drop(self, claim: Claim, picture: Picture) -> None:
        """Delete, in a thread, the object of a claim that was lost; nothing refers to it."""
        log.info("job %s was given to another; its picture is dropped", claim.ref)
        with self._lock:
            self._unwanted.append(picture.object_key)
            self._ready.notify()

    def hurry(self) -> None:
        """The engine waits no longer for room: the worker is to end."""
        with self._lock:
            self._hurry.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what is under way; a store that is away is not waited for."""
        self.hurry()
        with self._lock:
            self._closing.set()
            self._ready.notify_all()
            while not self._changed.wait_for(self._is_done, 0.1):
                if self._is_stuck():
                    break
            left = dict.fromkeys([*self._waiting, *self._held])
            for hand in self._hands:
                left |= dict.fromkeys(hand.group)
                self._recorder.pictures(hand.stored)
                hand.group, hand.stored = [], []
            self._waiting.clear()
            self._held.clear()
        for one in left:
            self._leave(one)
        self._spool.close()

    def _is_done(self) -> bool:
        return not self._waiting and not any(hand.group or hand.stored for hand in self._hands)

    def _leave(self, one: Finished) -> None:
        """Give a job back, and leave its picture to whoever claims it next."""
        try:
            if one.entry or self._hold(one, self._file(one)):
                self._loosen(one)
                self._recorder.back(one.claim, "its worker ended; the picture is in the spool")
                return
        except Exception:  # whatever it is, the job goes back
            log.exception("job %s: its picture could not be left in the spool", one.claim.ref)
        self._recorder.failure(one.claim, StorageUnavailable(self._outage.store or None))

    # ---- the threads

    def _work(self, hand: Hand) -> None:
        """One thread's: whatever waits, until the keeper closes."""
        while self._take(hand):
            for one in list(hand.group):
                self._end(one, hand)
                with self._lock:
                    if one in hand.group:  # else the keeper has closed meanwhile
                        hand.group.remove(one)
            self._delete_unwanted()
            with self._lock:
                stored, hand.stored = hand.stored, []
                self.stored_bytes += sum(picture.size_bytes for _, picture in stored)
                self._recorder.pictures(stored)
                self._changed.notify_all()

    def _take(self, hand: Hand) -> bool:
        """An even share of what waits, so that no thread is idle meanwhile; False: the end.

        While the store is away, from time to time one of those that are held instead.
        """
        with self._lock:
            hand.looks = False
            while True:
                left_s = self._next_look()
                if left_s is not None and left_s <= 0:
                    hand.looks, hand.group = True, [self._held.popleft()]
                    return True
                if self._waiting or self._unwanted or self._closing.is_set():
                    break
                self._ready.wait(left_s)
            share = min(TOGETHER, -(-len(self._waiting) // THREADS))
            hand.group = [self._waiting.popleft() for _ in range(share)]
            return bool(hand.group or self._unwanted)

    def _next_look(self) -> float | None:
        """Seconds until a thread is to try a held picture; None: not at all, or one does."""
        if not (self._outage.store and self._held) or self._closing.is_set():
            return None
        if any(hand.looks for hand in self._hands):
            return None
        return self._outage.wait_s()

    def _end(self, one: Finished, hand: Hand, *, waits: bool = True) -> bool:
        """Store a picture, hold it, or record its failure; False: no room, and not to be waited."""
        try:
            return self._store_or_hold(one, hand, waits)
        except FarmError as error:
            self._fail(one, error)
        except Exception as error:
            log.exception("job %s: the picture could not be made a file", one.claim.ref)
            what = f"the picture could not be stored: {type(error).__name__}: {error}"
            self._fail(one, RenderFailed(what))
        return True

    def _store_or_hold(self, one: Finished, hand: Hand, waits: bool) -> bool:
        data, looks = self._file(one), hand.looks
        while True:
            if (looks or not self._outage.store) and self._put(one, data, hand):
                return True
            if self._hold(one, data):
                return True
            if not waits:
                return False
            if self._closing.wait(outage.MAX_PAUSE_S * random.uniform(0.1, 0.5)):
                raise StorageUnavailable(self._outage.store)
            looks = True

    def _file(self, one: Finished) -> bytes:
        """The picture's bytes. Raises BlobDamaged for one that the spool does not have whole."""
        if one.entry is None:
            return self._signed(encode(one.pixels.tobytes(), one.claim.spec, self._origin), one)
        data, one.render_s = self._spool.read(one.entry)
        return data

    def _signed(self, data: bytes, one: Finished) -> bytes:
        """Raises EnvironmentFault when the signer's certificate has expired."""
        if self._signer is None:
            return data
        spec, agent = one.claim.spec, f"{self._origin.engine}/{one.claim.spec.model}"
        return self._signer.sign(data, spec.format, title=str(one.claim.ref), agent=agent)

    def _put(self, one: Finished, data: bytes, hand: Hand) -> bool:
        claim, spec = one.claim, one.claim.spec
        key = object_key(claim.ref, claim.claim_no, claim.session_id, spec.format)
        hand.putting_since = time.monotonic()
        try:
            self._blobs.put(key, data, CONTENT_TYPES[spec.format])
        except EnvironmentFault as error:
            self._notice(error.message, refused=isinstance(error, StorageRefused))
            return False
        finally:
            hand.putting_since = None
        if self._outage.store:
            self._is_back()
        mark = self._fingerprints.of(spec)
        picture = Picture(key, sha256(data), len(data), one.render_s, mark)
        with self._lock:
            if one in hand.group:
                hand.stored.append((claim, picture))
        self._discard(one)
        return True

    def _hold(self, one: Finished, data: bytes) -> bool:
        """Put a picture in the spool until the store is back; False: it is full."""
        if one.entry is None:
            try:
                one.entry = self._spool.add(self._name(one.claim), data, one.render_s)
            except SpoolFull as error:
                self._outage.notice_spool(str(error))
                return False
            self._outage.spool = ""
            self._free(one)
        with self._lock:
            (self._held if self._outage.store else self._waiting).append(one)
            self._ready.notify()
        return True

    def _name(self, claim: Claim) -> str:
        """Raises KeyError for a LoRA that this worker does not have."""
        return f"{claim.ref.batch_id}-{claim.ref.idx}-{self._fingerprints.of(claim.spec)}"

    def _notice(self, why: str, *, refused: bool = False) -> None:
        with self._lock:
            self._outage.notice(why, refused=refused)

    def _is_back(self) -> None:
        with self._lock:
            if self._outage.store:
                self._outage.end(len(self._held))
            self._waiting.extendleft(reversed(self._held))
            self._held.clear()
            self._ready.notify_all()

    def _is_stuck(self) -> bool:
        """Whether every thread that has something to do has waited for the store for long."""
        busy = [hand for hand in self._hands if hand.group]
        return bool(busy) and all(hand.is_stuck for hand in busy)

    # ---- the ends of a picture

    def _fail(self, one: Finished, error: FarmError) -> None:
        self._discard(one)
        self._recorder.failure(one.claim, error)

    def _discard(self, one: Finished) -> None:
        if one.entry:
            self._spool.drop(one.entry)
        self._free(one)

    def _loosen(self, one: Finished) -> None:
        if one.entry:
            self._spool.loosen(one.entry)

    def _free(self, one: Finished) -> None:
        """It is in memory no longer."""
        one.pixels = None
        if one.room:
            with self._lock:
                self._in_memory -= 1
                self._memory_bytes -= one.room
                one.room = 0
                self._changed.notify_all()

    def _delete_unwanted(self) -> None:
        with suppress(IndexError):
            key = self._unwanted.popleft()
            try:
                self._blobs.delete([key])
            except Exception as error:  # this thread has pictures to record
                log.warning("%s is left over: %s", key, error)
