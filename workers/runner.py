"""A worker's work: claim -> render -> store -> settle, on each token of its lane.

The render loop talks to the engine's child; threads beside it store pictures (Keeper), write
records (Recorder), beat (Heart) and claim the next bundle while the present one renders.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from farm import dispatch
from farm.blobs import BlobStore
from farm.broker import Broker
from farm.catalog import Lane
from farm.config import Settings
from farm.errors import EngineCrashed, EngineFault, EnvironmentFault, FarmError, JobCancelled
from farm.pictures import Origin
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim
from farm.store.sessions import Beat
from workers.child import Child
from workers.engine import EngineConfig, EngineInfo
from workers.heart import Heart
from workers.keeper import Keeper
from workers.messages import Cap, Failed, GivenBack, Progress, Rendered, Started
from workers.recorder import Recorder

log = logging.getLogger(__name__)
MOST_CRASHES = 3  # of the engine in a row, without a picture between
SHUTDOWN = "its worker was shut down"


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
    ) -> None:
        self.lane = Lane(config.model, config.engine)
        self._child, self._settings, self._db = child, settings, db
        self._broker, self._blobs = broker, blobs
        self._claims = ThreadPoolExecutor(1, thread_name_prefix="claims")
        self._stopping, self.broken = threading.Event(), threading.Event()
        self._bundle_lock = threading.Lock()
        self._bundle: list[Claim] = []  # under way in the child
        self._unwanted: set[JobRef] = set()  # cancelled while claimed
        self._rendered, self._crashes = 0, 0
        self._speed: float | None = None  # seconds a picture

    def start(self) -> EngineInfo:
        """Load the model, then open the session. Raises ModelNotLoaded and EngineFault."""
        info = self._child.start()
        self._micro_batch = info.micro_batch
        origin = Origin(self.lane.engine, info.weights_sha256)
        self._recorder = Recorder(self._db, self._settings, self._drop)
        self._keeper = Keeper(self._blobs, origin, self._recorder)
        self._heart = Heart(
            self._db,
            self.lane,
            self._settings.session_ttl_s,
            device=info.device,
            info=asdict(info),
            told=self._told,
            on_cancel=self._cancel,
            on_lost=self._abandon,
        )
        self._heart.start()
        return info

    def ring(self) -> None:
        """Ask for tokens of this lane: there may be work from before this worker lived."""
        try:
            dispatch.ring_lane(self._db, self._broker, self.lane, self._settings.tokens_per_worker)
        except EnvironmentFault as error:
            log.warning("no ring: %s", error.message)

    # ---- the way of a bundle

    def work(self) -> None:
        """Render bundles until the lane is empty or the worker stops."""
        bundle = self._next_bundle()
        while bundle and not self._stopping.is_set():
            bundle = self._render(bundle)
        self._give_back(bundle, SHUTDOWN)

    def _next_bundle(self) -> list[Claim]:
        if self._stopping.is_set():
            return []
        most = self._settings.bundle_max
        size = dispatch.bundle_size(self._speed, self._settings.bundle_seconds, most)
        size = min(max(size, self._micro_batch), most)
        try:
            return dispatch.claim_bundle(self._db, self._heart.session_id, self.lane, size)
        except EnvironmentFault as error:
            log.warning("no claim: %s", error.message)
            return []

    def _claim_and_ring(self) -> list[Claim]:
        bundle = self._next_bundle()
        try:
            if bundle:
                self.ring()
        except Exception:  # a claimed bundle must not be forgotten for a bell
            log.exception("no ring")
        return bundle

    def _render(self, bundle: list[Claim]) -> list[Claim]:
        """Render one bundle; returns the next, claimed meanwhile."""
        unwanted = [claim for claim in bundle if claim.ref in self._unwanted]
        for claim in unwanted:
            self._recorder.failure(claim, JobCancelled())
        bundle = [claim for claim in bundle if claim not in unwanted]
        upcoming: Future[list[Claim]] | None = None
        open_ids, started = set(range(len(bundle))), set[int]()
        self._enter(bundle)
        begin, before = time.monotonic(), self._rendered
        try:
            for event in self._child.render([claim.spec for claim in bundle]) if bundle else ():
                self._take(event, bundle, open_ids, started)
                if upcoming is None and len(started) == len(bundle):
                    upcoming = self._claims.submit(self._claim_and_ring)
        except Exception as error:
            left = [(bundle[i], i in started) for i in sorted(open_ids)]
            self._engine_died(_as_fault(error), left)
        finally:
            self._enter([])
        self._measure(time.monotonic() - begin, self._rendered - before)
        if self.broken.is_set():
            self._give_back(upcoming.result() if upcoming else [], "its worker's engine broke")
            return []
        return upcoming.result() if upcoming else self._next_bundle()

    def _take(
        self, event: object, bundle: list[Claim], open_ids: set[int], started: set[int]
    ) -> None:
        match event:
            case Started(ids):
                started.update(ids)
                self._recorder.started([bundle[i] for i in ids])
            case Progress(ids, fraction):
                self._recorder.progress([bundle[i] for i in ids], fraction)
            case Rendered(id, pixels, seconds, _):
                open_ids.discard(id)
                self._rendered += 1
                self._crashes = 0
                self._keeper.keep(bundle[id], pixels, seconds)
            case Failed(id, error):
                open_ids.discard(id)
                started.add(id)
                self._recorder.failure(bundle[id], error)
            case GivenBack(id):
                open_ids.discard(id)
                started.add(id)
                self._recorder.back(bundle[id], SHUTDOWN)
            case Cap(n):
                log.warning("out of memory: micro-batches of at most %d from now on", n)
                self._micro_batch = n

    def _engine_died(self, error: EngineFault, left: list[tuple[Claim, bool]]) -> None:
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
        self._crashes += 1
        try:
            if self._crashes > MOST_CRASHES:
                raise EngineFault(f"the engine died {self._crashes} times in a row")
            self._micro_batch = self._child.start().micro_batch
        except FarmError as again:
            log.critical("the worker stops: %s", again.message)
            self.broken.set()
            self._stopping.set()

    def _give_back(self, bundle: list[Claim], why: str) -> None:
        for claim in bundle:
            self._recorder.back(claim, why)

    def _measure(self, seconds: float, pictures: int) -> None:
        if pictures:
            now = seconds / pictures
            self._speed = now if self._speed is None else (self._speed + now) / 2

    def _enter(self, bundle: list[Claim]) -> None:
        with self._bundle_lock:
            self._unwanted -= {claim.ref for claim in self._bundle}
            self._bundle = bundle

    # ---- called from other threads

    def _told(self) -> Beat:
        busy = "rendering" if self._bundle else "idle"
        trouble = self._keeper.trouble
        return Beat("waiting" if trouble else busy, trouble, self._rendered, self._speed)

    def _cancel(self, refs: set[JobRef]) -> None:
        with self._bundle_lock:
            ids = [i for i, claim in enumerate(self._bundle) if claim.ref in refs]
            self._unwanted = refs
            if ids:
                self._child.cancel(ids)

    def _abandon(self) -> None:
        """The session was lost: rendering on would be for nothing."""
        self._cancel({claim.ref for claim in self._bundle})

    def _drop(self, claim: Claim, picture: object) -> None:
        self._keeper.drop(claim, picture)  # type: ignore[arg-type]

    def stop(self) -> None:
        """Take no more work: finish the pictures under way, give the rest back."""
        if self._stopping.is_set():
            return
        log.info("stopping: the pictures under way are finished, the rest goes back")
        self._stopping.set()
        self._child.stop_after_current()
        timer = threading.Timer(self._settings.shutdown_grace_s, self._child.kill)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """After the last `work`: record what is left, end the session and the engine."""
        self._stopping.set()
        self._claims.shutdown(wait=True)
        self._keeper.close()
        if not self._recorder.close(timeout_s=10.0):
            log.warning("the database is away; what was not recorded is rendered again")
        self._heart.stop()
        self._child.close()


def _as_fault(error: Exception) -> EngineFault:
    """Whatever went wrong in the render loop: the child is replaced and nothing stays held."""
    if isinstance(error, EngineFault):
        return error
    log.error("the render loop stumbled", exc_info=error)
    return EngineCrashed(f"{type(error).__name__}: {error}")
