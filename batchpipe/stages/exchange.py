"""How records become the requests of one stage, and its answers records again, as the job says. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from batchpipe import content
from batchpipe.batch import ByteRecords, Records
from batchpipe.content import Body, ContentError
from batchpipe.stages.contract import Advice
from batchpipe.stages.tables import behind_header, can_be_table, knows_columns, to_table

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


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
    """What a table goes as where no content type is stated: as advised, else as it came, if over HTTP, else as CSV."""
    next_type: str
    """What the next stage takes, where it is called over HTTP too and states it; else empty."""
    next_header: bool
    """Whether it wants a header, too."""

    @classmethod
    def of(cls, stage: "StageSpec", job: "Job", advice: Advice) -> "Exchange":
        """Put together what the job states, what the next stage states, and what the server advises."""
        position = [other.name for other in job.stages].index(stage.name)
        following = job.stages[position + 1 : position + 2]
        next_type = (following[0].content_type or "") if following and following[0].is_http else ""
        follows_http = position > 0 and job.stages[position - 1].is_http
        # An object is a record, also where its bytes could be called many: so it goes alone, and so does its answer.
        are_objects = job.input.format == "object" and all(each.is_http for each in job.stages[:position])
        single_record = job.batch.max_records == 1
        if job.batch.max_records is None:
            single_record = are_objects or bool(advice.single_record)
        return cls(
            content_type=stage.content_type or "",
            accept=stage.accept or (following[0].content_type if following else "") or "",
            header=_wants_header(stage),
            request_key=stage.request_key or "",
            answer_key=stage.answer_key or "",
            is_counted=stage.count != "none",
            single_record=single_record,
            table_type=advice.table_type or (content.ARROW if follows_http else content.CSV),
            next_type=next_type,
            next_header=bool(next_type) and _wants_header(following[0]),
        )

    def content_type_of(self, records: Records) -> str:
        """The request's Content-Type: as stated, else what arrives."""
        if self.content_type:
            return self.content_type
        if isinstance(records, pa.Table):
            return self.table_type
        came_with_header = records.header and not self.header  # else the job asks for it, and the type is as stated
        return content.named(records.content_type) if came_with_header else records.content_type

    def takes_one(self, content_type: str) -> bool:
        """Whether each record is a request of its own."""
        return self.single_record or not content.holds_many(content_type)

    def encode(self, records: Records, content_type: str) -> Body:
        """The request's body. Raises ContentError."""
        if isinstance(records, ByteRecords) and _must_be_parsed(records, content_type, header=self.header):
            records = to_table(records)
        header = self.header or content.has_header(content_type)
        encode = content.encode_one if self.takes_one(content_type) else content.encode
        return encode(records, content_type, header=header, request_key=self.request_key)

    def decode(self, body: bytes, answered: str, sent: str, count: int) -> Records:
        """The answer's records; ``count`` of them were sent as ``sent``. Raises ContentError."""
        answered = answered or self.accept or sent
        if not self.is_counted:
            return _uncounted(body, answered, count)
        is_named = content.parse_content_type(answered)[0] == content.CSV and content.has_header(answered)
        if self.takes_one(sent):
            if is_named and body:
                rows = behind_header(content.decode(body, answered))
                if len(rows) == 1:  # else it is a whole file, as an object is one
                    return rows
            return content.decode_one(body, answered, answer_key=self.answer_key)
        if not body:
            return ByteRecords.of([])
        if not content.holds_many(answered):
            raise ContentError(f"records of {answered} cannot be counted; does `accept` name a type of many records?")
        records = content.decode(body, answered, answer_key=self.answer_key)
        return behind_header(records) if is_named else records

    def can_send(self, records: Records, content_type: str) -> bool:
        """Whether records of this kind can be sent at all; what else is wrong is a single record's."""
        return _can_be_sent(records, content_type, header=self.header)

    def fits_next(self, records: Records) -> bool:
        """Whether the next stage could be sent these."""
        return not self.next_type or _can_be_sent(records, self.next_type, header=self.next_header)


def _can_be_sent(records: Records, content_type: str, *, header: bool) -> bool:
    if content.can_be_sent(records, content_type, header=header):
        return True
    return isinstance(records, ByteRecords) and _must_be_parsed(records, content_type, header=header)


def _must_be_parsed(records: ByteRecords, content_type: str, *, header: bool) -> bool:
    """Whether these can be sent as this type as a table only, whose columns they name themselves."""
    media_type = content.parse_content_type(content_type)[0]
    if media_type == records.content_type and (records.header or not header):
        return False  # as nearly always: asked for each of ten thousand requests a second
    if media_type not in content.TABULAR or not can_be_table(records):
        return False
    is_sent_as_it_is = content.can_be_sent(records, content_type, header=header)
    return not is_sent_as_it_is and len(records) > 0 and knows_columns(records)


def _wants_header(stage: "StageSpec") -> bool:
    return stage.header or content.has_header(stage.content_type or "")


def _uncounted(body: bytes, content_type: str, count: int) -> ByteRecords:
    """An answer that is not counted: all of it stands for the first record, nothing for the others."""
    ends = np.full(count, len(body), np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[1:]])
    return ByteRecords(memoryview(body), starts, ends, content.parse_content_type(content_type)[0])


def takes_table(stage: "StageSpec", input_format: str, advice: Advice) -> bool:
    """Whether input text must be parsed before this stage, if it comes first: it cannot be sent as it is read."""
    media_type, _ = content.parse_content_type(stage.content_type or advice.table_type or "")
    if input_format == "csv":
        return media_type not in ("", content.CSV)
    return input_format == "jsonl" and media_type in (content.CSV, content.ARROW)
