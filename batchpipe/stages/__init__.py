"""What a stage is to the chain: something a worker opens once, invokes with records, and closes.

Each kind (callable, container, process, endpoint) is one module and one entry of `open_stage`'s table.
"""

import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from batchpipe.batch import Records
    from batchpipe.job import Job, StageSpec
    from batchpipe.stages.watcher import Watcher


@dataclass(frozen=True, slots=True)
class Answer:
    """What a stage made of the records it was sent, in their order.

    ``kept`` is None where every record got an answer; a stage that declares ``may_drop`` says with it, one
    boolean for each record sent, which ones did.
    """

    records: "Records"
    kept: "NDArray[np.bool_] | None" = None


WRONG_COUNT = "WrongCount"
"""The reason where a server answered other than one record for each record sent."""


class Remedy(Enum):
    """What may help after a failed invocation."""

    RETRY = "the same bytes again, later"
    SMALLER = "fewer records at once"
    ISOLATE = "nothing but finding the records that fail"
    DIED = "the same bytes with nothing beside them, then fewer: the server died, of one of these records or by chance"
    NONE = "nothing: the stage breaks its contract, and no record is to blame"


class InvocationFailed(Exception):
    """One attempt of one invocation failed.

    ``reason`` is an exception's class name or ``HTTP 503``, ``location`` the file, line and function of user
    code where known, ``retry_after_s`` what the server asked for, ``traceback`` the user's own.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        remedy: Remedy,
        *,
        location: str = "",
        retry_after_s: float | None = None,
        traceback: str = "",
    ) -> None:
        super().__init__(f"{reason}: {message}" if message else reason)
        self.reason = reason
        self.message = message
        self.remedy = remedy
        self.location = location
        self.retry_after_s = retry_after_s
        self.traceback = traceback

    def __reduce__(self) -> tuple[object, ...]:
        details = {"location": self.location, "retry_after_s": self.retry_after_s, "traceback": self.traceback}
        return _rebuild, (self.reason, self.message, self.remedy, details)


def _rebuild(reason: str, message: str, remedy: Remedy, details: dict[str, Any]) -> InvocationFailed:
    return InvocationFailed(reason, message, remedy, **details)


class CannotStart(OSError):
    """Why a server cannot be started, and what to type ``next``; who knows the stage makes a StageStartError of it."""

    def __init__(self, why: str, *, next: str = "") -> None:
        super().__init__(why)
        self.next = next


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a worker tells a stage that it opens: where it may write, and which copy of the chain it belongs to."""

    run_id: str
    copy: int
    """Which copy of the chain this is, from 0: it chooses the devices (`gpus`)."""
    scratch: Path
    """The worker's own folder, deleted when the worker ends."""
    logs: Path
    """Where the stage's log is written; copied under the run's ``logs/``."""
    secrets: frozenset[str] = frozenset()
    kept_logs: str = ""
    """The folder or URL where the run keeps what is in ``logs``, for an error's text; empty where it keeps nothing."""

    def kept_log(self, name: str) -> str:
        """Where one of the logs is kept; empty where none is."""
        return f"{self.kept_logs}/{name}" if self.kept_logs else ""


class OpenStage(Protocol):
    """An open stage of a worker's chain. Closed once, on every path, by whoever opened it."""

    name: str
    concurrency: int
    """Invocations in flight at most."""
    is_exclusive: bool
    """Whether invocations never overlap, so that a death is the doing of the very records that were sent."""
    takes_table: bool
    """Whether it works on tables, so that text must be parsed before; else it takes records as they are."""

    def takes_one(self, records: "Records") -> bool:
        """Whether each of these records is an invocation of its own."""
        ...

    async def invoke(self, records: "Records", *, alone: bool = False) -> Answer:
        """Answer the records, in order; ``alone``: while nothing else is sent to the stage.

        Raises InvocationFailed; StageStartError if the stage is gone for good.
        """
        ...

    def close(self) -> None:
        """Release everything the stage holds. Never raises, may be called twice."""
        ...


def sender_of(stage: "StageSpec", job: "Job") -> str:
    """Whom a stage has its records from, for the text of an error that lies between the two."""
    place = [other.name for other in job.stages].index(stage.name)
    return f"stage {job.stages[place - 1].name!r}" if place else "the input"


def open_stage(
    stage: "StageSpec",
    job: "Job",
    context: StageContext,
    watcher: "Watcher | None" = None,
    cancelled: threading.Event | None = None,
) -> OpenStage:
    """Open a stage of any kind. Raises StageStartError, with everything it had started released.

    ``watcher`` is the worker's own, where the job has stages to start; setting ``cancelled`` ends the waiting.
    """
    match stage.kind:
        case "callable":
            from batchpipe.stages.callable import open_callable

            return open_callable(stage, job)
        case "process":
            from batchpipe.stages.process import open_process

            return open_process(stage, job, context, watcher=watcher, cancelled=cancelled)
        case "container":
            from batchpipe.stages.container import open_container

            return open_container(stage, job, context, watcher=watcher, cancelled=cancelled)
        case "endpoint":
            from batchpipe.stages.endpoint import open_endpoint

            return open_endpoint(stage, job, context)
