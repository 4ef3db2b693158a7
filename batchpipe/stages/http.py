"""A stage that is called over HTTP, whoever started it: one invocation is one POST, or one a record.

Retries and halvings are made by the layer above, `invoke`; here every outcome becomes a reason and a remedy.
"""

import asyncio
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from batchpipe import content
from batchpipe.batch import Records
from batchpipe.content import Body, ContentError
from batchpipe.errors import StageStartError
from batchpipe.redact import mask
from batchpipe.stages import WRONG_COUNT, Answer, InvocationFailed, Remedy, StageContext, in_flight, sender_of
from batchpipe.stages.connections import Connections, HttpAnswer
from batchpipe.stages.contract import NO_REMEDY, Advice
from batchpipe.stages.exchange import Exchange, takes_table

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

THREAD_BYTES = 1 << 18
"""Bodies from this size on are converted and cut on a thread, so that the other requests go on."""
EXIT_WAIT_S = 0.5
"""How long after a broken connection the end of its server may take to be seen."""
LONGEST_ASKED_S = 86_400.0
"""A server that asks to be left alone for longer than a day makes no sense."""
TYPE_ADVICE = "state content_type or accept of the stages on both sides"
HEADER_ADVICE = (
    "leave the header out; or have the records come with one: by format: csv from the input, "
    'by accept: "text/csv; header=present" from a stage'
)
_ERROR_CHARACTERS = 500
_MASKED_BYTES = 1 << 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a server ended: ``its process exited with code 1 after 2.0 s``, and what may help."""

    how: str
    next: str = ""


class Server(Protocol):
    """What stands behind the URL of a stage that was started for it."""

    def ending(self) -> Ending | None:
        """How it ended; None while it runs."""
        ...

    def log_tail(self) -> str:
        """The last lines of its log, masked."""
        ...

    def close(self) -> None:
        """Stop it and keep its log. Never raises."""
        ...


class Restartable(Protocol):
    """What a stage needs of the server that was started for it, and of the next one where it dies."""

    connections: Connections
    """To the server that runs now."""

    def ending(self) -> Ending | None:
        """How it ended; None while it runs."""
        ...

    def is_stuck(self) -> bool:
        """Whether its ping is not answered, or says that it cannot work."""
        ...

    def log_tail(self) -> str:
        """The last lines of its log, masked."""
        ...

    def restart(self) -> None:
        """Release it, and start another one. Raises StageStartError."""
        ...

    def close(self) -> None:
        """Stop it, and release all that it holds. Never raises, may be called twice."""
        ...


class Turns:
    """Who may be in flight: some side by side, each with one turn, or one alone with all of them."""

    def __init__(self, concurrency: int) -> None:
        self.one = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._gathering = asyncio.Lock()

    @asynccontextmanager
    async def all(self) -> AsyncIterator[None]:
        """Hold every turn."""
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._gathering)  # two who gather at once would wait for each other
            for _ in range(self._concurrency):
                await held.enter_async_context(self.one)
            yield


class HttpStage:
    """An open stage behind a URL: kept-alive connections, and the server behind them if it was started for it."""

    def __init__(
        self,
        stage: "StageSpec",
        job: "Job",
        context: StageContext,
        connections: Connections,
        *,
        advice: Advice | None = None,
        served: Restartable | None = None,
    ) -> None:
        self.name = stage.name
        self._stage = stage
        self._job = job
        self.advice = advice or Advice()
        self.follow(self.advice)
        default = self.advice.max_concurrent_transforms or os.cpu_count() or 1
        self.concurrency = stage.concurrent_transforms(job.batch, default)
        self._sender = sender_of(stage, job)
        self._timeout_s = stage.invocations_timeout_s
        self._secrets = context.secrets
        self._connections = connections
        self._served = served
        self._has_died = False
        """Whether the server died; another one is started before the next request."""
        self.has_fitted = False
        """Whether an answer has been what the next stage takes, here or when the first mini-batch was tried."""
        self._restarting, self._asking = asyncio.Lock(), asyncio.Lock()
        self._was_alive_at = -math.inf
        """When it was last asked, on its loop's clock, with the answer that it is not stuck."""
        self.is_exclusive = self.concurrency == 1
        self._turns = Turns(self.concurrency)

    def follow(self, advice: Advice) -> None:
        """Make requests as this advice has them. A run has one for all its workers: what is sent must not differ.

        How many are in flight stays as this very server advised.
        """
        self.max_payload_bytes = self._stage.max_payload_bytes(self._job.batch, advice.max_payload_mb)
        self.exchange = Exchange.of(self._stage, self._job, advice)
        self.takes_table = takes_table(self._stage, self._job.input.format, advice)

    def takes_one(self, records: Records) -> bool:
        """Whether each of these records is a request of its own."""
        return self.exchange.takes_one(self.exchange.content_type_of(records))

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
        """Post the records and return the answer's, counted against them. Raises InvocationFailed, StageStartError."""
        if not len(records):
            raise InvocationFailed("NoRecords", "an empty request is never sent", Remedy.ISOLATE)
        async with self._turns.all() if alone else self._turns.one:
            with in_flight.Invocation(self.name):
                return Answer(await self._request(records, self.exchange.content_type_of(records)))

    def close(self) -> None:
        """Close the connections and stop the server that was started for this stage."""
        self._connections.close()
        if self._served:
            self._served.close()

    async def _request(self, records: Records, content_type: str) -> Records:
        body = await self._encode(records, content_type)
        headers = {"Content-Type": content_type, "Accept": self.exchange.accept or "*/*"}
        answer = await self._post(body, headers)
        self._raise_for_status(answer, content_type)
        return await self._decode(answer, content_type, len(records))

    def _raise_for_status(self, answer: HttpAnswer, sent: str) -> None:
        if 200 <= answer.status < 300:
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                message = f"the answer is compressed ({answer.headers['content-encoding']}), which was not asked for"
                raise InvocationFailed("WrongAnswer", message, Remedy.ISOLATE)
            return
        # Masked as it came: a secret may hold white space, and must not be cut before it is found.
        text = mask(answer.body[:_MASKED_BYTES].decode("utf-8", "replace"), self._secrets)
        message = " ".join(text.split())[:_ERROR_CHARACTERS]
        if answer.status == 415:
            message = f"it does not take {sent}, which {self._sender} gives{f': {message}' if message else ''}"
        remedy = _remedy(answer)
        if remedy is Remedy.NONE:
            message = f"stage {self.name!r} breaks its contract: {message}"
        delay_s = retry_after_s(answer.headers.get("retry-after", ""))
        raise InvocationFailed(f"HTTP {answer.status}", message, remedy, retry_after_s=delay_s)

    async def _encode(self, records: Records, content_type: str) -> Body:
        size = 0 if content.is_sent_as_it_lies(records, content_type) else int(records.nbytes)
        try:
            body = await _on_thread(partial(self.exchange.encode, records, content_type), size)
        except ContentError as exc:
            msg = f"stage {self.name!r} takes {content_type}, and what {self._sender} gives does not fit: {exc}"
            if self.has_fitted or self.exchange.can_send(records, content_type):
                raise InvocationFailed("CannotBeSent", mask(msg, self._secrets), Remedy.ISOLATE) from exc
            raise StageStartError(msg, next=HEADER_ADVICE if self.exchange.header else TYPE_ADVICE) from exc
        if len(body) > self.max_payload_bytes:
            limit = f"over the limit of {self.max_payload_bytes:,} (max_payload_mb)"
            records_text = f"{len(records):,} record{'s' if len(records) != 1 else ''}"
            raise InvocationFailed("PayloadTooLarge", f"{len(body):,} bytes of {records_text}, {limit}", Remedy.SMALLER)
        return body

    async def _post(self, body: Body, headers: Mapping[str, str]) -> HttpAnswer:
        used = await self._live_connections()
        try:
            return await used.post(body, headers, self._timeout_s)
        except TimeoutError as exc:
            message = f"no answer within {self._timeout_s:g} s (invocations_timeout_s)"
            failure = InvocationFailed("Timeout", message, Remedy.RETRY)
            raise await self._stuck_or(failure, used) from exc
        except OSError as exc:
            failure = InvocationFailed(type(exc).__name__, mask(str(exc), self._secrets), Remedy.RETRY)
            raise await self._died_or(failure, used) from exc

    async def _live_connections(self) -> Connections:
        """Connections to a server that lives, as far as is known: one that died is started again first."""
        if self._served and self._has_died:
            async with self._restarting:
                if self._has_died:
                    await asyncio.to_thread(self._served.restart)
                    self._connections, self._has_died = self._served.connections, False
        return self._connections

    async def _died_or(self, failure: InvocationFailed, used: Connections) -> InvocationFailed:
        """Tell a server that has ended, which no retry helps, from one that dropped a connection."""
        if not self._served:
            return failure
        deadline = asyncio.get_running_loop().time() + EXIT_WAIT_S
        while used is self._connections and not self._has_died:
            if ending := await asyncio.to_thread(self._served.ending):
                return await self._note_death(f"{ending.how}{f'; {ending.next}' if ending.next else ''}", used)
            if asyncio.get_running_loop().time() > deadline:
                return failure
            await asyncio.sleep(0.02)
        return _died_of_another()

    async def _stuck_or(self, failure: InvocationFailed, used: Connections) -> InvocationFailed:
        """Tell a server that is stuck, as after a record that never ends, from one that is slow.

        Asked for all that time out together by one of them.
        """
        if not self._served:
            return failure
        clock = asyncio.get_running_loop().time
        began = clock()
        async with self._asking:
            if used is not self._connections or self._has_died:
                return _died_of_another()
            if self._was_alive_at >= began:
                return failure
            asked = clock()
            if not await asyncio.to_thread(self._served.is_stuck):
                self._was_alive_at = asked
                return failure
            return await self._note_death(f"{failure.message}, and its ping is not answered with 200 either", used)

    async def _note_death(self, how: str, used: Connections) -> InvocationFailed:
        assert self._served
        log = await asyncio.to_thread(self._served.log_tail)
        if used is self._connections:  # else another one runs already
            self._has_died = True
        return InvocationFailed("ServerDied", mask(how, self._secrets), Remedy.DIED, traceback=log)

    async def _decode(self, answer: HttpAnswer, sent: str, count: int) -> Records:
        answered = answer.headers.get("content-type", "")
        decode = partial(self.exchange.decode, answer.body, answered, sent, count)
        try:
            records = await _on_thread(decode, len(answer.body))
        except ContentError as exc:
            raise InvocationFailed("WrongAnswer", mask(str(exc), self._secrets), Remedy.ISOLATE) from exc
        if len(records) != count:
            empty = f" (HTTP {answer.status} with an empty body)" if not answer.body else ""
            message = f"answered {len(records):,} records for {count:,} sent{empty}"
            raise InvocationFailed(WRONG_COUNT, message, Remedy.ISOLATE)
        # One that never fits is a stage that does not fit, which the next stage tells.
        fits = self.exchange.fits_next(records)
        if self.has_fitted and not fits:
            takes = f"{self.exchange.next_type}{' with a header' if self.exchange.next_header else ''}"
            message = f"answered {answered or 'without a content type'}; the next stage takes {takes}"
            raise InvocationFailed("WrongAnswer", message, Remedy.ISOLATE)
        self.has_fitted = self.has_fitted or fits
        return records


def _died_of_another() -> InvocationFailed:
    return InvocationFailed("ServerDied", "it died of another request, or by chance", Remedy.DIED)


async def _on_thread(work: Callable[[], T], size: int) -> T:
    return work() if size < THREAD_BYTES else await asyncio.to_thread(work)


def _remedy(answer: HttpAnswer) -> Remedy:
    if NO_REMEDY in answer.headers:
        return Remedy.NONE
    if answer.status == 413:
        return Remedy.SMALLER
    if answer.status in (408, 425, 429) or answer.status >= 500:
        return Remedy.RETRY
    return Remedy.ISOLATE


def retry_after_s(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, stated as a number or a date; None where it makes no sense."""
    if value.isascii() and value.strip().isdigit():
        return float(value) if float(value) <= LONGEST_ASKED_S else None
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    seconds = max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return seconds if seconds <= LONGEST_ASKED_S else None
