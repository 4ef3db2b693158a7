"""A stage that is called over HTTP, whoever started it: one invocation is one POST, or one a record.

Retries and halvings are made by the layer above, `invoke`; here every outcome becomes a reason and a remedy.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from batchpipe import content
from batchpipe.batch import ByteRecords, Records
from batchpipe.content import Body, ContentError
from batchpipe.errors import StageStartError
from batchpipe.redact import mask
from batchpipe.stages import Answer, InvocationFailed, Remedy, StageContext
from batchpipe.stages.connections import Connections, HttpAnswer
from batchpipe.stages.contract import Advice
from batchpipe.stages.tables import take_header, to_table

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec

THREAD_BYTES = 1 << 18
"""Bodies from this size on are encoded and decoded on a thread, so that the other requests go on."""
EXIT_WAIT_S = 0.5
"""How long after a broken connection the end of its server may take to be seen."""
_ERROR_CHARACTERS = 500

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
        """Stop it, keep its log, and release all that it holds. Never raises, may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Exchange:
    """How records become requests to one stage and answers become records."""

    content_type: str
    """As stated; empty where it is that of the records."""
    accept: str
    """Asked for; empty where nobody states it."""
    header: bool
    request_key: str
    answer_key: str
    is_counted: bool
    single_record: bool
    """Whether the stage takes one record a request, whatever the content type could hold."""
    table_type: str
    """What a table goes as where no content type is stated: as it came, if over HTTP, else as CSV."""

    @classmethod
    def of(cls, stage: "StageSpec", job: "Job", advice: Advice) -> "Exchange":
        """Put together what the job states, what the next stage states, and what the server advises."""
        position = [other.name for other in job.stages].index(stage.name)
        following = job.stages[position + 1 : position + 2]
        single_record = job.batch.max_records == 1
        if job.batch.max_records is None and advice.single_record is not None:
            single_record = advice.single_record
        return cls(
            content_type=stage.content_type or "",
            accept=stage.accept or (following[0].content_type if following else "") or "",
            header=stage.header or content.parse_content_type(stage.content_type or "")[1].get("header") == "present",
            request_key=stage.request_key or "",
            answer_key=stage.answer_key or "",
            is_counted=stage.count != "none",
            single_record=single_record,
            table_type=content.ARROW if position and job.stages[position - 1].is_http else content.CSV,
        )

    def content_type_of(self, records: Records) -> str:
        """The request's Content-Type: as stated, else what arrives."""
        return self.content_type or (self.table_type if isinstance(records, pa.Table) else records.content_type)

    def takes_one(self, content_type: str) -> bool:
        """Whether each record is a request of its own."""
        return self.single_record or not content.holds_many(content_type)

    def encode(self, records: Records, content_type: str) -> Body:
        """The request's body. Raises ContentError."""
        if self.takes_one(content_type):
            return content.encode_one(records, content_type, header=self.header, request_key=self.request_key)
        return content.encode(records, content_type, header=self.header, request_key=self.request_key)

    def decode(self, body: bytes, answered: str, sent: str, count: int) -> Records:
        """The answer's records; ``count`` of them were sent as ``sent``. Raises ContentError."""
        answered = answered or self.accept or sent
        if not self.is_counted:
            return _uncounted(body, answered, count)
        if self.takes_one(sent):
            return content.decode_one(body, answered, answer_key=self.answer_key)
        if not body:
            return ByteRecords.of([])
        if not content.holds_many(answered):
            raise ContentError(f"records of {answered} cannot be counted; does `accept` name a type of many records?")
        records = content.decode(body, answered, answer_key=self.answer_key)
        media_type, parameters = content.parse_content_type(answered)
        if isinstance(records, ByteRecords) and media_type == content.CSV and parameters.get("header") == "present":
            names, records = take_header(records)
            return to_table(records, names)
        return records


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
        server: Server | None = None,
    ) -> None:
        self.name = stage.name
        self.advice = advice or Advice()
        default = self.advice.max_concurrent_transforms or os.cpu_count() or 1
        self.concurrency = stage.concurrent_transforms(job.batch, default)
        self.max_payload_bytes = stage.max_payload_bytes(job.batch, self.advice.max_payload_mb)
        self.exchange = Exchange.of(stage, job, self.advice)
        self.takes_table = _takes_table(stage, job.input.format)
        self._timeout_s = stage.invocations_timeout_s
        self._secrets = context.secrets
        self._connections = connections
        self._server = server
        self._free = asyncio.Semaphore(self.concurrency)

    def takes_one(self, records: Records) -> bool:
        """Whether each of these records is a request of its own."""
        return self.exchange.takes_one(self.exchange.content_type_of(records))

    async def invoke(self, records: Records) -> Answer:
        """Post the records and return the answer's, counted against them. Raises InvocationFailed, StageStartError."""
        if not len(records):
            raise InvocationFailed("NoRecords", "an empty request is never sent", Remedy.ISOLATE)
        return Answer(await self._request(records, self.exchange.content_type_of(records)))

    def close(self) -> None:
        """Close the connections and stop the server that was started for this stage."""
        self._connections.close()
        if self._server:
            self._server.close()

    async def _request(self, records: Records, content_type: str) -> Records:
        async with self._free:
            body = await self._encode(records, content_type)
            headers = {"Content-Type": content_type, "Accept": self.exchange.accept or "*/*"}
            answer = await self._post(body, headers)
            _raise_for_status(answer, self._secrets)
            return await self._decode(answer, content_type, len(records))

    async def _encode(self, records: Records, content_type: str) -> Body:
        size = int(records.nbytes) if len(records) > 1 else 0  # one record is sent as it lies
        try:
            body = await _on_thread(partial(self.exchange.encode, records, content_type), size)
        except ContentError as exc:
            msg = f"stage {self.name!r} takes {content_type}, and what arrives does not fit: {exc}"
            advice = "state content_type or accept of the stages on both sides"
            raise StageStartError(msg, next=advice) from exc
        if len(body) > self.max_payload_bytes:
            limit = f"over the limit of {self.max_payload_bytes:,} (max_payload_mb)"
            records_text = f"{len(records):,} record{'s' if len(records) != 1 else ''}"
            raise InvocationFailed("PayloadTooLarge", f"{len(body):,} bytes of {records_text}, {limit}", Remedy.SMALLER)
        return body

    async def _post(self, body: Body, headers: Mapping[str, str]) -> HttpAnswer:
        try:
            return await self._connections.post(body, headers, self._timeout_s)
        except TimeoutError as exc:
            message = f"no answer within {self._timeout_s:g} s (invocations_timeout_s)"
            raise InvocationFailed("Timeout", message, Remedy.RETRY) from exc
        except OSError as exc:
            await self._raise_if_gone(exc)
            raise InvocationFailed(type(exc).__name__, mask(str(exc), self._secrets), Remedy.RETRY) from exc

    async def _raise_if_gone(self, cause: OSError) -> None:
        """Tell a server that has ended, which no retry helps, from one that dropped a connection."""
        if not self._server:
            return
        deadline = asyncio.get_running_loop().time() + EXIT_WAIT_S
        while not (ending := await asyncio.to_thread(self._server.ending)):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.02)
        log = await asyncio.to_thread(self._server.log_tail)
        raise StageStartError(f"stage {self.name!r} is gone: {ending.how}", log=log, next=ending.next) from cause

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
            raise InvocationFailed("WrongAnswer", message, Remedy.ISOLATE)
        return records


async def _on_thread(work: Callable[[], T], size: int) -> T:
    return work() if size < THREAD_BYTES else await asyncio.to_thread(work)


def _raise_for_status(answer: HttpAnswer, secrets: frozenset[str]) -> None:
    if 200 <= answer.status < 300:
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            message = f"the answer is compressed ({answer.headers['content-encoding']}), which was not asked for"
            raise InvocationFailed("WrongAnswer", message, Remedy.ISOLATE)
        return
    if answer.status == 413:
        remedy = Remedy.SMALLER
    elif answer.status in (408, 425, 429) or answer.status >= 500:
        remedy = Remedy.RETRY
    else:
        remedy = Remedy.ISOLATE
    text = " ".join(answer.body[: 4 * _ERROR_CHARACTERS].decode("utf-8", "replace").split())
    message = mask(text, secrets)[:_ERROR_CHARACTERS]
    delay_s = retry_after_s(answer.headers.get("retry-after", ""))
    raise InvocationFailed(f"HTTP {answer.status}", message, remedy, retry_after_s=delay_s)


def retry_after_s(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, stated as a number or a date; None where it makes no sense."""
    if value.strip().isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _uncounted(body: bytes, content_type: str, count: int) -> ByteRecords:
    """An answer that is not counted: all of it stands for the first record, nothing for the others."""
    ends = np.full(count, len(body), np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[1:]])
    return ByteRecords(memoryview(body), starts, ends, content.parse_content_type(content_type)[0])


def _takes_table(stage: "StageSpec", input_format: str) -> bool:
    """Whether input text must be parsed before this stage, if it comes first: it cannot be sent as it is read."""
    media_type, parameters = content.parse_content_type(stage.content_type or "")
    if input_format == "csv":
        return stage.header or parameters.get("header") == "present" or media_type not in ("", content.CSV)
    return input_format == "jsonl" and media_type in (content.CSV, content.ARROW)
