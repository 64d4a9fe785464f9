"""A claimed job whose picture was rendered before is linked to it; the engine renders the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable

from farm.errors import DatabaseUnavailable
from farm.pictures import Origin
from farm.spec import Fingerprints
from farm.store import reuse
from farm.store.db import Database
from farm.store.ids import JobRef
from farm.store.jobs import Claim

log = logging.getLogger(__name__)
MOST = 1024  # jobs of a claim while all are linked


class Reuse:
    """`origin`: what this worker renders with. `settled` is called with claims that have ended.

    `link` is called by one thread at a time.
    """

    def __init__(
        self, db: Database, origin: Origin, settled: Callable[[list[Claim]], None]
    ) -> None:
        self._db, self._origin, self._settled = db, origin, settled
        self._fingerprints = Fingerprints(origin.engine, origin.weights_sha256, origin.loras)
        self._streak = 0

    def size(self, usual: int) -> int:
        """How many jobs to claim: ever more while whole bundles were rendered before."""
        return max(usual, self._streak)

    def link(self, bundle: list[Claim]) -> list[Claim]:
        """Those of one batch's claims that are left to render; the others have succeeded."""
        try:
            linked = self._link(bundle)
        except Exception as error:  # a claimed bundle must not be forgotten: render it whole
            if not isinstance(error, DatabaseUnavailable):
                log.exception("no picture could be looked for")
            linked = set()
        ended = [claim for claim in bundle if claim.ref in linked]
        if ended:
            self._settled(ended)
        left = [claim for claim in bundle if claim.ref not in linked]
        self._streak = min(2 * len(bundle), MOST) if not left else 0
        return left

    def _link(self, bundle: list[Claim]) -> set[JobRef]:
        """The jobs of the bundle that are no longer to be rendered here."""
        marks = {claim: mark for claim in bundle if (mark := self._fingerprint(claim))}
        if not marks:
            return set()
        with self._db.read() as connection:
            batch_id = bundle[0].ref.batch_id
            found = reuse.rendered(connection, batch_id, list(set(marks.values())))
        sources = {claim: found[mark] for claim, mark in marks.items() if mark in found}
        if not sources:
            return set()
        with self._db.write() as connection:
            gone = reuse.link(connection, sources)
        return {claim.ref for claim in sources} - gone

    def _fingerprint(self, claim: Claim) -> str | None:
        """None where it cannot be told: the engine will say that it does not know the LoRA."""
        spec, origin = claim.spec, self._origin
        if any(name not in origin.loras for name, _ in spec.loras):
            return None
        return self._fingerprints.of(spec)
