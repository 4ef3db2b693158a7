"""The server of a stage, a process or a container: started, waited for, and started again where it dies."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from batchpipe.errors import StageStartError
from batchpipe.redact import mask
from batchpipe.stages import CannotStart, StageContext
from batchpipe.stages.connections import Connections
from batchpipe.stages.contract import Advice, answers_ping, ask_advice, wait_until_ready
from batchpipe.stages.http import Ending, HttpStage, Server
from batchpipe.stages.model_data import open_model_data
from batchpipe.stages.watcher import Watcher, open_watcher

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

Address: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Running:
    """A server that was started, where it listens, and the command that starts it by hand, for an error's text."""

    server: Server
    address: Address
    by_hand: str


Start: TypeAlias = Callable[[Watcher, Path | None, ExitStack], Running]
"""A kind's own start: given the watcher and the model's folder; what must be released beside the server is entered."""

UNANSWERED_S = 10.0
"""How long its ping may go without a 200, after an invocation timed out, before a server counts as stuck."""


class Served:
    """The server behind a stage, and the next one where it dies. Restarted by one thread, closed by any."""

    def __init__(
        self,
        stage: "StageSpec",
        context: StageContext,
        start: Start,
        watcher: Watcher | None,
        cancelled: threading.Event | None,
    ) -> None:
        self._stage = stage
        self._context = context
        self._start_it = start
        self._watcher = watcher
        self._cancelled = cancelled
        self._closed = threading.Event()
        self._turn = threading.Lock()
        self._held = ExitStack()
        self.connections: Connections
        self._started: Running
        self._start()

    @property
    def address(self) -> Address:
        """Where the server that runs now listens."""
        return self._started.address

    def ending(self) -> Ending | None:
        """How the server that runs now ended; None while it runs."""
        return self._started.server.ending()

    def advice(self) -> Advice:
        """What the server that runs now says of itself. Raises StageStartError where it has ended."""
        return ask_advice(*self.address, self._check)

    def is_stuck(self) -> bool:
        """Whether its ping is not answered, or says that it cannot work."""
        return not answers_ping(*self.address, UNANSWERED_S)

    def log_tail(self) -> str:
        """The last lines of its log, masked."""
        return self._started.server.log_tail()

    def restart(self) -> None:
        """Release the server that died or is stuck, and start another. Raises StageStartError (4)."""
        with self._turn:
            self._release()
            if not self._closed.is_set():
                self._start()

    def close(self) -> None:
        """Stop the server and release all that it holds; a restart under way is given up."""
        self._closed.set()
        with self._turn:
            self._release()

    def _release(self) -> None:
        self._held.close()
        self.connections.close()

    def _start(self) -> None:
        spec = self._stage.container or self._stage.process
        assert spec
        with ExitStack() as held:
            try:
                watcher = self._watcher or held.enter_context(open_watcher())
                model = None
                if spec.model_data:
                    opened = open_model_data(self._stage, spec.model_data, self._context, self._cancelled)
                    model = held.enter_context(opened)
                self._started = self._start_it(watcher, model, held)
            except OSError as exc:
                advice = exc.next if isinstance(exc, CannotStart) else ""
                raise self._not_started(
                    str(exc), advice or "mend that where the worker runs, then run it again"
                ) from exc
            held.callback(self._started.server.close)
            try:
                wait_until_ready(*self.address, spec.startup_timeout_s, self._check)
            except TimeoutError as exc:
                key = f"stages.{self._stage.name}.{self._stage.kind}.startup_timeout_s"
                advice = f"if it needs longer, --set {key}={2 * spec.startup_timeout_s:g}; else {self._by_hand()}"
                raise self._not_started(str(exc), advice, log=self.log_tail()) from exc
            self._held = held.pop_all()
        self.connections = Connections(f"http://{self.address[0]}:{self.address[1]}/invocations", {})

    def _check(self) -> None:
        if ending := self.ending():
            raise self._not_started(ending.how, ending.next or self._by_hand(), log=self.log_tail())
        if self._closed.is_set() or (self._cancelled and self._cancelled.is_set()):
            raise StageStartError(f"stage {self._stage.name!r} was not waited for: another stage did not start")

    def _by_hand(self) -> str:
        return f"see its log, or start it by hand: {self._started.by_hand}"

    def _not_started(self, why: str, next_: str, *, log: str = "") -> StageStartError:
        why, next_ = (mask(text, self._context.secrets) for text in (why, next_))
        return StageStartError(f"stage {self._stage.name!r} did not start: {why}", log=log, next=next_)


def open_served(
    stage: "StageSpec",
    job: "Job",
    context: StageContext,
    start: Start,
    watcher: Watcher | None = None,
    cancelled: threading.Event | None = None,
) -> HttpStage:
    """Start a stage's server, wait until it answers its ping, and ask what it advises.

    Without the worker's ``watcher`` it has one of its own. Setting ``cancelled`` ends the waiting.
    Raises StageStartError, with everything that was started released.
    """
    served = Served(stage, context, start, watcher, cancelled)
    try:
        return HttpStage(stage, job, context, served.connections, advice=served.advice(), served=served)
    except BaseException:
        served.close()
        raise
