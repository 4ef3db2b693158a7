"""Pieces on S3: a multipart upload to the final key, left uncompleted, which nobody sees until it is completed.

Parts are written in the background, a few at a time; the attempt stands in the object's metadata, so that a published
object tells whose it is.
"""

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from batchpipe.storage.explain import WRITING
from batchpipe.storage.pending import Pending
from batchpipe.storage.s3_client import S3Client
from batchpipe.storage.store import ObjectMissingError, PendingLostError

if TYPE_CHECKING:
    from concurrent.futures import Future

PART_BYTES = 8 << 20
PARTS_OF_A_SIZE = 1_000
"""S3 allows 10,000 parts: each further thousand is 8 MiB larger, which makes 430 GiB."""

MOST_IN_FLIGHT = 2
ATTEMPT = "batchpipe-attempt"


class MultipartSink:
    """Writes one piece as parts. Holds at most one part being filled and two on their way."""

    def __init__(self, client: S3Client, uri: str, attempt: str) -> None:
        self._client, self._uri, self._attempt = client, uri, attempt
        self._upload_id = ""
        self._filling = bytearray()
        self._etags: list[str] = []
        self._on_their_way: deque[Future[str]] = deque()

    def write(self, data: memoryview) -> None:
        while data:
            room = self._part_bytes - len(self._filling)
            self._filling += data[:room]
            data = data[room:]
            if len(self._filling) == self._part_bytes:
                self._send()

    def seal(self, size: int, sha256: str) -> Pending:
        if self._filling or not self._parts_sent:
            self._send()
        while self._on_their_way:
            self._settle_one()
        return Pending(self._uri, self._attempt, size, sha256, upload_id=self._upload_id, etags=tuple(self._etags))

    def drop(self) -> None:
        for future in self._on_their_way:
            future.cancel()
        self._on_their_way.clear()
        self._filling.clear()
        if self._upload_id:
            abort(self._client, self._uri, self._upload_id)

    @property
    def _parts_sent(self) -> int:
        return len(self._etags) + len(self._on_their_way)

    @property
    def _part_bytes(self) -> int:
        return PART_BYTES * (1 + self._parts_sent // PARTS_OF_A_SIZE)

    def _send(self) -> None:
        if not self._upload_id:
            answer = self._client.call(WRITING, "create_multipart_upload", self._uri, Metadata={ATTEMPT: self._attempt})
            self._upload_id = answer["UploadId"]
        if len(self._on_their_way) == MOST_IN_FLIGHT:
            self._settle_one()
        part, self._filling = bytes(self._filling), bytearray()
        self._on_their_way.append(self._client.start(self._upload(self._parts_sent + 1, part)))

    async def _upload(self, number: int, part: bytes) -> str:
        answer = await self._client.call_async(
            WRITING, "upload_part", self._uri, UploadId=self._upload_id, PartNumber=number, Body=part
        )
        return str(answer["ETag"])

    def _settle_one(self) -> None:
        self._etags.append(self._client.wait(self._on_their_way.popleft()))


def complete(client: S3Client, pending: Pending, **condition: str) -> str:
    """Complete the upload under a condition and return the object's version."""
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(pending.etags, 1)]
    answer = client.call(
        WRITING,
        "complete_multipart_upload",
        pending.uri,
        UploadId=pending.upload_id,
        MultipartUpload={"Parts": parts},
        **condition,
    )
    return str(answer["ETag"]).strip('"')


def abort(client: S3Client, uri: str, upload_id: str) -> None:
    """Give an upload back; one that is gone is fine."""
    with suppress(PendingLostError, ObjectMissingError):
        client.call(WRITING, "abort_multipart_upload", uri, UploadId=upload_id)
