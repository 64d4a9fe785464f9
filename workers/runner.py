"""A worker's work: claim -> render -> store -> settle, on each token of its lane.

The render loop talks to the engine's child; threads beside it store pictures (Keeper), write
records (Recorder), beat (Heart) and claim the next bundle while the present one renders (Claims).
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from farm import dispatch
from farm.blobs import BlobStore
from farm.broker import Broker
from farm.catalog import Lane
from farm.config import Settings
from farm.errors import FarmError, JobCancelled
from farm.pictures import Origin
from farm.provenance import Signer
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim, Picture
from farm.store.sessions import Beat
from workers.breaker import Breaker
from workers.child import Child
from workers.claims import Claims
from workers.engine import EngineConfig, EngineInfo
from workers.heart import Heart
from workers.inputs import Inputs
from workers.keeper import Keeper
from workers.lessons import Lessons
from workers.messages import (
    Cap,
    Eased,
    Event,
    Failed,
    GivenBack,
    Progress,
    Rendered,
    Started,
    TooLarge,
)
from workers.recorder import Recorder
from workers.recovery import Recovery, as_fault
from workers.reuse import Reuse
from workers.spool import Spool
from workers.stall import Stall

log = logging.getLogger(__name__)
STALL_S = 60.0  # beyond the engine's own limits, that a bundle under way may give no sign
SHUTDOWN = "its worker was shut down"
LOST = "its worker's session was lost"
RESTS = "its worker rests, since job after job failed there"


class Runner:
    """One lane, one engine, one pinned model. `work` is called by one thread at a time."""

    def __init__(
        self,
        config: EngineConfig,
        child: Child,
        settings: Settings,
        db: Database,
        broker: Broker,
        blobs: BlobStore,
        signer: Signer | None = None,
    ) -> None:
        self.lane = Lane(config.model, config.engine)
        self._child, self._settings, self._db = child, settings, db
        self._broker, self._blobs, self._signer = broker, blobs, signer
        self._inputs = Inputs(blobs)
        self._lessons = Lessons(db, config)
        self._claims = Claims(db, self.lane, lambda: self._heart.session_id)
        self._prefetch = ThreadPoolExecutor(1, thread_name_prefix="claims")
        self._bell = ThreadPoolExecutor(1, thread_name_prefix="bell")
        self._ringing: Future[None] | None = None
        self._stopping, self.broken = threading.Event(), threading.Event()
        self._stop_asked = threading.Event()
        self._bundle_lock = threading.Lock()
        self._bundle: list[Claim] = []  # under way in the child
        self._unwanted: set[JobRef] = set()  # cancelled while claimed
        self._lost = ""  # the last session that was
        self._breaker = Breaker()
        self._stall = Stall(child.longest_silence_s + STALL_S)
        self._rendered = 0
        self._speed: float | None = None  # seconds a picture

    def start(self) -> EngineInfo:
        """Load the model, then open the session. Raises ModelNotLoaded and EngineFault."""
        info = self._lessons.load(self._child)
        origin = Origin(self.lane.engine, info.weights_sha256, info.loras)
        self._recorder = Recorder(
            self._db,
            self._settings,
            self._drop,
            self._claims.forget,
            self._claims.count,
            self._breaker,
        )
        self._recovery = Recovery(
            self._db,
            self._settings,
            self.lane,
            origin,
            self._child,
            self._breaker,
            self._stopping,
            self._give_up,
        )
        told = self._settings
        self._spool = Spool(told.spool_path, self.lane, told.spool_max)
        self._spool.sweep()
        self._keeper = Keeper(
            self._blobs,
            origin,
            self._recorder,
            self._spool,
            told.upload_timeout_s,
            self._signer,
        )
        self._reuse = Reuse(self._db, origin, self._claims.forget)
        self._heart = Heart(
            self._db,
            self.lane,
            self._settings.session_ttl_s,
            device=info.device,
            memory=info.memory,
            info=lambda: self._lessons.told(info),
            told=self._told,
            on_cancel=self._cancel,
            on_lost=self._abandon,
            tend=self._tend,
            watch=self._watch,
        )
        self._heart.start()
        gc.collect()
        gc.freeze()  # what lives as long as the worker is looked through no more
        return info

    def ring(self) -> None:
        """Ask for tokens of this lane, best effort: there may be work that nobody rang for."""
        try:
            dispatch.ring(
                self._db, self._broker, [self.lane.model], self._settings.tokens_per_worker
            )
        except Exception as error:  # a claimed bundle must not be forgotten for a bell
            log.warning("no ring: %s", error)

    # ---- the way of a bundle

    def work(self) -> None:
        """Render bundles until the lane is empty or the worker stops."""
        bundle: list[Claim] = []
        while not self._stopping.is_set():
            self._recovery.until_well()
            bundle = self._next_bundle()
            while bundle and not self._stopping.is_set():
                bundle = self._render(bundle)
            if not self._breaker.is_open:
                break
        self._give_back(bundle, SHUTDOWN)

    def _next_bundle(self) -> list[Claim]:
        """The next jobs to render; those whose pictures are there are linked on the way."""
        most = self._settings.bundle_max
        while not self._stopping.is_set():
            if self._keeper.claims_none:
                self._stopping.wait(1.0)
                continue
            size = dispatch.bundle_size(self._speed, self._settings.bundle_seconds, most)
            size = 1 if self._breaker.is_half_open else min(max(size, self._lessons.cap), most)
            bundle = self._claims.next(self._reuse.size(size))
            left = self._keeper.adopt(self._reuse.link(bundle))
            self._give_back(left[size:], "its worker had taken more than it renders at once")
            if left or not bundle:
                return left[:size]
        return []

    def _claim_and_ring(self) -> list[Claim]:
        """The next bundle; the bell is rung beside it, for a broker may take its time."""
        bundle = self._next_bundle()
        try:
            self._inputs.fetch(bundle)  # they are kept until its turn comes
            if bundle and (self._ringing is None or self._ringing.done()):
                self._ringing = self._bell.submit(self.ring)
        except Exception:  # a claimed bundle must not be forgotten for that
            log.exception("beside a claim")
        return bundle

    def _render(self, bundle: list[Claim]) -> list[Claim]:
        """Render one bundle; returns the next, claimed meanwhile."""
        bundle, files = self._with_inputs(self._wanted(bundle))
        open_ids, started = set(range(len(bundle))), set[int]()
        upcoming: Future[list[Claim]] | None = None
        self._enter(bundle)
        try:
            self._stall.sign()
            for event in self._child.render([claim.spec for claim in bundle], files):
                self._stall.sign()
                self._take(event, bundle, open_ids, started)
                if upcoming is None and len(started) == len(bundle):
                    upcoming = self._prefetch.submit(self._claim_and_ring)
        except Exception as error:
            left = [(bundle[i], i in started) for i in sorted(open_ids)]
            self._engine_died(as_fault(error), left)
            open_ids.clear()
        finally:
            self._stall.pause()
            self._give_back([bundle[i] for i in sorted(open_ids)], "its render ended unsaid")
            self._enter([])
        if upcoming is None:
            return [] if self._takes_none else self._next_bundle()
        following = upcoming.result()
        if not self._takes_none:
            return following
        self._give_back(following, "its worker's engine broke" if self.broken.is_set() else RESTS)
        return []

    @property
    def _takes_none(self) -> bool:
        return self.broken.is_set() or self._breaker.is_open

    def _wanted(self, bundle: list[Claim]) -> list[Claim]:
        """The bundle without what was cancelled, or whose session was lost, meanwhile."""
        with self._bundle_lock:
            unwanted = {claim for claim in bundle if claim.ref in self._unwanted}
            self._unwanted -= {claim.ref for claim in bundle}
        stale = {claim for claim in bundle if claim.session_id != self._heart.session_id}
        for claim in unwanted - stale:
            self._recorder.failure(claim, JobCancelled())
        self._give_back(list(stale), LOST)
        return [claim for claim in bundle if claim not in unwanted | stale]

    def _with_inputs(self, bundle: list[Claim]) -> tuple[list[Claim], dict[str, bytes]]:
        """The jobs whose input pictures are here, and these by key; the others are settled."""
        fetched = self._inputs.fetch(bundle)
        for claim, fault in fetched.refused:
            self._recorder.failure(claim, fault)
        self._give_back(fetched.later, "the input pictures of its bundle were too many at once")
        return fetched.ready, fetched.files

    def _take(
        self, event: Event, bundle: list[Claim], open_ids: set[int], started: set[int]
    ) -> None:
        match event:
            case Started(ids):
                started.update(ids)
                self._recorder.started([bundle[i] for i in ids])
            case Progress(ids, fraction):
                self._recorder.progress([bundle[i] for i in ids], fraction)
            case Rendered(id, pixels, seconds, _):
                self._stall.pause()  # there may be no room for it as long as the store is away
                self._keeper.keep(bundle[id], pixels, seconds)
                self._stall.sign()
                open_ids.discard(id)
                self._rendered += 1
                self._speed = seconds if self._speed is None else (3 * self._speed + seconds) / 4
            case Failed(id, error):
                if isinstance(error, JobCancelled) and bundle[id].session_id == self._lost:
                    self._recorder.back(bundle[id], LOST)  # no person asked for it
                else:
                    self._recorder.failure(bundle[id], error)
                open_ids.discard(id)
                started.add(id)
                if self._breaker.is_open:
                    self._child.stop_after_current()
            case GivenBack(id):
                self._recorder.back(bundle[id], SHUTDOWN if self._stopping.is_set() else RESTS)
                open_ids.discard(id)
                started.add(id)
            case Cap() | Eased() | TooLarge():
                self._lessons.take(event)

    def _engine_died(self, error: FarmError, left: list[tuple[Claim, bool]]) -> None:
        """What had started is suspect, the rest is free; then a new child takes over."""
        stopping = self._stopping.is_set()
        for claim, started in left:
            if started and not stopping:
                self._recorder.failure(claim, error)
            else:
                self._recorder.back(claim, SHUTDOWN if stopping else "its engine died before it")
        if stopping:
            return
        log.error("%s; starting a new engine", error.message)
        if not any(started for _, started in left):
            self._breaker.failed(None, error)
        self._recovery.restart()

    def _give_up(self, error: FarmError) -> None:
        if not self._stopping.is_set():
            log.critical("the worker stops: %s", error.message)
            self.broken.set()
            self._stopping.set()

    def _give_back(self, bundle: list[Claim], why: str) -> None:
        for claim in bundle:
            self._recorder.back(claim, why)

    def _enter(self, bundle: list[Claim]) -> None:
        with self._bundle_lock:
            self._unwanted -= {claim.ref for claim in self._bundle}
            self._bundle = bundle

    # ---- called from other threads

    def _told(self) -> Beat:
        trouble = self._inputs.trouble or self._keeper.trouble
        state = "waiting" if trouble else "rendering" if self._bundle else "idle"
        state = "resting" if self._breaker.is_open else state
        notes = filter(None, (self._breaker.note, trouble))
        return Beat(
            state=state,
            note="; ".join(notes) or self._lessons.note,
            rendered=self._rendered,
            seconds_per_picture=self._speed,
            stored_bytes=self._keeper.stored_bytes,
            spooled=self._keeper.spooled,
        )

    def _tend(self) -> None:
        """With each heartbeat: strays go back, and what died beside this worker is found."""
        self._claims.tend()
        self._spool.sweep()

    def _watch(self) -> None:
        """With each look of the heart: no engine and no render loop hangs behind a beating one."""
        self._child.end_if_frozen()
        if self._stall.look():
            log.critical("no sign of the render loop for longer than its limits")
            hard_stop()

    def _cancel(self, refs: set[JobRef]) -> None:
        with self._bundle_lock:
            ids = [i for i, claim in enumerate(self._bundle) if claim.ref in refs]
            self._unwanted = set(refs)
            if ids:
                self._child.cancel(ids)
        self._keeper.cancel(refs)

    def _abandon(self) -> None:
        """The session was lost: rendering on would be for nothing."""
        self._lost = self._heart.session_id
        self._keeper.abandon(LOST)
        self._cancel({claim.ref for claim in self._bundle})

    def _drop(self, claim: Claim, picture: Picture) -> None:
        self._keeper.drop(claim, picture)

    def stop(self) -> None:
        """Take no more work: finish the pictures under way, give the rest back."""
        if self._stop_asked.is_set():
            return
        self._stop_asked.set()
        log.info("stopping: the pictures under way are finished, the rest goes back")
        self._stopping.set()
        timer = threading.Timer(self._settings.shutdown_grace_s, self._child.kill)
        timer.daemon = True
        timer.start()
        self._keeper.hurry()
        self._child.stop_after_current()

    @property
    def is_asked_to_stop(self) -> bool:
        return self._stop_asked.is_set()

    def close(self) -> None:
        """After the last `work`: record what is left, end the session and the engine."""
        self._stopping.set()
        for pool in (self._prefetch, self._bell):
            pool.shutdown(wait=False, cancel_futures=True)
        self._inputs.close()
        self._keeper.close()
        if not self._recorder.close(timeout_s=10.0):
            log.warning("the database is away; what was not recorded is rendered again")
        self._heart.stop()
        self._child.close()


def hard_stop() -> None:
    """End this process at once."""
    log.critical("something hangs; the worker ends without waiting, its session will expire")
    os._exit(1)
