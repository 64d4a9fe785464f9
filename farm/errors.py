"""Every failure of the farm, sorted by what happens next.

FarmError                       code, a sentence that a person can act on
|-- Invalid                     refused, or the job is `failed` at once; never retried
|   |-- InvalidPrompt           ERR_INVALID_PROMPT
|   |-- InvalidParameter        ERR_INVALID_PARAMETER
|   |-- PictureBlocked          ERR_BLOCKED               (by the safety checker)
|   |-- UnknownModel            ERR_UNKNOWN_MODEL
|   |-- InvalidPromptFile       ERR_INVALID_PROMPT_FILE   (carries one RowError a bad line)
|   |-- InvalidConfig           ERR_INVALID_CONFIG
|   |-- UntrustedModel          ERR_UNTRUSTED_MODEL       (wrong bytes, a pickle, a hostile answer)
|   |-- AccessDenied            ERR_ACCESS_DENIED         (no token, or one that may not)
|   |-- KeyReused               ERR_KEY_REUSED
|   |-- SubmitInProgress        ERR_SUBMIT_IN_PROGRESS
|   |-- QuotaExceeded           ERR_QUOTA_EXCEEDED        (the owner has too many jobs queued)
|   `-- NotFound                ERR_NOT_FOUND
|-- RenderFailed                ERR_RENDER_FAILED    a failure is counted, the job is retried
|   `-- BadImage                ERR_BAD_IMAGE        uniform or NaN picture
|-- OutOfMemory                 ERR_OUT_OF_MEMORY    a worker with more memory, else `failed`
|-- EnvironmentFault            the job goes back and no failure is counted; the lane backs off
|   |-- DatabaseUnavailable     ERR_DATABASE_UNAVAILABLE
|   |-- BrokerUnavailable       ERR_BROKER_UNAVAILABLE
|   |-- StorageUnavailable      ERR_STORAGE_UNAVAILABLE
|   |   `-- StorageRefused      ERR_STORAGE_REFUSED  until a person mends it; others may be let in
|   |-- BlobNotFound            ERR_BLOB_NOT_FOUND
|   |-- BlobDamaged             ERR_BLOB_DAMAGED
|   |-- HubUnavailable          ERR_HUB_UNAVAILABLE
|   `-- ModelNotLoaded          ERR_MODEL_NOT_LOADED
|-- EngineFault                 the child is replaced, the jobs it had started are suspects
|   |-- EngineCrashed           ERR_ENGINE_CRASHED
|   |-- EngineHung              ERR_ENGINE_HUNG
|   |-- EngineKilled            ERR_ENGINE_KILLED    from outside: nobody knows whose fault it was
|   `-- WorkerLost              ERR_WORKER_LOST      its session expired
|-- JobGivenBack                ERR_GIVEN_BACK       nobody's fault; it is free at once
|-- JobCancelled                ERR_CANCELLED        a person asked for it
`-- JobExpired                  ERR_EXPIRED          its batch's deadline passed before it began
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class FarmError(Exception):
    """Something went wrong in the farm."""

    code: ClassVar[str] = "ERR_INTERNAL"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or self.code).strip().splitlines()[0])

    @property
    def message(self) -> str:
        return str(self.args[0])


class Invalid(FarmError):
    """The request cannot be carried out as it stands."""

    code = "ERR_INVALID"


class InvalidPrompt(Invalid):
    """The prompt is empty, too long or holds characters that no model reads."""

    code = "ERR_INVALID_PROMPT"


class InvalidParameter(Invalid):
    """A parameter is out of range or of the wrong type."""

    code = "ERR_INVALID_PARAMETER"


class PictureBlocked(Invalid):
    """The model's safety checker refused the picture; it was not stored."""

    code = "ERR_BLOCKED"


class UnknownModel(Invalid):
    """No model of that name is in the catalogue."""

    code = "ERR_UNKNOWN_MODEL"


@dataclass(frozen=True)
class RowError:
    """One bad field of one line, counted from 1, and what would have been right."""

    line: int
    field: str
    got: str
    expected: str
    code: str = InvalidParameter.code

    def __str__(self) -> str:
        return f"line {self.line}: {self.field}: {self.expected} (got {self.got})"


def things_wrong(n: int) -> str:
    """`1 thing is wrong`, `2 things are wrong`."""
    return "1 thing is wrong" if n == 1 else f"{n:,} things are wrong"


class InvalidPromptFile(Invalid):
    """The prompt file has bad lines; nothing was accepted."""

    code = "ERR_INVALID_PROMPT_FILE"

    def __init__(self, message: str, errors: Sequence[RowError] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class InvalidConfig(Invalid):
    """A setting is missing or wrong."""

    code = "ERR_INVALID_CONFIG"


class UntrustedModel(Invalid):
    """What was offered as a model is not what it should be; it was refused."""

    code = "ERR_UNTRUSTED_MODEL"


class NotFound(Invalid):
    """There is no such batch, job or worker."""

    code = "ERR_NOT_FOUND"


class AccessDenied(Invalid):
    """This needs a token that allows it."""

    code = "ERR_ACCESS_DENIED"


class KeyReused(Invalid):
    """This idempotency key belongs to another request; send a new key with new content."""

    code = "ERR_KEY_REUSED"


class SubmitInProgress(Invalid):
    """A request with this idempotency key is being carried out; ask again in a few seconds."""

    code = "ERR_SUBMIT_IN_PROGRESS"


class QuotaExceeded(Invalid):
    """The owner may not have so many jobs queued at once."""

    code = "ERR_QUOTA_EXCEEDED"


class RenderFailed(FarmError):
    """The engine could not render this job."""

    code = "ERR_RENDER_FAILED"


class BadImage(RenderFailed):
    """The engine gave a picture of one single colour, or one with NaN values."""

    code = "ERR_BAD_IMAGE"


class OutOfMemory(FarmError):
    """The device has too little memory for this job, even alone."""

    code = "ERR_OUT_OF_MEMORY"


class EnvironmentFault(FarmError):
    """Something around the job is away or full; the job waits until it is back."""

    code = "ERR_ENVIRONMENT"


class DatabaseUnavailable(EnvironmentFault):
    """The database does not answer."""

    code = "ERR_DATABASE_UNAVAILABLE"


class BrokerUnavailable(EnvironmentFault):
    """Redis (or Valkey) does not answer."""

    code = "ERR_BROKER_UNAVAILABLE"


class StorageUnavailable(EnvironmentFault):
    """The blob store does not answer, or refused to write."""

    code = "ERR_STORAGE_UNAVAILABLE"


class StorageRefused(StorageUnavailable):
    """The blob store answers, and takes nothing from this process: a person must mend that."""

    code = "ERR_STORAGE_REFUSED"


class BlobNotFound(EnvironmentFault):
    """The blob store has no object under this key."""

    code = "ERR_BLOB_NOT_FOUND"


class HubUnavailable(EnvironmentFault):
    """The model hub, or a mirror of it, does not answer or does not give the model."""

    code = "ERR_HUB_UNAVAILABLE"


class BlobDamaged(EnvironmentFault):
    """The object is not what was recorded."""

    code = "ERR_BLOB_DAMAGED"


class ModelNotLoaded(EnvironmentFault):
    """The model's files are missing or broken, so the worker takes no job."""

    code = "ERR_MODEL_NOT_LOADED"


class EngineFault(FarmError):
    """The engine's process failed."""

    code = "ERR_ENGINE"


class EngineCrashed(EngineFault):
    """The engine's process died during a render."""

    code = "ERR_ENGINE_CRASHED"


class EngineHung(EngineFault):
    """The engine's process gave no sign of life within its time limit."""

    code = "ERR_ENGINE_HUNG"


class EngineKilled(EngineFault):
    """The engine's process was killed from outside, by a person or for the machine's memory."""

    code = "ERR_ENGINE_KILLED"


class WorkerLost(EngineFault):
    """The worker that held the job fell silent; its session expired."""

    code = "ERR_WORKER_LOST"


class JobGivenBack(FarmError):
    """The worker gave the job back unrendered; no failure is counted."""

    code = "ERR_GIVEN_BACK"


class JobCancelled(FarmError):
    """The job was cancelled."""

    code = "ERR_CANCELLED"


class JobExpired(FarmError):
    """The deadline of the batch passed before the job was begun."""

    code = "ERR_EXPIRED"


def _tree(root: type[FarmError]) -> list[type[FarmError]]:
    return [root] + [leaf for sub in root.__subclasses__() for leaf in _tree(sub)]


def by_code(code: str, message: str) -> FarmError:
    """The exception that a stable code stands for; an unknown code gives a plain FarmError.

    Used where a failure crossed a process boundary as (code, sentence).
    """
    for cls in _tree(FarmError):
        if cls.code == code:
            error = cls.__new__(cls)
            FarmError.__init__(error, message)
            return error
    return FarmError(message)
