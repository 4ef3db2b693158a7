"""The reading side of a split: its records as mini-batches, and the account of what became of each (G1)."""

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from batchpipe import gauge
from batchpipe.batch import ByteRecords, MiniBatch, Origins, iter_batches
from batchpipe.convert import BadRecord
from batchpipe.formats import FORMATS, RangeReader, misfit_error
from batchpipe.formats.compression import compression_of
from batchpipe.formats.encodings import record_encoding
from batchpipe.manifest import READING, Accounts, Failure, RangeResult
from batchpipe.orders import Orders
from batchpipe.outcome import FailedRecord, FailureLimit, Outcome
from batchpipe.picks import PickedRange
from batchpipe.quarantine import Quarantine
from batchpipe.redact import mask, secrets_at_work
from batchpipe.split import Range, Split
from batchpipe.storage import ObjectFile, open_store

MAX_MESSAGE_CHARACTERS = 2_000
OPENED_AHEAD = 8
"""Small objects of a split that are asked for before they are read: of a thousand, each would be waited for."""


@dataclass(slots=True)
class _Counts:
    """Records of one range by what became of them, and what its reader found at its ends."""

    read: int = 0
    written: int = 0
    quarantined: int = 0
    dropped: int = 0
    first: int = -1
    next_start: int = -1
    bytes_read: int = 0


class Source:
    """The records of one split. A context manager: while it is open its progress shows in the worker's gauge."""

    def __init__(self, split: Split, orders: Orders, quarantine: Quarantine, limit: FailureLimit) -> None:
        self.read_s = 0.0
        self._split = split
        self._orders = orders
        self._job = orders.job
        self._format = FORMATS[orders.job.input.format]
        self._schema = orders.schemas.input
        self._quarantine = quarantine
        self._limit = limit
        self._counts = [_Counts() for _ in split.ranges]
        self._secrets = secrets_at_work(orders.job)
        self._unparsed: list[tuple[int, int]] = []
        """Range and ordinal of records whose placeholders wait for the answers before them to be written."""
        # Bytes may be passed on as they are only if they hold just the columns asked for.
        self._must_parse = self._schema is not None and not self._schema.is_whole
        self._encoding = record_encoding(self._job.input.encoding)
        self._shown = {"records": 0, "bytes": 0}

    def batches(self, *, as_tables: bool, with_header: bool = False) -> Iterator[MiniBatch]:
        """Mini-batches of the split, in order, text parsed where `as_tables`; CSV that is not knows its header.

        Records that cannot be parsed are quarantined instead. Raises InputError where nothing can be read, or where
        a type that we inferred does not fit.
        """
        header = self._header() if with_header and not (as_tables or self._must_parse) else b""
        max_bytes = self._orders.max_batch_bytes - len(header)
        batches = iter_batches(self._blocks(), self._orders.max_batch_records, max_bytes)
        while not self._limit.is_spent:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is not None and (as_tables or self._must_parse):
                batch = self._parse(batch)
            elif batch is not None and self._encoding != "utf-8":
                batch = self._recode(batch)
            if batch is not None and header and isinstance(batch.records, ByteRecords):
                batch = MiniBatch(replace(batch.records, header=header), batch.origins)
            self.read_s += time.perf_counter() - began
            if batch is None:
                return
            if len(batch):
                yield batch

    def failed_of(self, sent: MiniBatch, outcome: Outcome) -> Origins:
        """Where the records of a mini-batch lie that failed, and those up to its end that could not be parsed."""
        places = np.array([failed.place for failed in outcome.failed], np.int64)
        last = (int(sent.origins.ranges[-1]), int(sent.origins.ordinals[-1]))
        before = [place for place in self._unparsed if place <= last]
        self._unparsed = [place for place in self._unparsed if place > last]
        return Origins.concat([sent.origins.take(places), _origins_at(before)])

    def unparsed(self) -> Origins:
        """Where the records behind the last mini-batch lie that could not be parsed."""
        return _origins_at(self._unparsed)

    def settle(self, sent: MiniBatch, outcome: Outcome) -> None:
        """Count what became of a mini-batch's records, by range; quarantine those that failed."""
        self._count("written", sent.origins.take(outcome.places))
        self._count("dropped", sent.origins.take(outcome.dropped))
        for failed in outcome.failed:
            self._add_failure(sent, failed)
        self._show("records", len(sent))

    def results(self) -> tuple[RangeResult, ...]:
        """What each range yielded."""
        return tuple(
            RangeResult(
                object=found.object.index,
                start=found.start,
                first=counts.first,
                next_start=counts.next_start,
                bytes_read=counts.bytes_read,
                accounts=Accounts(counts.read, counts.written, counts.quarantined, counts.dropped),
            )
            for found, counts in zip(self._split.ranges, self._counts, strict=True)
        )

    def describe(self, origins: Origins) -> str:
        """Where records lie, for people: object, record, byte offset where the format has one."""
        found = self._split.ranges[int(origins.ranges[0])]
        of_what = "" if found.is_first else f" after byte {found.start:,}"
        record = f", record {origins.ordinals[0]:,}{of_what}"
        offset = f", byte {origins.offsets[0]:,}" if origins.offsets[0] >= 0 else ""
        return f"{found.object.shown}{record}{offset}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What was shown of a split at work is in the driver's tally from here on.
        for name, shown in self._shown.items():
            gauge.show(name, -shown)

    def _blocks(self) -> Iterator[MiniBatch]:
        with closing(self._files()) as files:
            for number, file in files:
                yield from self._blocks_of(number, file)

    def _files(self) -> Generator[tuple[int, ObjectFile]]:
        """The number of each range that holds anything, and its open object: small ones are opened a few ahead."""
        opened: deque[tuple[int, ObjectFile]] = deque()
        try:
            for number, one in ((number, found.object) for number, found in enumerate(self._split.ranges)):
                if not one.size:
                    continue
                store = open_store(one.uri, self._job.input.storage_options)
                opened.append((number, store.open(one.uri, size=one.size, version=one.version)))
                if len(self._split.ranges) > 1:
                    opened[-1][1].prefetch()
                if len(opened) > OPENED_AHEAD:
                    yield opened.popleft()
            while opened:
                yield opened.popleft()
        finally:
            for _, file in opened:
                file.close()

    def _blocks_of(self, number: int, file: ObjectFile) -> Iterator[MiniBatch]:
        found, counts = self._split.ranges[number], self._counts[number]
        with file:
            reader = self._open_range(file, found, number)
            for block in reader:
                counts.first = reader.first
                self._count("read", block.origins)
                self._show_bytes(reader.bytes_read, found, counts, file)
                yield block
            counts.first, counts.next_start = reader.first, reader.next_start
            self._show_bytes(reader.bytes_read, found, counts, file)

    def _open_range(self, file: ObjectFile, found: Range, number: int) -> RangeReader:
        if found.picks is not None:
            return PickedRange(file, found, number, self._job.input, self._schema, self._format)
        return self._format.open_range(file, found, number, self._job.input, self._schema)

    def _show_bytes(self, read: int, found: Range, counts: _Counts, file: ObjectFile) -> None:
        """Tell how much of the object, as it is stored, the range has taken so far: a part of the bytes listed."""
        if compression_of(found.object.uri, self._job.input.compression) != "none":
            read = file.tell()
        whole = found.is_whole or self._job.input.format == "parquet"
        taken = min(read, found.object.size if whole else found.stop - found.start)
        self._show("bytes", taken - counts.bytes_read)
        counts.bytes_read = taken

    def _header(self) -> bytes:
        to_header = self._format.to_header
        return to_header(self._schema, self._job.input) if to_header and self._schema else b""

    def _parse(self, batch: MiniBatch) -> MiniBatch:
        to_table = self._format.to_table
        if to_table is None or self._schema is None or not isinstance(batch.records, ByteRecords):
            return batch
        parsed = to_table(batch.records, self._schema, self._job.input)
        for bad in parsed.failures:
            if bad.is_guess:
                found = self._split.ranges[int(batch.origins.ranges[bad.index])]
                raise misfit_error(bad, found.object.shown, int(batch.origins.offsets[bad.index]))
            self._add_bad(batch, bad)
        origins = batch.origins if not parsed.failures else batch.origins.take(parsed.kept)
        return MiniBatch(parsed.table, origins)

    def _recode(self, batch: MiniBatch) -> MiniBatch:
        """Text in UTF-8, in which stages get it; no value of it is looked at."""
        records = batch.records
        if not isinstance(records, ByteRecords):
            return batch
        texts: list[bytes] = []
        kept: list[int] = []
        for place, record in enumerate(records.to_list()):
            try:
                texts.append(record.decode(self._encoding).encode())
                kept.append(place)
            except UnicodeDecodeError as error:
                self._add_bad(batch, BadRecord(place, f"is not {self._encoding}: {error.reason} (input.encoding)"))
        return MiniBatch(ByteRecords.of(texts, records.content_type), batch.origins.take(np.array(kept, np.int64)))

    def _add_bad(self, batch: MiniBatch, bad: BadRecord) -> None:
        reason = "WrongType" if bad.column else "Unparsable"
        self._limit.found += 1
        if self._job.on_error.placeholder is not None:
            self._unparsed.append((int(batch.origins.ranges[bad.index]), int(batch.origins.ordinals[bad.index])))
        self._keep(batch, bad.index, self._failure(batch, bad.index, READING, reason, bad.reason))

    def _add_failure(self, sent: MiniBatch, failed: FailedRecord) -> None:
        failure = self._failure(sent, failed.place, failed.stage, failed.why.reason, failed.why.message)
        failure = replace(failure, attempts=failed.attempts, location=failed.why.location)
        self._keep(sent, failed.place, failure, mask(failed.why.traceback, self._secrets))

    def _keep(self, batch: MiniBatch, place: int, failure: Failure, traceback: str = "") -> None:
        self._quarantine.add(failure, batch, place, traceback)
        self._counts[int(batch.origins.ranges[place])].quarantined += 1

    def _failure(self, batch: MiniBatch, place: int, stage: str, reason: str, message: str) -> Failure:
        origins, found = batch.origins, self._split.ranges[int(batch.origins.ranges[place])]
        ordinal = int(origins.ordinals[place])
        return Failure(
            object=found.object.shown,
            version=found.object.version,
            range_start=found.start,
            ordinal=ordinal,
            offset=int(origins.offsets[place]),
            stage=stage,
            reason=reason,
            # Cut after masking: half a secret would not be found.
            message=mask(message, self._secrets)[:MAX_MESSAGE_CHARACTERS],
            # A redrive may know a record by its offset alone.
            record=ordinal if found.is_first and ordinal >= 0 else None,
        )

    def _count(self, what: str, origins: Origins) -> None:
        for number in np.flatnonzero(counted := np.bincount(origins.ranges)):
            counts = self._counts[number]
            setattr(counts, what, getattr(counts, what) + int(counted[number]))

    def _show(self, name: str, more: int) -> None:
        gauge.show(name, more)
        self._shown[name] += more


def _origins_at(places: list[tuple[int, int]]) -> Origins:
    ranges, ordinals = np.array(places, np.int64).reshape(-1, 2).T
    return Origins(ranges.astype(np.int32), ordinals, np.full(len(places), -1, np.int64))
