"""The states of a job and every arrow between them.

queued     waits for a worker. The dispatcher rings its lane; a claim moves it on.
running    a session holds it under a `claim_no`. The worker moves it on; when the session's
           heartbeat expires, the reconciler puts it back.
succeeded  its picture lies in the blob store and its row names key and hash. Final.
failed     a permanent error, or its failures are used up. Final until a person re-drives it.
cancelled  a person asked for it. Final until a person re-drives it.

A wish (`cancel_requested`, `paused`) is a column and never a state; why a job went back to
`queued` is a row in `job_events`.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # claim | cancelled before the start
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {
            JobState.SUCCEEDED,  # picture stored, then recorded
            JobState.FAILED,  # permanent error, or failures used up
            JobState.QUEUED,  # retry | lease expired | worker shut down
            JobState.CANCELLED,  # cancel seen between steps
        }
    ),
    JobState.SUCCEEDED: frozenset(),
    # re-driven by a person
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}

FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


def may_become(old: JobState, new: JobState) -> bool:
    """Whether the arrow old -> new exists in TRANSITIONS."""
    return new in TRANSITIONS[old]
