"""What waits for each lane, and what is known of serving it: the figures of a worker's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from farm.catalog import Lane
from farm.pinning import Demand
from farm.store import figures
from farm.store.sessions import CAN_WORK
from farm.store.tables import now, sessions

PICTURE_S, LOAD_S = 5.0, 60.0  # where nothing was measured yet


@dataclass
class _Known:
    """Of a lane's sessions: the latest figures, when one last ended, how many live now."""

    picture_s: float = PICTURE_S
    load_s: float = LOAD_S
    served_s: float | None = None  # ago
    workers: int = 0


def demands(
    connection: Connection, lanes: Sequence[Lane], *, but: tuple[str, int] | None = None
) -> list[Demand]:
    """Of each lane; the worker `but`, given by host and process, is not counted among the others.

    Each table is read once: the open batches' counters, and each lane's latest sessions.
    """
    waiting = {(told.model, told.engine): told for told in figures.waiting(connection)}
    found = []
    for lane in lanes:
        mine = [waiting[key] for key in ((lane.model, ""), tuple(lane)) if key in waiting]
        known = _known(connection, lane, but)
        waited = max((told.oldest_s for told in mine), default=0.0)
        if known.served_s is not None:
            waited = min(waited, known.served_s)
        found.append(
            Demand(
                lane=lane,
                queued=sum(told.queued for told in mine),
                waiting_s=0.0 if known.workers else waited,
                priority=max((told.priority for told in mine), default=0),
                picture_s=known.picture_s,
                load_s=known.load_s,
                workers=known.workers,
            )
        )
    return found


def _known(connection: Connection, lane: Lane, but: tuple[str, int] | None) -> _Known:
    known = _Known()
    query = (
        select(sessions, CAN_WORK.label("serves"), (now() - sessions.c.heartbeat_at).label("ago"))
        .where(sessions.c.model == lane.model, sessions.c.engine == lane.engine)
        .order_by(sessions.c.opened_at.desc())
        .limit(64)
    )
    for row in reversed(connection.execute(query).all()):
        known.picture_s = row.seconds_per_picture or known.picture_s
        known.load_s = row.info.get("load_s") or known.load_s
        known.served_s = row.ago if known.served_s is None else min(known.served_s, row.ago)
        known.workers += bool(row.serves) and (row.host, row.pid) != but
    return known
